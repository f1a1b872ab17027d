"""sparsenlp info"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from .. import native, native_cuda, triton_kernels
from ..measure import machine
from ..ops.bsr_linear import BACKENDS
from .console import print_json, say

OPS = (
    "bsr_linear",
    "nm_linear",
    "sparse_ffn",
    "dense_attention",
    "block_sparse_attention",
    "encoder_layer",
    "decoder_layers",
    "add_layer_norm",
    "embed_layer_norm",
)
DTYPES = {"f32": "float32", "bf16": "bfloat16", "i8": "int8"}


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show what this installation can do here: CPU, instruction set, threads, and the backends of each op."""
    data = collect()
    if json:
        print_json(data)
        return
    m = data["machine"]
    isas = ", ".join(data["isas"]) or f"none: {native.why_unavailable}"
    lines = {
        "sparsenlp": m["sparsenlp"],
        "CPU": f"{m['cpu']}, {m['cores']} cores",
        "ISA in use": m["isa"] or "none",
        "ISAs available": isas,
        "threads": f"{m['threads']}",
        "torch": m["torch"],
        "transformers": data["transformers"] or "not installed; pip install 'sparsenlp[hf]'",
        "system": m["os"],
    }
    for op, backends in data["ops"].items():
        for backend, state in backends.items():
            lines[f"{op}, {backend}"] = state
    width = max(map(len, lines))
    for name, value in lines.items():
        say(f"{name:<{width}}  {value}")


def collect() -> dict[str, Any]:
    """The same as JSON data; transformers is not imported."""
    reason = triton_kernels.why_unavailable()
    runs = f"{', '.join((*DTYPES.values(), 'float16'))} on a GPU; compiled and simulated, not run on hardware"
    cuda = (
        "2:4 weights of float16, bfloat16 and int8, on GPUs from sm_80; compiled and simulated, not run on hardware"
        if native_cuda.available
        else f"unavailable: {native_cuda.why_unavailable}"
    )
    others = {
        "bsr_linear": {"triton": f"unavailable: {reason}" if reason else runs},
        "nm_linear": {"cuda": cuda},
    }
    return {
        "machine": machine(),
        "isas": native.isas(),
        "native": native.available,
        "transformers": _installed("transformers"),
        "ops": {op: _backends(op) | others.get(op, {}) for op in OPS},
    }


def _backends(op: str) -> dict[str, str]:
    """{backend: what it does here} of one op."""
    ranks = {isa: rank for rank, isa in enumerate(native.isas())}
    cap = ranks.get(native.isa() or "", 0)
    found = {n.rpartition(".")[2]: isas for n, isas in native.kernels().items() if n.startswith(f"{op}.")}
    in_use = {dtype: next(isa for isa in isas if ranks[isa] >= cap) for dtype, isas in found.items()}
    kernels = ", ".join(f"{DTYPES[dtype]} on {isa}" for dtype, isa in in_use.items())
    states = {
        "native": f"weights of {kernels}" if native.available else f"unavailable: {native.why_unavailable}",
        "reference": "any dtype and device; correct, not fast",
    }
    return {backend: states[backend] for backend in BACKENDS}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

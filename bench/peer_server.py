"""Another inference engine in a process of its own: builds models, calls them when told, and takes the time.

`model_peers.py` starts it with the interpreter of the environment that has the engines. It reads one JSON object a
line and answers with one; what engines print goes to stderr. Needs nothing of sparsenlp.

    {"do": "versions"}                                             -> {engine: version, or null if it is absent}
    {"do": "build", "name", "folder", "threads"}                   -> {}, and writes what it computes to NAME.npy
    {"do": "visit", "name", "seconds"}                             -> {"samples": seconds for each call}

A folder has the dense model as transformers writes it, and inputs.npz. An error is {"error": one line}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], Any]

NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx", "transformers"),
    "openvino": ("openvino", "onnxruntime", "onnx", "transformers"),
    "zentorch": ("zentorch", "transformers"),
    "deepsparse": ("deepsparse", "onnxruntime", "onnx", "transformers"),
}
"""Engine -> the modules it takes."""


def versions() -> dict[str, Any]:
    """Engine -> its version; None where a module of NEEDS is absent."""
    found: dict[str, Any] = {}
    for engine, modules in NEEDS.items():
        try:
            found[engine], *_ = [metadata.version(module) for module in modules]
        except metadata.PackageNotFoundError:
            found[engine] = None
    return found


def build(name: str, folder: Path, threads: int) -> Step:
    """A step that runs the model of a folder; `name` begins with engine and precision."""
    engine, precision, *_ = name.split()
    inputs = dict(np.load(folder / "inputs.npz"))
    return ENGINES[engine](folder, precision, inputs, threads)


def load(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def onnx_file(folder: Path, form: str, inputs: dict[str, np.ndarray]) -> Path:
    """The model in a form of peer_onnx.py, written when it is first asked for."""
    import peer_onnx

    path = folder / f"{form}.onnx"
    if path.exists():
        return path
    if form == "fp32":
        return peer_onnx.export(load(folder), inputs, path)
    source = onnx_file(folder, "fp32", inputs)
    if form == "dynamic_int8":
        return peer_onnx.dynamic_int8(source, path)
    return getattr(peer_onnx, form)(source, inputs, path)


def onnx_runtime(folder: Path, precision: str, inputs: dict[str, np.ndarray], threads: int) -> Step:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls
    form = {"fp32": "fp32", "int8": "dynamic_int8"}[precision]
    session = runtime.InferenceSession(str(onnx_file(folder, form, inputs)), options)
    return lambda: session.run(None, inputs)[0]


def open_vino(folder: Path, precision: str, inputs: dict[str, np.ndarray], threads: int) -> Step:
    core = import_module("openvino").Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("this CPU has no bf16")
    hint = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}[precision]
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    form = "qdq_int8" if precision == "int8" else "fp32"
    request = core.compile_model(str(onnx_file(folder, form, inputs)), "CPU", settings).create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]


def zen_torch(folder: Path, precision: str, inputs: dict[str, np.ndarray], threads: int) -> Step:
    torch = import_module("torch")
    import_module("zentorch")
    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True
    model = load(folder).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    compiled = torch.compile(model, backend="zentorch", dynamic=False)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def step() -> Any:
        with torch.no_grad():
            return compiled(**tensors)[0].float()

    return step


def deep_sparse(folder: Path, precision: str, inputs: dict[str, np.ndarray], threads: int) -> Step:
    os.environ["NM_DISABLE_ANALYTICS"] = "True"  # it reports its use over the network otherwise
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        raise RuntimeError(f"expected numpy below 2, with which its results are wrong, got {np.__version__}")
    form = {"fp32": "fp32", "int8": "sparseml_int8"}[precision]
    arrays = [inputs["input_ids"], inputs["attention_mask"]]
    path = str(onnx_file(folder, form, inputs))
    engine = import_module("deepsparse").compile_model(path, batch_size=len(arrays[0]), num_cores=threads)
    return lambda: engine.run(arrays, val_inp=False)[0]


ENGINES = {"onnxruntime": onnx_runtime, "openvino": open_vino, "zentorch": zen_torch, "deepsparse": deep_sparse}


def call_for(step: Step, seconds: float) -> list[float]:
    """One untimed call, then calls until so many seconds are over, at least one; seconds for each."""
    step()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return samples


def answer(request: dict[str, Any], steps: dict[str, Step]) -> dict[str, Any]:
    """Do what is asked; `steps` are the models that have been built."""
    if request["do"] == "versions":
        return versions()
    name = request["name"]
    if request["do"] == "visit":
        return {"samples": call_for(steps[name], request["seconds"])}
    folder = Path(request["folder"])
    steps[name] = build(name, folder, request["threads"])
    np.save(folder / f"{name}.npy", np.asarray(steps[name]()))
    return {}


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), steps)
        except Exception as error:  # whatever an engine raises becomes the reason why it is not timed
            reply = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()

"""bsr_linear on the layers of a really pruned model, whose rows are uneven, beside uniform masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from candidates import call
from harness import OWN_DENSE, dense_baselines, warmed
from safetensors.torch import load_file

from sparsenlp import BlockSparse, SparseLinear, from_pretrained
from sparsenlp.data.demo import minilm_directory
from sparsenlp.measure import interleave, ratio
from sparsenlp.prune import Block, global_masks
from sparsenlp.reference import bsr_linear as reference

from cases import TOLERANCES, BsrLinearCase  # isort: skip  (found through harness)

Row = dict[str, Any]

PATTERN, SPARSITY = Block(8, 1), 0.9  # of the model that is pruned here


def pruned_weights(directory: Path | None, count: int | None = None) -> dict[str, BlockSparse]:
    """name -> sparse weight of a model written by `save_pretrained`, the first `count` of them.

    directory  None prunes the packaged MiniLM-L6 by magnitude, one ranking for all layers, to 90 %

    Raises ModuleNotFoundError if transformers or the packaged model is needed and absent, CheckpointError
    if the directory cannot be read, ValueError if it has no sparse layer.
    """
    if directory is None:
        weights = prune_minilm()
    else:
        modules = from_pretrained(directory).named_modules()
        weights = {name: module.weight for name, module in modules if isinstance(module, SparseLinear)}
    if not weights:
        raise ValueError(f"--model: expected a model with sparse layers, got none in {directory}")
    return dict(list(weights.items())[:count])


def prune_minilm() -> dict[str, BlockSparse]:
    """The linear weights of MiniLM-L6's encoder, pruned; read from its file, as transformers is slow to import."""
    tensors = load_file(minilm_directory() / "model.safetensors")
    linear = {name: t for name, t in tensors.items() if name.startswith("encoder.layer.") and t.dim() == 2}
    masks = global_masks({name: t.abs() for name, t in linear.items()}, PATTERN, SPARSITY)
    block = (PATTERN.n, PATTERN.k)
    return {
        name.removesuffix(".weight"): BlockSparse.from_dense(linear[name] * mask, block) for name, mask in masks.items()
    }


def measure_layers(weights: dict[str, BlockSparse], tokens: tuple[int, ...], seconds: float) -> list[Row]:
    """A row for each layer and number of tokens: its time, its uniform twin's and the dense layers'.

    The uniform twin has as many blocks, in expectation, and the same dtype and block, at random places.
    """
    return [measure_layer(name, weight, m, seconds) for name, weight in weights.items() for m in tokens]


def measure_layer(name: str, weight: BlockSparse, tokens: int, seconds: float) -> Row:
    int8 = weight.scales is not None
    dtype = torch.float32 if int8 else weight.values.dtype
    case = BsrLinearCase((tokens,), *weight.shape, weight.block, weight.density, dtype=dtype, int8=int8, seed=7)
    x, bias, twin = case.x(), case.bias_vector(), case.weight()
    assert bias is not None
    steps = {"real": call(x, weight, bias), "uniform": call(x, twin, bias)}
    check(steps["real"](), x, weight, bias)
    check(steps["uniform"](), x, twin, bias)
    dense = dense_baselines(weight.to_dense().float(), bias.float(), x.float())
    timings = interleave(warmed(steps | dense), seconds)
    own = OWN_DENSE["int8" if int8 else "bf16" if dtype == torch.bfloat16 else "f32"]
    best = min(dense, key=lambda baseline: timings[baseline].median)
    rows = weight.row_density()
    return {
        "layer": name,
        "shape": list(weight.shape),
        "block": list(weight.block),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "density": weight.density,
        "row_density": {"min": float(rows.min()), "max": float(rows.max())},
        "seconds": timings["real"].as_dict(),
        "uniform_seconds": timings["uniform"].as_dict(),
        "time_over_uniform": ratio(timings["real"], timings["uniform"]).median,
        "own_dense": own,
        "speedup": {baseline: ratio(timings[baseline], timings["real"]).median for baseline in dense},
        "best_dense": best,
    }


def check(y: torch.Tensor, x: torch.Tensor, weight: BlockSparse, bias: torch.Tensor) -> None:
    """Raise AssertionError unless y is what the reference gives in float64.

    Tolerances are for outputs of about 1, which these are not: the largest output is the unit.
    """
    values = weight.values if weight.scales is not None else weight.values.double()
    pattern = (weight.crow_indices, weight.col_indices)
    expected = reference.bsr_linear(x.double(), *pattern, values, bias.double(), "none", None, weight.scales)
    unit = expected.abs().max()
    torch.testing.assert_close(y.double() / unit, expected / unit, **TOLERANCES["bsr_linear", x.dtype])

"""Choosing, by timing, whether a layer of several matrices (LSTM, GRU, Conv1d) is sparse, and in which blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .choose import RESULT_TOLERANCE, by_pattern, sparse_layer
from .choose_encoders import LEAST_COSINE, SEQUENCE, first_tensor
from .formats.block import INT8_UNIT
from .layers import SparseConv1d, SparseLinear
from .layers.composite import Twin, is_composite, split, with_hooks
from .measure import interleave, ratio
from .plan import DENSE, BlockShape, CompositePlanRow, Times, geometric_mean, option_name
from .report import effective_weight

if TYPE_CHECKING:
    from .convert import FilterFn, SparsifyConfig

LEAST_ROUNDED_COSINE = 0.99
"""Of layers that compute in 16 bits: both they and the dense ones round in every step."""


@dataclass(frozen=True)
class Composite:
    """A layer of a model, its twin with nn.Linear matrices (itself if it is one), and what these multiply by now."""

    name: str
    module: nn.Module
    twin: Twin
    weights: dict[str, Tensor]

    @property
    def row(self) -> CompositePlanRow:
        """That keeps it dense."""
        first = next(iter(self.weights.values()))
        count = sum(weight.numel() for weight in self.weights.values())
        kept = sum(int(weight.count_nonzero()) for weight in self.weights.values())
        return CompositePlanRow(self.name, self.twin.dense.__name__, count, first.dtype, 1 - kept / count)

    def sparse(self, block: BlockShape) -> Twin:
        """In blocks; biases, requires_grad, training mode and hooks carry over."""
        linears: dict[str, nn.Module] = dict(self.twin.named_children())
        matrices = {name: sparse_layer(linears[name], self.weights[name], block) for name in self.weights}  # type: ignore[arg-type]
        return with_hooks(self.twin.with_matrices(matrices), self.module)


def find_composites(model: nn.Module, filter_fn: FilterFn | None) -> list[Composite]:
    """Layers of `model` that are dense or masked, and of which filter_fn accepts a matrix."""
    found = []
    for name, module in model.named_modules():
        twin = split(module) if is_composite(module) else module
        if not isinstance(twin, Twin) or module is model:
            continue
        matrices = twin.matrices
        if any(isinstance(matrix, SparseLinear) for matrix in matrices.values()):
            continue
        if filter_fn is None or any(filter_fn(matrix, f"{name}.{own}") for own, matrix in matrices.items()):
            weights = {own: effective_weight(matrix) for own, matrix in matrices.items()}
            found.append(Composite(name, module, twin, weights))
    return found


@torch.no_grad()
def choose_composite(
    composite: Composite, densities: Mapping[BlockShape, float], obstacle: str | None, config: SparsifyConfig
) -> tuple[CompositePlanRow, Twin | None]:
    """(row, the layer to put in or None to keep the dense one).

    Timed are torch's layer and the sparse ones on random sequences of config.token_counts, of at most SEQUENCE tokens
    each. The one that is taken must be min_speedup faster, int8 weights min_speedup faster than others, and faster at
    each token count in 80 % of the rounds.

    densities  {block: stored density} of the block shapes in question
    obstacle   why it must stay dense

    Raises RuntimeError if a sparse layer's result differs from the dense one's.
    """
    row = composite.row
    if obstacle is None:
        obstacle = _obstacle(row, composite, config)
    if obstacle is not None or not densities:
        return replace(row, reason=obstacle or f"no block shape leaves out {config.min_sparsity:.0%}"), None
    if config.measure == "off":
        block = by_pattern(densities)
        row = replace(row, block=block, stored_density=densities[block], reason="by pattern, not measured")
        return row, composite.sparse(block)
    options: dict[str, tuple[BlockShape, str | None, Twin]] = {}
    for block in densities:
        layer = composite.sparse(block)
        options[option_name(block, None)] = block, None, layer
        if "int8" in config.precisions and _takes_int8(composite.twin):
            options[option_name(block, "int8")] = block, "int8", with_hooks(layer.quantize(), layer)
    layers = {name: layer for name, (_, _, layer) in options.items()}
    times, cosines = _time(composite, layers, config)
    exact = [name for name, (_, precision, _) in options.items() if precision is None]
    least = LEAST_COSINE if row.dtype in (torch.float32, torch.float64) else LEAST_ROUNDED_COSINE
    if wrong := next((name for name in exact if not cosines[name] >= least), None):
        raise RuntimeError(
            f"sparsify_: expected {row.name} as {wrong} to match dense, got a cosine of {cosines[wrong]:.5f}"
        )
    row = replace(row, times=times, cosines=cosines)
    best = DENSE
    for among in (exact, [name for name in options if name not in exact]):
        if among:
            fastest = min(among, key=lambda name: geometric_mean(times[name]))
            if _faster(times[best], times[fastest], config.min_speedup):
                best = fastest
    if best == DENSE:
        fastest = min(options, key=lambda name: geometric_mean(times[name]))
        speedup = geometric_mean(times[DENSE]) / geometric_mean(times[fastest])
        noise = ", but not beyond the noise" if speedup >= config.min_speedup else ""
        return replace(row, reason=f"best sparse ({fastest}) only {speedup:.2f}x{noise}", speedup=speedup), None
    block, precision, layer = options[best]
    speedup = geometric_mean(times[DENSE]) / geometric_mean(times[best])
    chosen = {"block": block, "precision": precision, "stored_density": densities[block]}
    return replace(row, **chosen, reason=f"{speedup:.2f}x faster", speedup=speedup), layer  # type: ignore[arg-type]


def _takes_int8(twin: Twin) -> bool:
    """Kernels read int8 inputs, of a convolution the channels of a tap, INT8_UNIT at a time."""
    sizes = [twin.in_channels] if isinstance(twin, SparseConv1d) else [m.in_features for m in twin.matrices.values()]
    return all(size % INT8_UNIT == 0 for size in sizes)


def _obstacle(row: CompositePlanRow, composite: Composite, config: SparsifyConfig) -> str | None:
    device = next(iter(composite.weights.values())).device.type
    if device != "cpu":
        return f"no sparse kernel on {device}"
    if row.dtype not in RESULT_TOLERANCE:
        return f"no sparse kernel for {row.dtype}"
    return f"fewer than {config.min_sparsity:.0%} zeros" if row.sparsity < config.min_sparsity else None


def _faster(before: Times, after: Times, factor: float) -> bool:
    certain = min(ratio(before[tokens], after[tokens]).p20 for tokens in before)
    return geometric_mean(before) >= factor * geometric_mean(after) and certain > 1


def _time(
    composite: Composite, layers: Mapping[str, Twin], config: SparsifyConfig
) -> tuple[dict[str, Times], dict[str, float]]:
    """({option: times}, {sparse option: least cosine similarity of an output to the dense layer's})."""
    linears: dict[str, nn.Linear] = {}
    for name, weight in composite.weights.items():
        linears[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linears[name].weight = nn.Parameter(weight, requires_grad=False)
        linears[name].bias = composite.twin.matrices[name].bias  # type: ignore[assignment]
    runs: dict[str, nn.Module] = {DENSE: composite.twin.with_matrices(linears).to_dense().eval()}
    runs |= {name: layer.with_matrices(layer.matrices).eval() for name, layer in layers.items()}
    times: dict[str, Times] = {name: {} for name in runs}
    cosines = dict.fromkeys(layers, 1.0)
    generator = torch.Generator().manual_seed(0)
    for tokens in config.token_counts:
        steps = min(tokens, SEQUENCE)
        x = composite.twin.sample(tokens // steps, steps, generator)
        calls: dict[str, Callable[[], object]] = {name: partial(module, x) for name, module in runs.items()}
        expected = first_tensor(calls[DENSE]()).double()
        for name in layers:
            got = first_tensor(calls[name]()).double()
            cosines[name] = min(cosines[name], float(torch.cosine_similarity(got, expected, dim=-1).min()))
        for name, timing in interleave(calls, config.seconds, warm=True).items():
            times[name][tokens] = timing
    return times, cosines

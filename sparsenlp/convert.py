"""sparsify_: put block-sparse layers where they are faster, and say for every layer what was chosen and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .formats import BlockSparse
from .formats.block import split_blocks
from .layers import SparseLinear
from .measure import interleave, machine, ratio, use_threads
from .models import after_conversion
from .plan import BlockShape, Plan, PlanRow, Times, block_name, geometric_mean
from .report import effective_weight

DEFAULT_BLOCKS = ((16, 1), (8, 1), (4, 1), (16, 16), (32, 32), (8, 8), (4, 4))
SAME_DENSITY = 1.1  # layers whose stored densities differ by less than this factor share a measurement
WORTH_MEASURING = 2.5  # a block shape that stores this many times more values than another cannot win
AS_SPARSE = 1.25  # without measuring, a block shape is as good as one that stores up to this factor fewer values
RESULT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class SparsifyConfig:
    """How `sparsify_` chooses.

    token_counts  rows of the input (batch * sequence) to be fast for; all count the same
    min_sparsity  a layer with fewer zeros stays dense unmeasured; a block shape must also leave out
                  this fraction to be a candidate
    min_speedup   a sparse layer must be this much faster than the dense one (geometric mean over token_counts),
                  and faster at all in 80 % of the rounds
    blocks        (n, k) block shapes to try, the preferred first (the order decides only without measuring)
    measure       False: choose by pattern alone, which may make a layer slower
    seconds       time spent on one measurement, for each token count
    threads       torch threads while measuring, None for the present number
    """

    token_counts: tuple[int, ...] = (128,)
    min_sparsity: float = 0.3
    min_speedup: float = 1.05
    blocks: tuple[BlockShape, ...] = DEFAULT_BLOCKS
    measure: bool = True
    seconds: float = 0.25
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.token_counts or min(self.token_counts) < 1:
            raise ValueError(f"SparsifyConfig: expected token_counts of at least 1, got {self.token_counts}")
        if not 0 <= self.min_sparsity < 1:
            raise ValueError(f"SparsifyConfig: expected min_sparsity in [0, 1), got {self.min_sparsity}")
        if not self.blocks or min(min(block) for block in self.blocks) < 1:
            raise ValueError(f"SparsifyConfig: expected blocks with sides of at least 1, got {self.blocks}")
        if self.min_speedup <= 0 or self.seconds < 0:
            raise ValueError(
                f"SparsifyConfig: expected min_speedup > 0 and seconds >= 0, got {self.min_speedup} and {self.seconds}"
            )


def sparsify_(model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None) -> Plan:
    """Replace nn.Linear layers that hold zeros by SparseLinear where that is faster, on this instance only.

    The zeros may come from any pruner; masks (sparsenlp.prune, torch.nn.utils.prune) are read as they
    are now and burned in. Each layer is measured on the CPU, in its own dtype and with warm weights,
    against every block shape that fits its zeros; layers of the same shape and (within 10 %) the same
    densities share a measurement. Biases are shared with the old layers, and a Linear used in several
    places stays shared.

    filter_fn   (module, qualified name) -> whether to consider a Linear; None considers all
    returns     the Plan: one row per Linear considered, `str(plan)` is a table

    Everything is measured and built before the first layer is replaced: on any error the model is as it was.
    Raises ValueError if the model is a Linear itself, has none, filter_fn accepts none, or none has
    `min_sparsity` zeros; RuntimeError if a sparse layer's result differs from the dense one's.
    """
    config = config or SparsifyConfig()
    layers = _considered(model, filter_fn)
    weights = {name: effective_weight(layer) for name, layer in layers.items()}
    sparsity = {name: 1.0 - int(w.count_nonzero()) / max(w.numel(), 1) for name, w in weights.items()}
    best = max(sparsity, key=lambda name: sparsity[name])
    if sparsity[best] < config.min_sparsity:
        raise ValueError(
            f"sparsify_: expected a layer with at least {config.min_sparsity:.0%} zeros, "
            f"got at most {sparsity[best]:.1%} ({best}); prune first"
        )
    obstacles = _obstacles(model)
    measurements: list[_Measurement] = []
    rows: list[PlanRow] = []
    replacements: dict[nn.Module, nn.Module] = {}
    with use_threads(config.threads) as threads, torch.no_grad():
        for name, layer in layers.items():
            row = _plan_layer(
                name, layer, weights[name], sparsity[name], obstacles.get(id(layer)), config, measurements
            )
            rows.append(row)
            if row.block is not None:
                replacements[layer] = _sparse_layer(layer, weights[name], row.block)
        plan = Plan(tuple(rows), machine(), threads, config.token_counts, config.measure, len(measurements))
    if replacements:
        replace_modules(model, replacements)
        after_conversion(model)
    return plan


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one hangs below `model`."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])


def _considered(model: nn.Module, filter_fn: FilterFn | None) -> dict[str, nn.Linear]:
    if _is_plain_linear(model):
        raise ValueError("sparsify_: expected a model that contains nn.Linear layers, got a single nn.Linear; wrap it")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and _is_plain_linear(m)}
    if not linears:
        raise ValueError(f"sparsify_: expected a model with nn.Linear layers, got none in {type(model).__name__}")
    chosen = {n: m for n, m in linears.items() if filter_fn is None or filter_fn(m, n)}
    if not chosen:
        raise ValueError(f"sparsify_: expected filter_fn to accept a layer, got none of {len(linears)}")
    return chosen


def _is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear itself, parametrized or not: a subclass may compute something else or be read by its owner."""
    cls = type(module)
    return cls is nn.Linear or (parametrize.is_parametrized(module) and cls.__bases__ == (nn.Linear,))


def _obstacles(model: nn.Module) -> dict[int, str]:
    """{id(linear): why it must stay an nn.Linear}."""
    reasons = {}
    owners: Counter[int] = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):  # its fast path reads the weights itself
            for child in (module.linear1, module.linear2):
                reasons[id(child)] = "weight is read by nn.TransformerEncoderLayer"
        if not _is_plain_linear(module):
            continue
        shared = [n for n, p in module.named_parameters() if owners[id(p)] > 1 and not n.endswith("bias")]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if shared:
            reasons[id(module)] = "weight is shared with another module"
        elif any(not isinstance(hook, BasePruningMethod) for hook in hooks):
            reasons[id(module)] = "has forward hooks, which would be lost"
    return reasons


@dataclass(frozen=True)
class _Measurement:
    """Times of one layer, and what another layer must have in common with it to use them."""

    kind: tuple
    densities: dict[BlockShape, float]
    dense: Times
    sparse: dict[BlockShape, Times]

    def serves(self, kind: tuple, densities: dict[BlockShape, float]) -> bool:
        return (
            self.kind == kind
            and self.densities.keys() == densities.keys()
            and all(max(d, densities[b]) <= SAME_DENSITY * min(d, densities[b]) for b, d in self.densities.items())
        )


def _plan_layer(
    name: str,
    layer: nn.Linear,
    weight: Tensor,
    sparsity: float,
    obstacle: str | None,
    config: SparsifyConfig,
    measurements: list[_Measurement],
) -> PlanRow:
    """Choose for one layer; a new measurement is appended to `measurements`."""
    row = PlanRow(name, (weight.shape[0], weight.shape[1]), weight.dtype, sparsity)
    if weight.device.type != "cpu":
        obstacle = f"no sparse kernel on {weight.device.type}"
    elif weight.dtype not in RESULT_TOLERANCE:
        obstacle = f"no sparse kernel for {weight.dtype}"
    if obstacle is not None:
        return row.keep_dense(obstacle)
    if sparsity < config.min_sparsity:
        return row.keep_dense(f"fewer than {config.min_sparsity:.0%} zeros")
    densities = candidate_densities(weight, config)
    if not densities:
        return row.keep_dense(f"no block shape leaves out {config.min_sparsity:.0%}")
    if not config.measure:
        block = _by_pattern(densities)
        return row.choose(block, densities[block], "by pattern, not measured")
    kind = (weight.shape, weight.dtype, weight.device, layer.bias is not None)
    found = next((m for m in measurements if m.serves(kind, densities)), None)
    if found is None:
        found = _Measurement(kind, densities, *_measure(name, layer, weight, list(densities), config))
        measurements.append(found)
    row = row.with_times(found.dense, found.sparse)
    seconds = {block: geometric_mean(times) for block, times in found.sparse.items()}
    block = min(seconds, key=lambda b: seconds[b])
    speedup = geometric_mean(found.dense) / seconds[block]
    if speedup < config.min_speedup:
        return row.keep_dense(f"best sparse ({block_name(block)}) only {speedup:.2f}x", speedup)
    if _certain_speedup(found.dense, found.sparse[block]) <= 1:
        return row.keep_dense(f"best sparse ({block_name(block)}) {speedup:.2f}x, but not beyond the noise", speedup)
    return row.choose(block, densities[block], f"{speedup:.2f}x faster", speedup)


def _certain_speedup(dense: Times, sparse: Times) -> float:
    """What 80 % of the rounds reach at least: geometric mean over the token counts of the paired ratio's p20."""
    return exp(sum(log(ratio(dense[tokens], sparse[tokens]).p20) for tokens in dense) / len(dense))


def candidate_densities(weight: Tensor, config: SparsifyConfig) -> dict[BlockShape, float]:
    """{block: stored density} of the block shapes worth trying on a weight (N, K), in the order of config.blocks.

    A shape is dropped if it does not divide the weight, leaves out fewer than `min_sparsity` of it, stores
    2.5 times as much as the sparsest one, or if one of the same width k with more rows stores (within 2 %) no more.
    """
    densities = {}
    for n, k in config.blocks:
        if weight.shape[0] % n == 0 and weight.shape[1] % k == 0:
            density = float(_stored_blocks(weight, (n, k)).float().mean())
            if density <= 1.0 - config.min_sparsity:
                densities[n, k] = density
    limit = WORTH_MEASURING * min(densities.values(), default=0.0)
    return {
        (n, k): density
        for (n, k), density in densities.items()
        if density <= limit
        and not any(k2 == k and n2 > n and other <= 1.02 * density for (n2, k2), other in densities.items())
    }


def _stored_blocks(weight: Tensor, block: BlockShape) -> Tensor:
    """(N / n, K / k) bool: the blocks that hold a nonzero."""
    return split_blocks(weight != 0, block).any(dim=3).any(dim=2)


def _by_pattern(densities: dict[BlockShape, float]) -> BlockShape:
    least = min(densities.values())
    return next(block for block, density in densities.items() if density <= AS_SPARSE * least)


def _sparse_layer(layer: nn.Linear, weight: Tensor, block: BlockShape) -> SparseLinear:
    """The layer in blocks: bias, training mode and requires_grad carry over."""
    sparse = SparseLinear.from_weight(BlockSparse.from_dense(weight, block), layer.bias)
    sparse.values.requires_grad_(any(p.requires_grad for p in layer.parameters() if p is not layer.bias))
    sparse.bias = layer.bias
    return sparse.train(layer.training)


def _measure(
    name: str, layer: nn.Linear, weight: Tensor, blocks: list[BlockShape], config: SparsifyConfig
) -> tuple[Times, dict[BlockShape, Times]]:
    """Dense times and sparse times, interleaved, after checking every sparse result."""
    candidates = {block: _sparse_layer(layer, weight, block) for block in blocks}
    dense: Times = {}
    sparse: dict[BlockShape, Times] = {block: {} for block in blocks}
    generator = torch.Generator().manual_seed(0)
    for tokens in config.token_counts:
        x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight)
        expected = F.linear(x, weight, layer.bias)
        for block, candidate in candidates.items():
            _check_result(name, block, candidate(x), expected)
        runs: dict[str, Callable[[], object]] = {"dense": partial(F.linear, x, weight, layer.bias)}
        runs |= {block_name(block): partial(candidate, x) for block, candidate in candidates.items()}
        timings = interleave(runs, config.seconds)
        dense[tokens] = timings["dense"]
        for block in blocks:
            sparse[block][tokens] = timings[block_name(block)]
    return dense, sparse


def _check_result(name: str, block: BlockShape, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max())
    bound = RESULT_TOLERANCE[expected.dtype] * max(float(expected.abs().max()), 1e-30)
    if not error <= bound:
        raise RuntimeError(
            f"sparsify_: expected {name} as {block_name(block)} to match dense within {bound:.2e}, got {error:.2e}"
        )

"""sparsify_: put block-sparse layers where they are faster, and say for every layer what was chosen and why.

Which layers and block shapes come into question, and the surgery, stand here; `choose` decides among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .choose import RESULT_TOLERANCE, Candidate, Chooser, sparse_layer
from .choose_composites import choose_composite, find_composites
from .choose_decoders import choose_decoder_
from .choose_encoders import choose_encoders_, first_tensor
from .cost import CostModel
from .formats.block import split_blocks
from .layers.adapters import adapter_modules
from .layers.composite import Twin, is_composite, join_composites_, replace_modules
from .layers.compressed_linear import CompressedLinear
from .layers.encoder import FUSED_PRECISIONS
from .layers.incoming import watch_incoming_
from .measure import machine, use_threads
from .models import after_conversion, after_densifying, before_densifying
from .obstacles import is_plain_linear, obstacles, skipped_weights
from .plan import MEASURES, BlockShape, CompositePlanRow, OutputChange, Plan, PlanRow
from .prune.layers import left_alone
from .report import effective_weight, is_masked, torch_pruned

DEFAULT_BLOCKS = ((16, 1), (8, 1), (4, 1), (8, 2), (16, 16), (32, 32), (8, 8), (4, 4), (1, 1))
WORTH_MEASURING = 2.5  # a block shape that stores this many times more values than another cannot win

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
    measure       "model": a cost model of this machine predicts each block shape, calibrated in seconds at its first
                  use and then kept; what it prefers is confirmed by a short timing, and timed as by "time" where it
                  is a close call. "time": time every block shape. "off": choose by pattern alone, which may make a
                  layer slower
    seconds       time spent on one measurement, for each token count
    threads       torch threads while measuring, None for the present number
    cost_model    for "model": predict with this one; None for this machine's (see cost.calibrated)
    fuse          let encoders of known families (models.families) run as fused layers, where that is faster; with
                  measure "off" without timing
    precisions    of fused encoders that are allowed beside that of the weights: "bfloat16", "int8"; taken where they
                  are min_speedup faster. The model keeps its own weights. Recurrent layers and convolutions may take
                  int8 weights, for good
    inputs        keyword arguments of the model: its output on them is compared before and after
    evaluate      model -> a number, of which the plan tells the value before and after
    """

    token_counts: tuple[int, ...] = (128,)
    min_sparsity: float = 0.3
    min_speedup: float = 1.05
    blocks: tuple[BlockShape, ...] = DEFAULT_BLOCKS
    measure: str = "model"
    seconds: float = 0.25
    threads: int | None = None
    cost_model: CostModel | None = None
    fuse: bool = True
    precisions: tuple[str, ...] = ()
    inputs: Mapping[str, Any] | None = None
    evaluate: Callable[[nn.Module], float] | None = None

    def __post_init__(self) -> None:
        if not self.token_counts or min(self.token_counts) < 1:
            raise ValueError(f"SparsifyConfig: expected token_counts of at least 1, got {self.token_counts}")
        if not 0 <= self.min_sparsity < 1:
            raise ValueError(f"SparsifyConfig: expected min_sparsity in [0, 1), got {self.min_sparsity}")
        if not self.blocks or min(min(block) for block in self.blocks) < 1:
            raise ValueError(f"SparsifyConfig: expected blocks with sides of at least 1, got {self.blocks}")
        if self.measure not in MEASURES:
            raise ValueError(f"SparsifyConfig: expected measure as one of {', '.join(MEASURES)}, got {self.measure!r}")
        if not set(self.precisions) <= set(FUSED_PRECISIONS):
            raise ValueError(
                f"SparsifyConfig: expected precisions among {', '.join(FUSED_PRECISIONS)}, got {self.precisions}"
            )
        if self.min_speedup <= 0 or self.seconds < 0:
            raise ValueError(
                f"SparsifyConfig: expected min_speedup > 0 and seconds >= 0, got {self.min_speedup} and {self.seconds}"
            )


def sparsify_(model: nn.Module, config: SparsifyConfig | None = None, filter_fn: FilterFn | None = None) -> Plan:
    """Replace nn.Linear, nn.LSTM, nn.GRU and nn.Conv1d that hold zeros by sparse layers where faster, in place.

    The zeros may come from any pruner; masks (sparsenlp.prune, torch.nn.utils.prune) are read as they
    are now and burned in. Adapters (see layers.adapters) stay as they are, and so does a layer that is all
    zero but trainable: those zeros are not pruned ones. Each layer is compared on the CPU, in its own dtype and with
    warm weights, with every block shape that fits its zeros, as `config.measure` says; layers of the same shape and
    alike densities share a measurement. Unless it is "off", no layer becomes sparse before layers like
    it have been timed and were faster. Biases are shared with the old layers, and a Linear used in
    several places stays shared. A recurrent layer or a convolution is timed and chosen as a whole, in one
    block shape for all its matrices. Then encoders of known families become fused layers where that is faster still
    (see models.fuse_encoders_, which can be undone), with fused embeddings, and the layers of known decoders one op
    (see models.decoders.fuse_decoder_).

    filter_fn   (module, qualified name) -> whether to consider a Linear; None considers all. A composite one is
                considered where one of its matrices ("lstm.hh_l0") is
    returns     the Plan: one row per layer considered, `str(plan)` is a table

    Everything is measured and built before the first layer is replaced: on any error the model is as it was.
    Raises ValueError if the model is such a layer itself, has none, filter_fn accepts none, or none has
    `min_sparsity` zeros; RuntimeError if a sparse layer's result differs from the dense one's.
    """
    config = config or SparsifyConfig()
    composites = find_composites(model, filter_fn)
    layers = _considered(model, filter_fn, bool(composites))
    weights = {name: effective_weight(layer) for name, layer in layers.items()}
    sparsity = {name: 1.0 - int(w.count_nonzero()) / max(w.numel(), 1) for name, w in weights.items()}
    sparsity |= {composite.name: composite.row.sparsity for composite in composites}
    unsplit = _unsplit(model, {composite.name for composite in composites}) if filter_fn is None else ()
    unlearned = _unlearned(model)
    pruned = {name: sparsity[name] for name, layer in layers.items() if id(layer) not in unlearned}
    pruned |= {c.name: sparsity[c.name] for c in composites if not any(id(m) in unlearned for m in c.module.modules())}
    best = max(pruned, key=lambda name: pruned[name], default=None)
    if best is None or pruned[best] < config.min_sparsity:
        got = "none" if best is None else f"at most {pruned[best]:.1%} ({best})"
        why = "".join(f"; {row.name}: {row.reason}" for row in unsplit[:1])
        why += "".join(f"; {row}" for row in skipped_weights(model))
        raise ValueError(
            f"sparsify_: expected a layer with at least {config.min_sparsity:.0%} zeros, got {got}; prune first{why}"
        )
    in_the_way = obstacles(model) | unlearned
    before = _observe(model, config)
    rows: list[PlanRow] = []
    replacements: dict[nn.Module, nn.Module] = {}
    with use_threads(config.threads) as threads, torch.no_grad():
        drafts = {
            name: _draft(name, layer, weights[name], sparsity[name], in_the_way.get(id(layer)), config)
            for name, layer in layers.items()
        }
        chooser = Chooser(config, threads, [(row.dtype, blocks) for row, blocks in drafts.values() if blocks])
        for name, layer in layers.items():
            row, densities = drafts[name]
            if densities:
                row = chooser.choose(row, Candidate(name, layer, weights[name], densities))
            rows.append(row)
            if row.block is not None:
                replacements[layer] = sparse_layer(layer, weights[name], row.block)
        composite_rows = []
        for composite in composites:
            densities = candidate_densities([*composite.weights.values()], config)
            shared = next((in_the_way[id(m)] for m in composite.module.modules() if id(m) in in_the_way), None)
            chosen, twin = choose_composite(composite, densities, shared, config)
            composite_rows.append(chosen)
            if twin is not None:
                replacements[composite.module] = twin
        plan = Plan(
            tuple(rows),
            machine(),
            threads,
            config.token_counts,
            config.measure,
            len(chooser.measurements),
            chooser.model_errors,
            composites=(*composite_rows, *unsplit),
            skipped=skipped_weights(model),
        )
        replace_modules(model, replacements)
        try:
            encoders = choose_encoders_(model, config) + choose_decoder_(model, config) if config.fuse else ()
        except BaseException:
            replace_modules(model, {sparse: layer for layer, sparse in replacements.items()})
            raise
    if replacements or any(row.fused for row in encoders):
        watch_incoming_(model)
        after_conversion(model)
    return replace(plan, encoders=encoders, change=_change(before, _observe(model, config)))


@torch.no_grad()
def densify_(model: nn.Module) -> nn.Module:
    """Put torch's own layers in for sparse and fused ones, in place, the opposite of `sparsify_`; returns `model`.

    The zeros are weights again, in new Parameters; int8 weights come back as the float32 that they stand for. Needed
    before an adapter is merged into sparse layers, or attached to them.

    Raises ValueError, with the model untouched, if the model is such a layer itself or one applies an activation.
    """
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    for name, layer in sparse.items():
        if layer is model:
            raise ValueError(f"densify_: expected a model that contains layers, got a single {type(layer).__name__}")
        if layer.activation != "none":
            raise ValueError(f"densify_: expected {name} without an activation of its own, got {layer.activation}")
    before_densifying(model)
    dense: dict[nn.Module, nn.Module] = {}
    for layer in sparse.values():
        dense[layer] = linear = layer.to_dense()
        linear.weight.requires_grad_(layer.values.requires_grad)
        if layer.bias is not None:
            linear.bias = layer.bias
    replace_modules(model, dense)
    join_composites_(model)
    after_densifying(model)
    return model


def _observe(model: nn.Module, config: SparsifyConfig) -> tuple[Tensor | None, float | None]:
    """(output on config.inputs, config.evaluate's number), None where there is none."""
    output = None
    if config.inputs is not None:
        with torch.no_grad():
            output = first_tensor(_plain(model(**config.inputs))).double()
    return output, None if config.evaluate is None else float(config.evaluate(model))


def _plain(output: Any) -> Any:
    """A ModelOutput as a tuple."""
    return tuple(output.values()) if isinstance(output, Mapping) else output


def _change(
    before: tuple[Tensor | None, float | None], after: tuple[Tensor | None, float | None]
) -> OutputChange | None:
    if before == (None, None):
        return None
    cosine = error = None
    if before[0] is not None and after[0] is not None:
        cosine = float(torch.cosine_similarity(before[0], after[0], dim=-1).min())
        error = float((after[0] - before[0]).abs().max() / before[0].abs().max().clamp_min(1e-30))
    return OutputChange(cosine, error, before[1], after[1])


def _considered(model: nn.Module, filter_fn: FilterFn | None, composites: bool) -> dict[str, nn.Linear]:
    """The layers of their own; there may be none if there are composites, whose matrices are not among them."""
    if is_plain_linear(model):
        raise ValueError("sparsify_: expected a model that contains nn.Linear layers, got a single nn.Linear; wrap it")
    inside = {child for module in model.modules() if isinstance(module, Twin) for child in module.children()}
    modules = {n: m for n, m in model.named_modules() if m not in inside}
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and is_plain_linear(m)}
    if not linears and not composites:
        raise ValueError(
            f"sparsify_: expected a model with nn.Linear layers, got none in {type(model).__name__}"
            + "".join(f"; {row}" for row in skipped_weights(model))
        )
    chosen = {n: m for n, m in linears.items() if filter_fn is None or filter_fn(m, n)}
    if not chosen and not composites:
        raise ValueError(f"sparsify_: expected filter_fn to accept a layer, got none of {len(linears)}")
    return chosen


def _unlearned(model: nn.Module) -> dict[int, str]:
    """{id(layer whose zeros nobody pruned): why it must stay as it is}."""
    adapters = adapter_modules(model)
    reasons = {id(module): "part of an adapter, which stays as it is" for module in adapters}
    for module in model.modules():
        weights = [p for name, p in module._parameters.items() if p is not None and name.startswith("weight")]
        linear = is_plain_linear(module) and not is_masked(module)
        trainable = any(weight.requires_grad for weight in weights)
        if (linear or is_composite(module)) and trainable and not any(weight.any() for weight in weights):
            reasons.setdefault(id(module), "all zero and yet to be trained; requires_grad_(False) if it was pruned")
    return reasons


def _unsplit(model: nn.Module, seen: set[str]) -> tuple[CompositePlanRow, ...]:
    """Rows for recurrent layers and convolutions that cannot be taken apart as they are, but for those `seen`."""
    rows = []
    for name, reason in left_alone(model).items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) or name in seen:
            continue
        masks = {f"{tensor}_orig": getattr(module, f"{tensor}_mask") for tensor in torch_pruned(module)}
        weights = [p * masks.get(n, 1) for n, p in module.named_parameters(recurse=False) if n.startswith("weight")]
        count = sum(weight.numel() for weight in weights)
        zeros = count - sum(int(weight.count_nonzero()) for weight in weights)
        if count:
            rows.append(
                CompositePlanRow(name, type(module).__name__, count, weights[0].dtype, zeros / count, reason=reason)
            )
    return tuple(rows)


def _draft(
    name: str, layer: nn.Linear, weight: Tensor, sparsity: float, obstacle: str | None, config: SparsifyConfig
) -> tuple[PlanRow, dict[BlockShape, float]]:
    """(row that keeps the layer dense, {block: stored density}): no block if there is nothing to choose."""
    row = PlanRow(name, (weight.shape[0], weight.shape[1]), weight.dtype, sparsity)
    if weight.device.type != "cpu":
        obstacle = f"no sparse kernel on {weight.device.type}"
    elif weight.dtype not in RESULT_TOLERANCE:
        obstacle = f"no sparse kernel for {weight.dtype}"
    if obstacle is not None:
        return row.keep_dense(obstacle), {}
    if sparsity < config.min_sparsity:
        return row.keep_dense(f"fewer than {config.min_sparsity:.0%} zeros"), {}
    densities = candidate_densities(weight, config)
    return row.keep_dense("" if densities else f"no block shape leaves out {config.min_sparsity:.0%}"), densities


def candidate_densities(weight: Tensor | Sequence[Tensor], config: SparsifyConfig) -> dict[BlockShape, float]:
    """{block: stored density} of the block shapes worth trying on a weight (N, K), in the order of config.blocks.

    For several weights, of those worth trying on all of them, and the density is that of all together.

    A shape is dropped if it does not divide the weight, leaves out fewer than `min_sparsity` of it, stores
    2.5 times as much as the sparsest one, or if one of the same width k with more rows stores (within 2 %) no more.
    """
    weights = [weight] if isinstance(weight, Tensor) else [*weight]
    total = sum(each.numel() for each in weights)
    densities = {}
    for n, k in config.blocks if total else ():
        if all(each.shape[0] % n == 0 and each.shape[1] % k == 0 for each in weights):
            density = sum(n * k * int(_stored_blocks(each, (n, k)).count_nonzero()) for each in weights) / total
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

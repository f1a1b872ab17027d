"""Remove whole heads, neurons and layers of a transformer, in place: what is left is an ordinary, smaller model.

Nothing is masked: the projections really shrink, and the configuration follows, so that `save_pretrained` writes a
directory that plain transformers loads. Where a configuration has no words for the new shape (layers of different
widths; heads in families whose configuration ties them to the hidden size, like BERT and GPT-2), saving goes through
this package's checkpoint, which `from_pretrained` of transformers loads as long as sparsenlp is imported.

What shrinks becomes a new Parameter: make the optimizer, and collect statistics for criteria, afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.structure import (
    COLUMNS,
    LayerParts,
    LayerStack,
    Slice,
    is_conv1d,
    keep_heads_,
    keep_layers_,
    keep_neurons_,
    layer_stack,
    update_config_,
    width,
)
from .checks import check_choice, check_numbers, check_own, remaining
from .criteria import CRITERIA
from .scores import score_layers

KINDS = ("heads", "neurons", "layers")
REDUCTIONS = ("l1", "l2", "mean")


@dataclass(frozen=True)
class Removal:
    """What `prune_structures_` took out.

    removed      layer -> its heads or neurons that went, or for kind "layers" every layer that went -> ()
    units        how many there were, in all layers
    parameters   of the model, before and after
    """

    kind: str
    removed: dict[int, tuple[int, ...]]
    units: int
    parameters: tuple[int, int]

    @property
    def count(self) -> int:
        """Units that went."""
        return len(self.removed) if self.kind == "layers" else sum(map(len, self.removed.values()))

    def __str__(self) -> str:
        before, after = self.parameters
        return f"removed {self.count} of {self.units} {self.kind}: {before:,} -> {after:,} parameters"


def remove_heads_(model: nn.Module, heads: Mapping[int, Sequence[int]]) -> nn.Module:
    """Remove attention heads: their rows of query, key and value and their columns of the output projection.

    heads     layer -> heads, numbered as they are now. With grouped queries (Llama) a head is one of keys and values,
              and the query heads that it serves go with it
    returns   `model`

    Exact where the head's columns of the output projection are zero. BERT-like and GPT-2 configurations cannot express
    the result, those of Llama, Mistral, Qwen2 and ViT can if all layers keep as many.

    Raises ValueError, with the model untouched, for an unknown layer, a head that is unknown or named twice, all heads
    of a layer, a family whose heads depend on each other (MPNet's position bias, nn.MultiheadAttention's width),
    weights that are shared between modules, masked or sparse already, and a fused model.
    """
    stack = find_stack("remove_heads_", model)
    if stack.obstacle:
        raise ValueError(f"remove_heads_: expected a family that can lose heads, got one where {stack.obstacle}")
    counts = [parts.heads for parts in stack.layers]
    kept = _kept("remove_heads_", "heads", heads, counts)
    check_dense("remove_heads_", model, [m for i in kept for m in (*stack.layers[i].inputs, stack.layers[i].output)])
    for i, stay in kept.items():
        keep_heads_(stack.layers[i], stay)
    update_config_(model)
    return model


def remove_neurons_(model: nn.Module, neurons: Mapping[int, Sequence[int]]) -> nn.Module:
    """Remove neurons of feed-forward networks: rows of fc1 (of gate and up) and columns of fc2 (down).

    neurons   layer -> neurons, numbered as they are now
    returns   `model`

    Exact where the neuron's column of fc2 is zero. A configuration can express the result if all layers keep as many.

    Raises ValueError, with the model untouched, for an unknown layer, a neuron that is unknown or named twice, all
    neurons of a layer, weights that are shared between modules, masked or sparse already, and a fused model.
    """
    stack = find_stack("remove_neurons_", model)
    kept = _kept("remove_neurons_", "neurons", neurons, [parts.neurons for parts in stack.layers])
    check_dense("remove_neurons_", model, [m for i in kept for m in _ffn(stack.layers[i])])
    for i, stay in kept.items():
        keep_neurons_(stack.layers[i], stay)
    update_config_(model)
    return model


def remove_layers_(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Remove whole layers; those that are left follow each other, with new numbers.

    layers    numbered as they are now
    returns   `model`

    Raises ValueError, with the model untouched, for a layer that is unknown or named twice, all layers, a fused model,
    and one that scales attention by the number of the layer.
    """
    stack = find_stack("remove_layers_", model)
    if getattr(stack.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "remove_layers_: expected attention that does not depend on the layer's number, got one scaled"
        )
    kept = remaining("remove_layers_", "layers", layers, len(stack.layers)).tolist()
    keep_layers_(stack, kept)
    update_config_(model, kept)
    return model


@torch.no_grad()
def structure_scores(
    model: nn.Module, kind: str, scores: Mapping[str, Tensor], reduction: str = "l1"
) -> dict[int, Tensor]:
    """One score per head, neuron or layer from one per weight.

    kind        "heads", "neurons" or "layers"
    scores      module name -> (N, K) >= 0, as a criterion gives them, for the projections concerned: those of
                attention, of the feed-forward network, or all (N outputs, K inputs, whatever the layout in memory)
    reduction   over the weights of a structure, in all its projections: "l1" sum, "l2" root of the sum of squares,
                "mean"
    returns     layer -> (heads,) or (neurons,) float32; (1,) for kind "layers"

    Raises ValueError for an unknown kind or reduction, missing scores, or scores of another shape.
    """
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    stack = _prefixed("structure_scores", layer_stack, model)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for number, parts in enumerate(stack.layers):
        slices = _slices(stack, parts, kind)
        for module, _, _ in slices:
            shape = (width(module, 0), width(module, 1))
            got = scores.get(names[module])
            if got is None or tuple(got.shape) != shape:
                got_text = "none" if got is None else str(tuple(got.shape))
                raise ValueError(f"structure_scores: expected scores {shape} of {names[module]}, got {got_text}")
        found[number] = reduce_scores([(scores[names[m]], dim, lines) for m, dim, lines in slices], reduction)
    return found


def prune_structures_(
    model: nn.Module,
    kind: str,
    fraction: float,
    scope: str = "local",
    criterion: str = "magnitude",
    statistics: Any = None,
    reduction: str = "l1",
) -> Removal:
    """Remove the least important heads, neurons or layers, in place.

    kind        "heads", "neurons" or "layers"
    fraction    of them to remove, in [0, 1), rounded to whole ones; every layer keeps at least one
    scope       "local": as many of each layer, which a configuration can express; "global": one ranking for all
                (layers are always ranked together)
    criterion   one of CRITERIA, on single weights; `reduction` makes one score per structure (see structure_scores)
    statistics  what the criterion needs, of all projections concerned
    returns     what went

    Equal scores go in index order. Raises ValueError, with the model untouched, for a fraction out of range, an
    unknown kind, scope, criterion or reduction, missing statistics, and as the functions that remove do.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a fraction to remove in [0, 1), got {fraction}")
    for name, value, known in (
        ("kind", kind, KINDS),
        ("scope", scope, ("local", "global")),
        ("criterion", criterion, CRITERIA),
    ):
        check_choice(name, value, known)
    stack = find_stack("prune_structures_", model)
    names = {module: name for name, module in model.named_modules()}
    modules = {names[m]: m for parts in stack.layers for m, _, _ in _slices(stack, parts, kind)}
    check_dense("prune_structures_", model, modules.values())
    elementwise = score_layers(modules, criterion, statistics)
    oriented = {name: s.t() if is_conv1d(modules[name]) else s for name, s in elementwise.items()}
    units = structure_scores(model, kind, oriented, reduction)
    before = sum(p.numel() for p in model.parameters())
    removed: dict[int, tuple[int, ...]]
    if kind == "layers":
        lowest = _lowest(torch.cat([*units.values()]), fraction)
        remove_layers_(model, lowest)
        removed = dict.fromkeys(lowest, ())
    else:
        removed = _choose(units, fraction, scope)
        (remove_heads_ if kind == "heads" else remove_neurons_)(model, removed)
    after = sum(p.numel() for p in model.parameters())
    return Removal(kind, removed, sum(scores.numel() for scores in units.values()), (before, after))


def _choose(units: Mapping[int, Tensor], fraction: float, scope: str) -> dict[int, tuple[int, ...]]:
    """Layer -> the units that score lowest, without layers that lose nothing."""
    if scope == "local":
        chosen = {layer: tuple(_lowest(scores, fraction)) for layer, scores in units.items()}
        return {layer: lowest for layer, lowest in chosen.items() if lowest}
    protected = [scores.clone() for scores in units.values()]
    for scores in protected:
        scores[scores.argmax()] = torch.inf
    flat = torch.cat(protected)
    count = min(round(fraction * flat.numel()), flat.numel() - len(protected))
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = True
    parts = mask.split([scores.numel() for scores in protected])
    chosen = {layer: tuple(part.nonzero().flatten().tolist()) for layer, part in zip(units, parts, strict=True)}
    return {layer: lowest for layer, lowest in chosen.items() if lowest}


def _lowest(scores: Tensor, fraction: float) -> list[int]:
    count = min(round(fraction * scores.numel()), scores.numel() - 1)
    return sorted(scores.argsort(stable=True)[:count].tolist())


def reduce_scores(parts: Iterable[tuple[Tensor, int, Tensor]], reduction: str) -> Tensor:
    """One score per unit, (units,) float32, from the scores of weights.

    parts       (scores of any shape, dim, lines (units, n) along that dim) of each tensor
    reduction   one of REDUCTIONS
    """
    sums: list[Tensor] = []
    weights = 0
    for scores, dim, lines in parts:
        values = scores.float().square() if reduction == "l2" else scores.float()
        by_line = values.movedim(dim, 0).flatten(1)
        sums.append(by_line.sum(dim=1)[lines.to(values.device)].sum(dim=1))
        weights += lines.shape[1] * by_line.shape[1]
    total = torch.stack(sums).sum(dim=0)
    return {"l1": total, "l2": total.sqrt(), "mean": total / weights}[reduction]


def _slices(stack: LayerStack, parts: LayerParts, kind: str) -> list[Slice]:
    """The weights of each unit; a layer is one unit."""
    if kind == "heads":
        if stack.obstacle:
            raise ValueError(f"heads: expected a family that can lose heads, got one where {stack.obstacle}")
        return parts.head_slices(torch.arange(parts.heads))
    if kind == "neurons":
        return parts.neuron_slices(torch.arange(parts.neurons))
    modules = (*parts.inputs, parts.output, *_ffn(parts))
    return [Slice(m, COLUMNS, torch.arange(width(m, COLUMNS))[None]) for m in modules]


def _ffn(parts: LayerParts) -> tuple[Any, ...]:
    return *parts.ffn_inputs, parts.ffn_output


def find_stack(what: str, model: nn.Module) -> LayerStack:
    """The model's stack of layers. Raises ValueError as `layer_stack`, and if the layers are fused."""
    stack = _prefixed(what, layer_stack, model)
    if stack.fused:
        raise ValueError(f"{what}: expected a model that is not fused; call unfuse_encoders_ or unfuse_decoder_ first")
    return stack


def _prefixed(what: str, function: Any, *arguments: Any) -> Any:
    """function(*arguments), its ValueError saying `what` it was for."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _kept(what: str, kind: str, removed: Mapping[int, Sequence[int]], counts: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> the units that stay, for the layers that lose some."""
    check_numbers(what, "layers", [*removed], len(counts))
    return {
        layer: remaining(what, f"{kind} of layer {layer}", units, counts[layer])
        for layer, units in removed.items()
        if len(units)
    }


def check_dense(what: str, model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raise ValueError unless each is a dense linear layer with weights of its own."""
    modules = [*modules]
    check_own(what, model, modules)
    names = {module: name for name, module in model.named_modules()}
    for module in modules:
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            raise ValueError(f"{what}: expected {names[module]} to be a dense nn.Linear, got {type(module).__name__}")

"""What pruning took out of a model, where, and how far it moved what the model computes: data only, no drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .formats.block import split_blocks
from .models import is_transformers_model
from .models.structure import ROWS, Slice, is_conv1d, layer_stack
from .modes import evaluating
from .report import LayerReport, ModelReport, cosine, effective_weight, linear_layers, report

BLOCK = (8, 1)


@dataclass(frozen=True)
class LayerChange:
    """One linear layer, pruned against dense.

    layer             of the pruned model
    dense_shape       (N, K) of the dense one; larger where rows or columns were removed for good
    dense_zeros       zeros that the dense weight has
    empty_rows        outputs whose weights are all zero, by number
    empty_columns     inputs whose weights are all zero, by number
    kept_blocks       blocks that are not all zero, in each row of blocks; () where blocks do not divide the shape
    blocks_in_a_row   how many there are in each
    cosine            between the weights; None where the shapes differ
    """

    layer: LayerReport
    dense_shape: tuple[int, int]
    dense_zeros: int
    empty_rows: tuple[int, ...]
    empty_columns: tuple[int, ...]
    kept_blocks: tuple[int, ...]
    blocks_in_a_row: int
    cosine: float | None

    @property
    def zeros(self) -> int:
        return self.layer.shape[0] * self.layer.shape[1] - self.layer.nonzeros

    @property
    def removed(self) -> int:
        """Weights of the dense layer that are zero now, or gone with their row or column, and were not zero."""
        return self.dense_shape[0] * self.dense_shape[1] - self.dense_zeros - self.layer.nonzeros

    @property
    def empty_blocks(self) -> int:
        return self.blocks_in_a_row * len(self.kept_blocks) - sum(self.kept_blocks)

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        own = {name: value for name, value in vars(self).items() if name != "layer"}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        counts = {"zeros": self.zeros, "removed": self.removed, "empty_blocks": self.empty_blocks}
        return {**self.layer.as_dict(), **lists, **counts}


@dataclass(frozen=True)
class StructureChange:
    """One transformer layer, pruned against dense.

    heads     of keys and values: (left, of how many)
    neurons   of the feed-forward network: (left, of how many)
    idle_heads, idle_neurons   that are left, by number, but add at most a constant: nothing reads them, or nothing
              but a bias feeds them (the values, for a head)
    """

    name: str
    heads: tuple[int, int]
    neurons: tuple[int, int]
    idle_heads: tuple[int, ...]
    idle_neurons: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class OutputSimilarity:
    """Cosines between what two models compute on the same inputs, padding left out.

    hidden   of each layer's states as one vector, the embeddings first; () where the models have different numbers
             of them, or do not give them
    output   of the logits, or of the last hidden states of a model without
    largest  difference of the outputs, over the dense model's largest
    """

    hidden: tuple[float, ...]
    output: float
    largest: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": list(self.hidden)}


@dataclass(frozen=True)
class Comparison:
    """A pruned model against the dense one that it was made from. `str` is a table, `as_dict` the same as JSON data.

    dense, pruned   reports of both
    layers          the linear layers of the pruned model
    missing         names of linear layers that the pruned model has no more
    structures      transformer layers, () for a model of no known family
    block           (n, k) that `LayerChange.kept_blocks` counts
    tokens          that FLOPs are given for
    outputs         None without inputs
    seconds         (dense, pruned) that a forward pass takes, as the caller measured
    metrics         name -> (dense, pruned), as the caller measured
    """

    dense: ModelReport
    pruned: ModelReport
    layers: tuple[LayerChange, ...]
    missing: tuple[str, ...]
    structures: tuple[StructureChange, ...]
    block: tuple[int, int]
    tokens: int
    outputs: OutputSimilarity | None = None
    seconds: tuple[float, float] | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def removed(self) -> float:
        """Share of the dense model's nonzero linear weights that is zero or gone."""
        before = sum(layer.nonzeros for layer in self.dense.layers)
        return 1.0 - sum(layer.nonzeros for layer in self.pruned.layers) / before if before else 0.0

    @property
    def flops(self) -> tuple[int, int]:
        """(dense, pruned) of the linear layers for `tokens` tokens; attention itself is not counted."""
        return self.tokens * self.dense.flops, self.tokens * self.pruned.flops

    @property
    def totals(self) -> dict[str, tuple[float, float] | None]:
        """What the models are as wholes, (dense, pruned) each."""
        return {
            "sparsity": (self.dense.sparsity, self.pruned.sparsity),
            "parameters": (self.dense.parameters, self.pruned.parameters),
            "bytes": (self.dense.stored_bytes, self.pruned.stored_bytes),
            "flops": self.flops,
            "seconds": self.seconds,
        }

    def as_dict(self) -> dict[str, Any]:
        pairs = {name: None if pair is None else list(pair) for name, pair in self.totals.items()}
        return {
            **pairs,
            "removed": self.removed,
            "tokens": self.tokens,
            "block": list(self.block),
            "missing": list(self.missing),
            "metrics": {name: list(pair) for name, pair in self.metrics.items()},
            "outputs": None if self.outputs is None else self.outputs.as_dict(),
            "structures": [structure.as_dict() for structure in self.structures],
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        return "\n".join([*_table(self._layer_cells()), *map(_structure_text, self.structures), *self._footer()])

    def _layer_cells(self) -> list[list[str]]:
        blocks = "empty {}x{} blocks".format(*self.block)
        cells = [["layer", "shape", "kind", "zeros", "empty rows", "empty columns", blocks, "cosine"]]
        for change in self.layers:
            layer = change.layer
            shape = "x".join(map(str, layer.shape))
            if layer.shape != change.dense_shape:
                shape += " of {}x{}".format(*change.dense_shape)
            counts = (len(change.empty_rows), len(change.empty_columns), change.empty_blocks)
            cosine = "-" if change.cosine is None else f"{change.cosine:.3f}"
            cells.append([layer.name, shape, layer.kind, f"{layer.sparsity:.1%}", *map(str, counts), cosine])
        return cells

    def _footer(self) -> list[str]:
        lines = [f"gone: {name}" for name in self.missing]
        lines.append(f"{self.removed:.1%} of the linear layers' weights are zero or gone")
        digits = {"sparsity": "{:.1%}", "parameters": "{:,}", "bytes": "{:,}", "flops": "{:.3g}", "seconds": "{:.3g}"}
        for name, pair in self.totals.items():
            if pair is not None:
                unit = f" for {self.tokens} tokens" if name == "flops" else ""
                lines.append(f"{name}{unit}: " + " -> ".join(digits[name].format(value) for value in pair))
        lines += [f"{name}: {before:.4g} -> {after:.4g}" for name, (before, after) in self.metrics.items()]
        if self.outputs is not None:
            hidden = ", ".join(f"{cosine:.3f}" for cosine in self.outputs.hidden)
            lines += [f"cosine of the hidden states: {hidden}"] if hidden else []
            lines.append(f"cosine of the output: {self.outputs.output:.4f}")
        return lines


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    block: tuple[int, int] = BLOCK,
    tokens: int = 1,
    seconds: tuple[float, float] | None = None,
    metrics: Mapping[str, tuple[float, float]] | None = None,
) -> Comparison:
    """Say what a pruned model has lost against its dense original, layer by layer; both stay as they are.

    dense, pruned   with masks, zeros, sparse layers, or fewer rows, heads, neurons or layers; their linear layers
                    are matched by name
    inputs          keyword arguments of both models: hidden states and outputs are compared on them
    block           (n, k) that empty blocks are counted in
    tokens          to give FLOPs for
    seconds         (dense, pruned) of a forward pass, if measured
    metrics         name of a metric of the task -> (dense, pruned), if measured

    Raises ValueError for a linear layer of the pruned model that the dense one has not, tokens or sides of blocks
    below 1, and outputs of different shapes.
    """
    if tokens < 1 or min(block) < 1:
        raise ValueError(f"compare: expected tokens and block of at least 1, got {tokens} and {block}")
    before, after = dict(linear_layers(dense)), dict(linear_layers(pruned))
    if unknown := [name for name in after if name not in before]:
        raise ValueError(f"compare: expected the dense model's linear layers in the pruned one, got {unknown[0]!r} too")
    reports = report(dense), report(pruned)
    layers = tuple(
        _layer_change(layer, effective_weight(before[layer.name]), effective_weight(after[layer.name]), block)
        for layer in reports[1].layers
    )
    return Comparison(
        *reports,
        layers,
        tuple(name for name in before if name not in after),
        _structures(dense, pruned),
        block,
        tokens,
        None if inputs is None else output_similarity(dense, pruned, inputs),
        seconds,
        dict(metrics or {}),
    )


@torch.no_grad()
def output_similarity(dense: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any]) -> OutputSimilarity:
    """Run both models in eval mode on the same keyword arguments; a 0 in "attention_mask" marks padding.

    Raises ValueError for outputs of different shapes.
    """
    with evaluating(dense), evaluating(pruned):
        (output_a, hidden_a), (output_b, hidden_b) = _outputs(dense, inputs), _outputs(pruned, inputs)
    if output_a.shape != output_b.shape:
        raise ValueError(
            f"compare: expected outputs of shape {tuple(output_a.shape)}, the dense model's, "
            f"got {tuple(output_b.shape)}"
        )
    mask = inputs.get("attention_mask")
    a, b = (_tokens(output, mask) for output in (output_a, output_b))
    same = [state.shape for state in hidden_a] == [state.shape for state in hidden_b]
    pairs = zip(hidden_a, hidden_b, strict=True) if same else ()
    return OutputSimilarity(
        tuple(cosine(_tokens(first, mask), _tokens(second, mask)) for first, second in pairs),
        cosine(a, b),
        float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)),
    )


def _layer_change(layer: LayerReport, dense: Tensor, pruned: Tensor, block: tuple[int, int]) -> LayerChange:
    kept = pruned != 0
    rows, columns = (kept.any(dim=dim).logical_not().nonzero().flatten().tolist() for dim in (1, 0))
    divides = layer.shape[0] % block[0] == 0 and layer.shape[1] % block[1] == 0
    blocks = split_blocks(kept, block).any(dim=3).any(dim=2).sum(dim=1).tolist() if divides else []
    return LayerChange(
        layer,
        (dense.shape[0], dense.shape[1]),
        dense.numel() - int(dense.count_nonzero()),
        tuple(rows),
        tuple(columns),
        tuple(blocks),
        layer.shape[1] // block[1] if divides else 0,
        cosine(dense, pruned) if dense.shape == pruned.shape else None,
    )


def _structures(dense: nn.Module, pruned: nn.Module) -> tuple[StructureChange, ...]:
    """Of the transformer layers that both models have, by number; () where a model has no stack of a known family."""
    try:
        before, after = layer_stack(dense), layer_stack(pruned)
    except ValueError:
        return ()
    changes = []
    for old, new in zip(before.layers, after.layers, strict=False):
        heads, neurons = torch.arange(new.heads if new.inputs else 0), torch.arange(new.neurons)
        idle_heads: Sequence[int] = ()
        if new.inputs:
            *_, value, output = new.head_slices(heads)
            idle_heads = _idle([value], output)
        *inputs, output = new.neuron_slices(neurons)
        counts = (len(heads), old.heads if old.inputs else 0), (new.neurons, old.neurons)
        changes.append(StructureChange(new.name, *counts, tuple(idle_heads), tuple(_idle(inputs, output))))
    return tuple(changes)


def _idle(inputs: Sequence[Slice], output: Slice) -> list[int]:
    """Units that nothing reads, or that nothing but a bias feeds; each slice is of all units."""
    read = _any_nonzero(output)
    fed = torch.stack([_any_nonzero(part) for part in inputs]).any(dim=0)
    return (read & fed).logical_not().nonzero().flatten().tolist()


def _any_nonzero(part: Slice) -> Tensor:
    """(units,) bool: whether a unit has a nonzero weight in this projection."""
    weight = part.module.weight.t() if is_conv1d(part.module) else effective_weight(part.module)
    lines = (weight != 0).any(dim=1 if part.dim == ROWS else 0)
    return lines[part.lines.to(lines.device)].any(dim=1)


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(logits or last hidden states, hidden states if the model gives them)."""
    if not is_transformers_model(model):
        output = model(**inputs)
        return (output[0] if isinstance(output, tuple) else output), ()
    output = model(**inputs, output_hidden_states=True)
    main = output.logits if hasattr(output, "logits") else output[0]
    return main, tuple(output.hidden_states or ())


def _tokens(output: Tensor, mask: Tensor | None) -> Tensor:
    """In float64 on the CPU; of an output (B, T, ...) only the tokens that `mask` (B, T) counts."""
    output = output.detach().to("cpu", torch.float64)
    return output if mask is None or output.shape[:2] != mask.shape else output[mask.cpu().bool()]


def _structure_text(change: StructureChange) -> str:
    heads, neurons = change.heads, change.neurons
    return (
        f"{change.name}: {heads[0]} of {heads[1]} heads left, {len(change.idle_heads)} of them idle; "
        f"{neurons[0]} of {neurons[1]} neurons left, {len(change.idle_neurons)} of them idle"
    )


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]

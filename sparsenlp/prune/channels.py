"""Remove hidden units of recurrent layers and filters of convolutions, in place, with the inputs that read them.

No module knows who reads its output, so the caller names the readers. What shrinks becomes a new Parameter: make the
optimizer afterwards. The models still are ordinary torch modules: their state dict loads into one built with the
smaller sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.structure import select_lines_
from .checks import check_choice, check_numbers, check_own, check_unmasked
from .structured import REDUCTIONS, reduce_scores

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}

INPUTS: dict[type, tuple[str, tuple[str, ...], int]] = {
    nn.Linear: ("in_features", ("weight",), 1),
    nn.Conv1d: ("in_channels", ("weight",), 1),
    nn.BatchNorm1d: ("num_features", ("weight", "bias", "running_mean", "running_var"), 0),
    **dict.fromkeys(GATES, ("input_size", ("weight_ih_l0", "weight_ih_l0_reverse"), 1)),
}
"""What may read channels: the attribute that counts its inputs, the tensors with a line for each, and their dim."""


class Lines(NamedTuple):
    """Lines of a tensor of `module` that belong to channels: (channels, lines of a channel) int64 along `dim`."""

    module: Any
    tensor: str
    dim: int
    lines: Tensor


def remove_units_(
    model: nn.Module, name: str, units: Mapping[int, Sequence[int]], readers: Mapping[str, int]
) -> nn.Module:
    """Remove hidden units of an nn.LSTM, nn.GRU or nn.RNN: their gates, and what reads them in the next layer.

    name      of the recurrent module in `model`
    units     cell -> units. Cells are numbered as in h_n: layer * directions + direction. All lose as many, since
              torch gives all cells one hidden size
    readers   name -> first of its inputs that comes from here, for each nn.Linear, nn.Conv1d, nn.BatchNorm1d or
              recurrent module that takes the output (or the last layer's h_n, its directions side by side)
    returns   `model`

    Exact where nothing reads the unit: its columns of weight_hh, of the next layer and of the readers are zero.

    Raises ValueError, with the model untouched, for a cell or unit that is unknown or named twice, all units, cells
    that lose different numbers, a projection (proj_size), a reader with too few inputs or of another kind, and for
    weights that are masked or shared between modules; AttributeError for an unknown name.
    """
    module: Any = model.get_submodule(name)
    check_unmasked("remove_units_", name, module)
    if type(module) not in GATES:
        raise ValueError(f"remove_units_: expected {name} to be an nn.LSTM, nn.GRU or nn.RNN, got {_kind(module)}")
    cells = _cells(module)
    check_numbers("remove_units_", "cells", [*units], cells)
    for cell in range(cells):
        check_numbers("remove_units_", f"units of cell {cell}", units.get(cell, ()), module.hidden_size)
    numbers = {len(units.get(cell, ())) for cell in range(cells)}
    if len(numbers) > 1:
        raise ValueError(f"remove_units_: expected as many units of each of {cells} cells, got {sorted(numbers)}")
    count = numbers.pop()
    if count == module.hidden_size:
        raise ValueError(f"remove_units_: expected to keep at least one of {count} units, got all to remove")
    check_own("remove_units_", model, [module, *(model.get_submodule(reader) for reader in readers)])
    lines = _recurrent_lines(model, name, readers, units, "remove_units_")
    _remove(lines)
    module.hidden_size -= count
    _shrink(model, readers, count * (2 if module.bidirectional else 1))
    for part in (module, *(model.get_submodule(reader) for reader in readers)):
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()
    return model


def remove_filters_(
    model: nn.Module, name: str, filters: Sequence[int], readers: Mapping[str, int], positions: int = 1
) -> nn.Module:
    """Remove filters (output channels) of an nn.Conv1d, and the inputs that read them.

    name        of the convolution in `model`
    readers     name -> first of its inputs that comes from here, as in `remove_units_`
    positions   inputs of a reader per filter: 1 after pooling over time and for another convolution, the length where
                (filters, length) is flattened for a linear layer
    returns     `model`

    Exact where the readers' weights for the filter are zero.

    Raises ValueError, with the model untouched, for a filter that is unknown or named twice, all filters, a grouped
    convolution, and as `remove_units_`.
    """
    module: Any = model.get_submodule(name)
    check_unmasked("remove_filters_", name, module)
    if type(module) is not nn.Conv1d:
        raise ValueError(f"remove_filters_: expected {name} to be an nn.Conv1d, got {_kind(module)}")
    check_numbers("remove_filters_", "filters", filters, module.out_channels)
    if len(filters) == module.out_channels:
        raise ValueError(f"remove_filters_: expected to keep at least one of {len(filters)} filters, got all to remove")
    if positions < 1:
        raise ValueError(f"remove_filters_: expected at least 1 position, got {positions}")
    check_own("remove_filters_", model, [module, *(model.get_submodule(reader) for reader in readers)])
    lines = _filter_lines(model, name, readers, filters, positions, "remove_filters_")
    _remove(lines)
    module.out_channels -= len(filters)
    _shrink(model, readers, len(filters) * positions)
    return model


@torch.no_grad()
def channel_scores(
    model: nn.Module,
    name: str,
    scores: Mapping[str, Tensor],
    readers: Mapping[str, int],
    positions: int = 1,
    reduction: str = "l1",
) -> dict[int, Tensor]:
    """One score per hidden unit or filter from one per weight.

    name, readers, positions   as for `remove_units_` or `remove_filters_`
    scores      parameter name -> scores >= 0 of its shape, for the weights of the module and its readers
    reduction   over the weights of a unit, what reads it included: "l1" sum, "l2" root of the sum of squares, "mean"
    returns     cell -> (units,) float32; for a convolution 0 -> (filters,)

    Raises ValueError for an unknown reduction, missing scores or scores of another shape, and as those functions.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    module: Any = model.get_submodule(name)
    what = "channel_scores"
    if type(module) in GATES:
        every = range(module.hidden_size)
        by_cell = {cell: _recurrent_lines(model, name, readers, {cell: every}, what) for cell in range(_cells(module))}
    elif type(module) is nn.Conv1d:
        by_cell = {0: _filter_lines(model, name, readers, range(module.out_channels), positions, what)}
    else:
        raise ValueError(f"{what}: expected {name} to be recurrent or an nn.Conv1d, got {_kind(module)}")
    names = {part: part_name for part_name, part in model.named_modules()}
    found = {}
    for cell, lines in by_cell.items():
        parts = []
        for part, tensor, dim, index in lines:
            weight = getattr(part, tensor)
            if weight.dim() < 2:  # a bias
                continue
            full = f"{names[part]}.{tensor}".lstrip(".")
            got = scores.get(full)
            if got is None or got.shape != weight.shape:
                shown = "none" if got is None else str(tuple(got.shape))
                raise ValueError(f"{what}: expected scores {tuple(weight.shape)} of {full}, got {shown}")
            parts.append((got, dim, index))
        found[cell] = reduce_scores(parts, reduction)
    return found


def _recurrent_lines(
    model: nn.Module, name: str, readers: Mapping[str, int], units: Mapping[int, Sequence[int]], what: str
) -> list[Lines]:
    """What belongs to these units of a recurrent module. Raises ValueError for a projection and unfit readers."""
    module: Any = model.get_submodule(name)
    if module.proj_size:
        raise ValueError(f"{what}: expected {name} without a projection, got proj_size={module.proj_size}")
    hidden, directions = module.hidden_size, 2 if module.bidirectional else 1
    gates = GATES[type(module)]
    inputs = _reader_inputs(model, readers, hidden * directions, what)
    found = []
    for cell, chosen in units.items():
        layer, direction = divmod(cell, directions)
        channels = torch.tensor([*chosen], dtype=torch.int64)[:, None]
        suffix = f"l{layer}" + "_reverse" * direction
        rows = channels + hidden * torch.arange(gates)
        tensors = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias
        found += [Lines(module, f"{tensor}_{suffix}", 0, rows) for tensor in tensors]
        found.append(Lines(module, f"weight_hh_{suffix}", 1, channels))
        outputs = channels + hidden * direction
        if layer + 1 < module.num_layers:
            following = [f"weight_ih_l{layer + 1}" + end for end in ("", "_reverse")[:directions]]
            found += [Lines(module, tensor, 1, outputs) for tensor in following]
        else:
            found += [lines._replace(lines=outputs + lines.lines) for lines in inputs]
    return found


def _filter_lines(
    model: nn.Module, name: str, readers: Mapping[str, int], filters: Sequence[int], positions: int, what: str
) -> list[Lines]:
    """What belongs to these filters. Raises ValueError for a grouped convolution and unfit readers."""
    module: Any = model.get_submodule(name)
    if module.groups != 1:
        raise ValueError(f"{what}: expected {name} without groups, got {module.groups}")
    channels = torch.tensor([*filters], dtype=torch.int64)[:, None]
    found = [Lines(module, tensor, 0, channels) for tensor in ["weight"] + ["bias"] * (module.bias is not None)]
    inputs = _reader_inputs(model, readers, module.out_channels * positions, what)
    outputs = channels * positions + torch.arange(positions)
    return found + [lines._replace(lines=outputs + lines.lines) for lines in inputs]


def _reader_inputs(model: nn.Module, readers: Mapping[str, int], channels: int, what: str) -> list[Lines]:
    """The tensors of the readers that have a line for each input; `lines` is the first one from here."""
    found = []
    for name, first in readers.items():
        reader: Any = model.get_submodule(name)
        if type(reader) not in INPUTS:
            known = ", ".join(f"nn.{kind.__name__}" for kind in INPUTS)
            raise ValueError(f"{what}: expected reader {name} to be one of {known}, got {_kind(reader)}")
        attribute, tensors, dim = INPUTS[type(reader)]
        size = getattr(reader, attribute)
        if getattr(reader, "groups", 1) != 1:
            raise ValueError(f"{what}: expected reader {name} without groups, got {reader.groups}")
        if not 0 <= first <= size - channels:
            raise ValueError(
                f"{what}: expected reader {name} to have inputs {first} to {first + channels - 1}, got {size} inputs"
            )
        present = [tensor for tensor in tensors if getattr(reader, tensor, None) is not None]
        found += [Lines(reader, tensor, dim, torch.tensor(first)) for tensor in present]
    return found


@torch.no_grad()
def _remove(lines: Sequence[Lines]) -> None:
    """Take lines out of their tensors."""
    removed: dict[tuple[Any, str, int], list[Tensor]] = {}
    for module, tensor, dim, channels in lines:
        removed.setdefault((module, tensor, dim), []).append(channels.flatten())
    for (module, tensor, dim), index in removed.items():
        stay = torch.ones(getattr(module, tensor).shape[dim], dtype=torch.bool)
        stay[torch.cat(index)] = False
        select_lines_(module, tensor, dim, stay.nonzero().flatten())


def _shrink(model: nn.Module, readers: Mapping[str, int], inputs: int) -> None:
    """Count so many inputs less of each reader."""
    for name in readers:
        reader = model.get_submodule(name)
        attribute = INPUTS[type(reader)][0]
        setattr(reader, attribute, getattr(reader, attribute) - inputs)


def _cells(module: Any) -> int:
    return module.num_layers * (2 if module.bidirectional else 1)


def _kind(module: nn.Module) -> str:
    return f"nn.{type(module).__name__}" if type(module).__module__.startswith("torch.nn") else type(module).__name__

"""Where a transformer keeps its heads and neurons, how to leave some out, and what its configuration says of them.

A layer without some of its heads or neurons is an index operation on the rows of some projections and the columns
of others. `Slice` is one of them; removing, scoring and reordering all go through lists of slices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.encoder import SparseEncoder
from . import is_transformers_model
from .families import FAMILIES, at

ROWS, COLUMNS = 0, 1

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
HEAD_WIDTHS = ("all_head_size", "split_size")
LAYER_COUNTS = ("num_layers", "n_layers")
"""Attributes under which modules of transformers and torch keep what they were built with."""


class Slice(NamedTuple):
    """Lines of a projection: rows (its outputs) or columns (its inputs).

    lines   (units, lines of a unit) int64, in the order of the units
    """

    module: Any
    dim: int
    lines: Tensor


@dataclass(frozen=True)
class LayerParts:
    """The projections of one transformer layer.

    name         of the layer in the model
    attention    the module that holds the inputs, None where it needs as many heads as fit its width
    inputs       query, key and value, or one module with the rows of all three
    output       of attention
    ffn_inputs   fc1, or gate and up
    ffn_output   fc2, or down
    rotary       queries and keys are rotated in pairs of dimensions
    """

    name: str
    layer: nn.Module
    attention: Any
    inputs: tuple[Any, ...]
    output: Any
    ffn_inputs: tuple[Any, ...]
    ffn_output: Any
    head_dim: int
    rotary: bool = False

    @property
    def heads(self) -> int:
        """Of keys and values; each serves `group` heads of queries."""
        rows = width(self.inputs[0], ROWS) // 3 if len(self.inputs) == 1 else width(self.inputs[1], ROWS)
        return rows // self.head_dim

    @property
    def group(self) -> int:
        return 1 if len(self.inputs) == 1 else width(self.inputs[0], ROWS) // (self.heads * self.head_dim)

    @property
    def neurons(self) -> int:
        return width(self.ffn_output, COLUMNS)

    def head_slices(self, heads: Tensor) -> list[Slice]:
        """What belongs to these heads of keys and values, (n,) int64, and to the queries that they serve."""
        queries, keys = _lines_of(heads, self.group * self.head_dim), _lines_of(heads, self.head_dim)
        return [*self.input_slices(queries, keys, keys), Slice(self.output, COLUMNS, queries)]

    def neuron_slices(self, neurons: Tensor) -> list[Slice]:
        """What belongs to these neurons, (n,) int64."""
        lines = _lines_of(neurons, 1)
        return [*(Slice(m, ROWS, lines) for m in self.ffn_inputs), Slice(self.ffn_output, COLUMNS, lines)]

    def input_slices(self, queries: Tensor, keys: Tensor, values: Tensor) -> list[Slice]:
        """Rows of query, key and value, wherever they are; of those of one module queries come first."""
        first = 0, 0, 0
        modules = self.inputs
        if len(modules) == 1:
            third = width(modules[0], ROWS) // 3
            first, modules = (0, third, 2 * third), modules * 3
        rows = zip(modules, first, (queries, keys, values), strict=True)
        return [Slice(module, ROWS, lines + start) for module, start, lines in rows]


@dataclass(frozen=True)
class LayerStack:
    """The transformer layers of a model.

    modules      the list that holds them
    owner        the module in which that list is
    host         the outermost transformers model around it, None if there is none
    inner        the innermost one, whose configuration, `config`, is of these layers
    neurons      field of the configuration, "" without one
    free_heads   the configuration may have any number of heads
    obstacle     why heads cannot go, "" if they can
    fused        something else runs the layers
    """

    modules: nn.ModuleList
    layers: tuple[LayerParts, ...]
    owner: nn.Module
    host: Any = None
    neurons: str = ""
    free_heads: bool = False
    obstacle: str = ""
    fused: bool = False
    inner: Any = None

    @property
    def config(self) -> Any:
        return None if self.inner is None else self.inner.config


def layer_stack(model: nn.Module) -> LayerStack:
    """The one stack of transformer layers in `model`.

    Raises ValueError if there is none of a known family, or several.
    """
    stacks = list(_stacks(model))
    if len(stacks) != 1:
        raise ValueError(
            f"expected a model with one stack of layers of a known family, got {len(stacks)} in {type(model).__name__}"
        )
    return stacks[0]


def width(module: Any, dim: int) -> int:
    """Rows (outputs) or columns (inputs) of an nn.Linear, a Conv1D or one of our sparse layers."""
    if is_conv1d(module):
        return module.weight.shape[1 - dim]
    return (module.out_features, module.in_features)[dim]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with the weight (inputs, outputs)."""
    return not isinstance(module, nn.Linear) and hasattr(module, "nf") and hasattr(module, "nx")


@torch.no_grad()
def select_(slices: Sequence[Slice]) -> None:
    """Reduce each module to its slices' lines, in their order; several of one module and dim follow each other."""
    chosen: dict[tuple[Any, int], list[Tensor]] = {}
    for module, dim, lines in slices:
        chosen.setdefault((module, dim), []).append(lines.flatten())
    for (module, dim), parts in chosen.items():
        index = torch.cat(parts)
        select_lines_(module, "weight", 1 - dim if is_conv1d(module) else dim, index)
        if dim == ROWS and module.bias is not None:
            select_lines_(module, "bias", 0, index)
        names = ("nf", "nx") if is_conv1d(module) else ("out_features", "in_features")
        setattr(module, names[dim], index.numel())


def select_lines_(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Put a Parameter (or buffer) of these lines of module.name in its place.

    It has to be a new one: graphs that are still alive remember the shape of the old one.
    """
    old = getattr(module, name)
    new = old.detach().index_select(dim, index.to(old.device))
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def keep_heads_(parts: LayerParts, heads: Tensor) -> None:
    """Reduce a layer to these heads of keys and values, (n,) int64."""
    queries = heads.numel() * parts.group
    select_(parts.head_slices(heads))
    for name in HEAD_COUNTS:
        if hasattr(parts.attention, name):
            setattr(parts.attention, name, queries)
    for name in HEAD_WIDTHS:
        if hasattr(parts.attention, name):
            setattr(parts.attention, name, queries * parts.head_dim)


def keep_neurons_(parts: LayerParts, neurons: Tensor) -> None:
    """Reduce a layer to these neurons, (n,) int64."""
    select_(parts.neuron_slices(neurons))


def keep_layers_(stack: LayerStack, kept: Sequence[int]) -> None:
    """Reduce the model to these layers, in this order, and number them anew."""
    modules = [stack.modules[i] for i in kept]
    del stack.modules[:]
    stack.modules.extend(modules)
    for number, layer in enumerate(modules):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]
    for name in LAYER_COUNTS:
        if hasattr(stack.owner, name):
            setattr(stack.owner, name, len(modules))


def own_config_(host: Any) -> Any:
    """Give a transformers model a configuration of its own, with all its parts, to be changed; returns it."""
    copies: dict[int, Any] = {}
    own = copy.deepcopy(host.config, copies)
    for module in host.modules():
        if (present := getattr(module, "config", None)) is not None:
            module.config = copies.get(id(present), present)
    return own


def update_config_(model: nn.Module, kept_layers: Sequence[int] | None = None) -> None:
    """Let the configuration of a transformers model say what its layers are now, as far as it can.

    kept_layers   which of the layers it told of are left

    While it cannot (see `structure_of`), save_pretrained writes our checkpoint.
    """
    stack = layer_stack(model)
    if stack.host is None:
        return
    own_config_(stack.host)
    config = stack.config
    config.num_hidden_layers = len(stack.layers)
    if kept_layers is not None and getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept_layers]
    setattr(config, stack.neurons, max(parts.neurons for parts in stack.layers))
    if stack.free_heads:
        most = max(stack.layers, key=lambda parts: parts.heads)
        config.head_dim = most.head_dim
        config.num_attention_heads = most.heads * most.group
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = most.heads
    from .hf_saving import attach, detach

    (attach if structure_of(stack.host) else detach)(stack.host)


def structure_of(model: nn.Module) -> dict[str, list[int]]:
    """What the configuration of a transformers model cannot express: "heads" and "neurons", a number per layer each.

    Heads are those of keys and values. Empty if the configuration says it all, or for an unknown family.
    """
    stacks = list(_stacks(model))
    if len(stacks) != 1 or stacks[0].host is None:
        return {}
    stack, config = stacks[0], stacks[0].config
    told = {"heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads}
    told["neurons"] = getattr(config, stack.neurons) or 4 * config.hidden_size  # GPT-2's default is None
    counts = {kind: [getattr(parts, kind) for parts in stack.layers] for kind in told}
    return {kind: numbers for kind, numbers in counts.items() if set(numbers) - {told[kind]}}


def restructure_(model: nn.Module, structure: Mapping[str, Sequence[int]]) -> None:
    """Reduce a model built from its configuration to the shapes that `structure_of` told; values do not matter.

    Raises ValueError, with the model untouched, if it has other layers, or fewer heads or neurons.
    """
    if not structure:
        return
    layers = layer_stack(model).layers
    for kind, numbers in structure.items():
        present = [getattr(parts, kind) for parts in layers]
        if len(present) != len(numbers) or any(n > most for n, most in zip(numbers, present, strict=True)):
            raise ValueError(f"structure: expected at most {present} {kind} in the layers, got {[*numbers]}")
    for kind, keep_ in (("heads", keep_heads_), ("neurons", keep_neurons_)):
        for parts, number in zip(layers, structure.get(kind, ()), strict=False):
            keep_(parts, torch.arange(number))


def _stacks(model: nn.Module) -> Iterator[LayerStack]:
    hosts = [(name, module) for name, module in model.named_modules() if is_transformers_model(module)]
    found: list[str] = []
    for name, module in model.named_modules():
        if any(_within(name, outer) for outer in found):
            continue
        around = [host for outer, host in hosts if _within(name, outer)] or [None]
        stack = _stack_at(name, module, around[0])
        if stack is not None:
            found.append(name)
            yield replace(stack, inner=around[-1])


def _stack_at(name: str, module: Any, host: Any) -> LayerStack | None:
    """The stack that `module`, of this name, holds itself."""
    fused = isinstance(module, SparseEncoder)
    kind = type(module.original if fused else module)
    if kind is nn.TransformerEncoder:
        return _torch_stack(name, module, fused)
    qualified = f"{kind.__module__}.{kind.__qualname__}"
    family = next((family for family in FAMILIES if qualified in family.classes), None)
    if family is not None:
        path = family.layer_list or "layer"
        modules = getattr(module, path)
        fused = fused or isinstance(modules, SparseEncoder)
        layers = []
        for number, layer in enumerate(modules.children()):
            query, key, value, output, fc1, fc2 = (at(layer, part) for part in family.projections)
            holder = at(layer, family.projections[0].rpartition(".")[0])
            sizes = at(layer, family.head_dim)
            layer_name = _join(name, path, str(number))
            layers.append(LayerParts(layer_name, layer, holder, (query, key, value), output, (fc1,), fc2, sizes))
        obstacle = f"{family.name} shares a position bias by head among its layers" if family.bias else ""
        return LayerStack(modules, tuple(layers), module, host, family.neurons, family.free_heads, obstacle, fused)
    return _decoder_stack(name, module, host)


def _torch_stack(name: str, module: Any, fused: bool) -> LayerStack:
    layers = tuple(
        LayerParts(
            _join(name, "layers", str(number)),
            layer,
            None,
            (),
            layer.self_attn.out_proj,
            (layer.linear1,),
            layer.linear2,
            layer.self_attn.head_dim,
        )
        for number, layer in enumerate(module.layers)
    )
    obstacle = "nn.MultiheadAttention needs heads that fill its width"
    return LayerStack(module.layers, layers, module, obstacle=obstacle, fused=fused)


def _decoder_stack(name: str, module: Any, host: Any) -> LayerStack | None:
    if not is_transformers_model(module) or module.base_model is not module:
        return None
    from .decoders import FAMILIES as DECODERS
    from .decoders import DecoderForward

    family = DECODERS.get(module.config.model_type)
    if family is None:
        return None
    modules = module.get_submodule(family.layers)
    layers = []
    for number, layer in enumerate(modules):
        inputs = tuple(layer.get_submodule(path) for path in family.inputs)
        ffn_inputs = tuple(layer.get_submodule(path) for path in (family.gate, family.up) if path)
        holder = layer.get_submodule(family.inputs[0].rpartition(".")[0])
        layers.append(
            LayerParts(
                _join(name, family.layers, str(number)),
                layer,
                holder,
                inputs,
                layer.get_submodule(family.output_projection),
                ffn_inputs,
                layer.get_submodule(family.down),
                holder.head_dim,
                rotary=family.rope is not None,
            )
        )
    fused = isinstance(module.__dict__.get("forward"), DecoderForward)
    return LayerStack(modules, tuple(layers), module, host, family.neurons, family.free_heads, "", fused)


def _lines_of(units: Tensor, size: int) -> Tensor:
    """(n,) -> (n, size): the lines of units of `size` lines each."""
    return units[:, None] * size + torch.arange(size)


def _within(name: str, outer: str) -> bool:
    """Whether the module `name` is `outer` or a part of it."""
    return name == outer or name.startswith(f"{outer}." if outer else "")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)

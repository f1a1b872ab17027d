"""torch's layers that hold matrices but no nn.Linear (LSTM, GRU, Conv1d), and their twins whose matrices are linear.

A twin with nn.Linear matrices ("split") computes the same, so masks, statistics and solvers reach the matrices; one
with SparseLinear matrices is sparse. Models start with torch's layers and have them again where no mask is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .adapters import adapted_layers, adapter_modules
from .recurrent import SparseRecurrent
from .sparse_conv1d import SparseConv1d, filter_matrix
from .sparse_gru import SparseGRU
from .sparse_lstm import SparseLSTM

Twin = SparseRecurrent | SparseConv1d
TWINS: dict[type[nn.Module], Any] = {nn.LSTM: SparseLSTM, nn.GRU: SparseGRU, nn.Conv1d: SparseConv1d}
"""By torch's class; a subclass may compute something else."""
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
"""Attributes of modules; their handles go on working where a twin takes them over."""

Function = TypeVar("Function", bound=Callable[..., Any])
Module = TypeVar("Module", bound=nn.Module)


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one hangs below `model`."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])


def is_composite(module: nn.Module) -> bool:
    """Whether this is one of torch's layers that `split` takes: exactly of its class, each weight a Parameter."""
    names: Any = getattr(module, "_flat_weights_names", ("weight",))
    return (
        type(module) in TWINS
        and all(name in module._parameters for name in names)
        and getattr(module, "groups", 1) == 1
    )


def split(module: nn.Module) -> Twin:
    """The twin with nn.Linear matrices, which has the layer's Parameters (of a convolution a copy) and hooks.

    With masks on, its state dict also holds the tensors of torch's layer under their names, for whoever loads them
    into a model that is not split; one that holds those alone can be loaded into the twin.
    """
    twin = with_hooks(cast(Twin, TWINS[type(module)].split(module)), module)
    twin.register_state_dict_post_hook(_save_whole)
    twin.register_load_state_dict_pre_hook(_load_whole)
    return twin


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """model.named_modules(), and after each layer of torch that could be split its matrices, as if it were.

    Those are nn.Linear views: they share Parameters (and their gradients) with the layer, but the model does not call
    them, so a mask or a hook on one does nothing. For these `splitting` comes first. A convolution's is a copy, whose
    weight takes no gradient.
    """
    composites = _composites(model)
    for name, module in model.named_modules():
        yield name, module
        if module in composites:
            for own, view in split(module).matrices.items():
                if type(module) is nn.Conv1d:
                    cast(nn.Linear, view).weight.requires_grad_(False)
                yield f"{name}.{own}", view


def split_composites_(model: nn.Module, names: Container[str] | None = None) -> dict[nn.Module, nn.Module]:
    """Put twins with nn.Linear matrices in for torch's layers, in place; returns {torch's layer: twin}.

    Nothing else changes: Parameters are the same objects, but for a convolution's weight, outputs and gradients the
    same numbers. The state dict has the names of the twin, as `lstm.ih_l0.weight`, until `join_composites_`.

    names  qualified names of the layers to split; None: all
    """
    composites = _composites(model)
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in composites and module not in twins and (names is None or name in names):
            twins[module] = split(module)
    replace_modules(model, twins)
    return twins


def join_composites_(model: nn.Module) -> nn.Module:
    """Put torch's layers in for twins whose matrices are all plain nn.Linear, without masks; returns `model`."""
    joined: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Twin) and module is not model and _is_plain(module):
            joined[module] = with_hooks(module.to_dense(), module)
    replace_modules(model, joined)
    return model


@contextmanager
def splitting(model: nn.Module) -> Iterator[None]:
    """`split_composites_` for a block that may put masks on: where it put none, or failed, torch's layers come back."""
    twins = split_composites_(model)
    try:
        yield
    finally:
        whole = {twin: module for module, twin in twins.items() if _is_plain(twin)}
        for twin, module in whole.items():
            if isinstance(twin, SparseConv1d):  # its weight is a copy, which may have been trained
                with torch.no_grad():
                    cast(nn.Conv1d, module).weight.copy_(twin.to_dense().weight)
        replace_modules(model, whole)


def on_split(function: Function) -> Function:
    """Decorator of a function whose first parameter is `model`, which it calls `splitting`."""

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with splitting(model):
            return function(model, *args, **kwargs)

    return cast(Function, call)


@torch.no_grad()
def _save_whole(twin: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    if _is_split(twin) and any("weight" not in matrix._parameters for matrix in twin.children()):
        whole = cast(Twin, twin).to_dense()
        state.update({f"{prefix}{name}": tensor.detach().clone() for name, tensor in whole.named_parameters()})


def _load_whole(twin: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    names = _own_names(cast(Twin, twin)) if _is_split(twin) else {}
    whole = {own: state.pop(f"{prefix}{name}") for name, own in names.items() if f"{prefix}{name}" in state}
    if any(key.startswith(prefix) for key in state):
        return  # the matrices' own tensors, which hold more
    if isinstance(twin, SparseConv1d) and "filters.weight" in whole:
        whole["filters.weight"] = filter_matrix(whole["filters.weight"])
    state.update({f"{prefix}{own}": tensor for own, tensor in whole.items()})


def _own_names(twin: Twin) -> dict[str, str]:
    """{torch's name of a tensor: its name in a split twin}."""
    if isinstance(twin, SparseConv1d):
        return {part: f"filters.{part}" for part in ("weight", "bias")}
    return {f"{part}_{matrix}": f"{matrix}.{part}" for matrix in twin.matrices for part in ("weight", "bias")}


def _is_split(twin: nn.Module) -> bool:
    return all(isinstance(child, nn.Linear) for child in twin.children())


def _composites(model: nn.Module) -> set[nn.Module]:
    """Layers inside of `model` that can be split.

    Neither a convolution whose weight another module has too, as the copies would part, nor one that is an adapter, or
    has one on it that reads its weight.
    """
    taken = adapter_modules(model) | adapted_layers(model).keys()
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {
        module
        for module in model.modules()
        if is_composite(module)
        and module is not model
        and module not in taken
        and not (isinstance(module, nn.Conv1d) and owners[id(module.weight)] > 1)
    }


def _is_plain(twin: nn.Module) -> bool:
    """Whether the matrices are nn.Linear and nothing but that."""
    return all(type(child) is nn.Linear for child in twin.children())


def with_hooks(new: Module, old: nn.Module) -> Module:
    """`new` with the forward hooks of `old`, which may still be removed by their handles."""
    for attribute in HOOKS:
        setattr(new, attribute, getattr(old, attribute))
    return new

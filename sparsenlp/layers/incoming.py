"""State dicts on their way into layers of a sparse format: brought to the layers' dtypes, or refused in time."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


class Compressed(Protocol):
    """A module whose weight is `values` and indices.

    content        names of the values and the indices, in a state dict too
    index_dtype    of the indices, to which int16 is converted
    """

    content: ClassVar[tuple[str, ...]]
    index_dtype: ClassVar[torch.dtype]

    def check_content(self, tensors: dict[str, Tensor], scales: Tensor | None) -> None:
        """Raise TypeError or ValueError unless tensors of these names describe a weight of this layer's shape."""


def watch_incoming_(model: nn.Module) -> None:
    """Let `load_state_dict` of `model` check all sparse layers in it before it changes the first tensor. Idempotent."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _check_all for hook in hooks):
        model.register_load_state_dict_pre_hook(_check_all)


def take_incoming(module: Any, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Convert and check what is meant for one layer; a hook before its part of a state dict is copied.

    Files have columns in int16 where they fit, and beside them an empty `weight` (see checkpoint.py). Raises TypeError
    or ValueError for a weight that is not this layer's: another number of blocks or another shape, an int8 one for
    another dtype or the other way round, indices that describe no weight, a part of one, or a dense one.
    """
    names = {part: f"{prefix}{part}" for part in module.content}
    where = prefix.rstrip(".") or type(module).__name__
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, Tensor) and weight.numel():
        raise ValueError(
            f"{where}: expected {', '.join(names)} of a sparse layer, got a dense weight; "
            "load it into the dense model, then sparsify_ that"
        )
    state.pop(f"{prefix}weight", None)
    present = [part for part, name in names.items() if name in state]
    if not present:
        return
    if missing := [part for part in names if part not in present]:
        raise ValueError(f"{where}: expected {', '.join(names)} together, got no {missing[0]}")
    for part, name in names.items():
        if part != "values" and state[name].dtype == torch.int16:
            state[name] = state[name].to(module.index_dtype)
    tensors = {part: state[name] for part, name in names.items()}
    values, own = tensors["values"], module.values
    if values.is_meta:
        return
    if (values.dtype == torch.int8) != (own.dtype == torch.int8):
        raise TypeError(f"{where}: expected values of dtype {own.dtype}, got {values.dtype}")
    try:
        module.check_content(tensors, state.get(f"{prefix}scales"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    if values.shape != own.shape:
        raise ValueError(
            f"{where}: expected values of shape {tuple(own.shape)}, got {tuple(values.shape)}; a layer takes weights "
            "with as many blocks as it has, from_pretrained builds the model that a checkpoint is of"
        )


def _check_all(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "check_content"):
            take_incoming(module, ChainMap({}, state), f"{prefix}{name}." if name else prefix)

"""What every mask on a weight has in common: how it is put on, what may be written, and what a state dict holds."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BESIDE_WEIGHTS = re.compile(
    r"(\.|^)parametrizations\.weight\.|(\.|^)((ih|hh|hr)_l\d+(_reverse)?|filters)\.(weight|bias)$"
)
"""Names in the state dict of a model with masks on that stand beside the ordinary weights."""
_HARMLESS = {"detach_", "rename_", "requires_grad_", "share_memory_"}
_ADVICE = (
    "masked weight: expected to be read only, got something written into it, which would be lost as it is computed "
    "anew each time; call finalize_ before (as before merging an adapter into it), or assign a tensor to layer.weight, "
    "which stores it under the mask"
)


class ComputedWeight(Tensor):
    """The product of a weight and its mask; it refuses to be written into.

    Operations see an ordinary tensor and return ordinary ones. Raises RuntimeError for an assignment to `data` or to
    an element, and for methods that work in place, as those of torch.nn.init and peft's merging do.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse()

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(_ADVICE)


for _name in dir(Tensor):
    if _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS:
        setattr(ComputedWeight, _name, _refuse)


def computed(weight: Tensor) -> Tensor:
    """The same values as a ComputedWeight; tensors of other classes, and those of a graph being traced, as they are."""
    if type(weight) is not Tensor or torch.compiler.is_compiling():
        return weight
    return weight.as_subclass(ComputedWeight)


def put_mask_(layer: nn.Linear, mask: nn.Module) -> None:
    """Make `mask` the parametrization of the layer's weight.

    A state dict of the layer then holds three things: the values beneath the mask, the mask, and as `weight` the
    product, so that whoever loads it into a layer without a mask gets the right weight. One that holds the `weight`
    alone can be loaded into the masked layer: it goes beneath the mask, which stays.
    """
    parametrize.register_parametrization(layer, "weight", mask)
    if not any(hook is _save_product for hook in layer._state_dict_hooks.values()):
        saving = layer.register_state_dict_post_hook(_save_product)
        hooks = cast(OrderedDict, layer._state_dict_hooks)
        hooks.move_to_end(saving.id, last=False)  # before hooks that change the layout of `weight`
        layer.register_load_state_dict_pre_hook(_load_beneath)


def take_mask_(layer: nn.Linear, keep_zeros: bool) -> None:
    """Make the weight an ordinary parameter again, first of all as nn.Linear has it; with the mask's zeros or without.

    Optimizers and norms of gradients go by the order of parameters, and so does what training rounds to.
    """
    layer.__class__ = _copy(type(layer))  # a deep copy of the layer shares the class, which loses its `weight`
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep_zeros)
    parameters = layer._parameters
    for name in [name for name in parameters if name != "weight"]:
        parameters[name] = parameters.pop(name)
    hooks: tuple[dict[int, Any], ...] = (layer._state_dict_hooks, layer._load_state_dict_pre_hooks)
    for registered in hooks:
        for key in [key for key, hook in registered.items() if _function(hook) in (_save_product, _load_beneath)]:
            del registered[key]


def _copy(cls: type) -> type:
    return type(
        cls.__name__, cls.__bases__, {n: v for n, v in vars(cls).items() if n not in ("__dict__", "__weakref__")}
    )


def _function(hook: Any) -> Any:
    return getattr(hook, "hook", hook)


@torch.no_grad()
def _save_product(layer: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        state[f"{prefix}weight"] = cast(Tensor, layer.weight).detach()


@torch.no_grad()
def _load_beneath(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if f"{prefix}weight" not in state or not parametrize.is_parametrized(layer, "weight"):
        return
    weight = state.pop(f"{prefix}weight")
    beneath = f"{prefix}parametrizations.weight."
    if f"{beneath}original" in state:
        return
    chain = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    state |= {f"{beneath}{name}": state.get(f"{beneath}{name}", own) for name, own in chain.state_dict().items()}
    state[f"{beneath}original"] = weight
    mask = getattr(next(iter(cast(nn.ModuleList, chain))), "mask", None)
    if isinstance(mask, Tensor) and mask.shape == weight.shape:
        hidden = int(weight.to(mask.device)[~mask].count_nonzero())
        if hidden:
            name = prefix.rstrip(".") or type(layer).__name__
            warnings.warn(
                f"{name}: {hidden:,} of the {weight.numel():,} weights loaded are not zero but pruned by the mask, "
                "which stays; finalize_ before loading keeps them all",
                stacklevel=2,
            )

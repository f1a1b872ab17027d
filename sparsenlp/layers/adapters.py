"""Which parts of a model are adapters (LoRA and its kin, as peft attaches them), and which layers they sit on.

Told by classes and module names alone: peft is never imported here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modes import evaluating

PACKAGE = "peft"
BASES = frozenset({"base_layer", "base_model", "lora_model", "model", "original_module"})
"""Names under which peft's modules keep what they adapt; whatever else they hold is the adapter."""
PREFIX = "lora_"
"""Begins the names that modules of an adapter have in nearly every implementation."""


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that belong to an adapter: its matrices, and copies of layers that are trained with it."""
    found: set[nn.Module] = set()
    for module in model.modules():
        tuner = _is_of_peft(module)
        for name, child in module.named_children():
            if name.startswith(PREFIX) or (tuner and name not in BASES):
                found.update(child.modules())
    return found


def adapted_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """{layer that an adapter sits on: the adapter's outermost module}, adapters on one another as one."""
    owners: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        base = _base_of(module)
        if base is not None:
            owners[base] = owners.get(module, module)
    return {layer: owner for layer, owner in owners.items() if _base_of(layer) is None}


def has_adapters(model: nn.Module) -> bool:
    """Whether an adapter sits on a layer of the model."""
    return any(_base_of(module) is not None for module in model.modules())


@torch.no_grad()
def only_called(layer: nn.Linear, owner: nn.Module) -> bool:
    """Whether the adapter `owner` calls the layer and does not read its weight, tried on a random input.

    LoRA adds to what the layer returns; DoRA, OFT and others compute with its weight, which has to stay a tensor.
    """
    holder = next(module for module in owner.modules() if module._modules.get("base_layer") is layer)
    weight: Tensor = layer.weight
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    with evaluating(owner):
        expected = owner(x)
        holder._modules["base_layer"] = _Called(layer)
        try:
            return bool(torch.equal(owner(x), expected))
        except (AttributeError, TypeError):
            return False
        finally:
            holder._modules["base_layer"] = layer


class _Called(nn.Module):
    """A layer without its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._call = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


def _base_of(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer") if _is_of_peft(module) else None


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == PACKAGE for cls in type(module).__mro__)

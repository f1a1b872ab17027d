"""The layers of a decoder as one op, on the tensors of the modules that make up the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import native
from ..formats.block import INDEX_DTYPE
from ..formats.decoder import DecoderLayerWeights, DecoderProjection, DecoderWeights
from ..ops.bsr_linear import call as call_linear
from ..ops.decoder_layers import NATIVE_DTYPES, call, check_weights
from .linear import SparseLinear


@dataclass(frozen=True)
class DecoderLayerModules:
    """The modules of a layer, by their part in DecoderLayerWeights; `layer` is the one that holds them."""

    layer: nn.Module
    inputs: tuple[nn.Module, ...]
    output: nn.Module
    up: nn.Module
    down: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    gate: nn.Module | None = None


class FewTokenLinear:
    """The forward of a dense nn.Linear, through `bsr_linear` for up to MOST_TOKENS tokens: one block to a row.

    One token reads the weight once and does little else; our kernel reads it at the speed of memory, up to twice as
    fast as torch. Takes the place of `linear.forward`, to which it falls back when gradients are enabled, under
    autocast, and for more tokens, other dtypes and devices.
    """

    MOST_TOKENS = 8

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.rows = torch.arange(linear.out_features + 1, dtype=INDEX_DTYPE)
        self.columns = torch.zeros(linear.out_features, dtype=INDEX_DTYPE)

    def __call__(self, x: Tensor) -> Tensor:
        linear = self.linear
        weight, bias = linear.weight, linear.bias
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or not native.available
            or weight.dtype not in NATIVE_DTYPES
            or not (x.dtype == weight.dtype and x.is_cpu and weight.is_cpu and weight.is_contiguous())
            or not 0 < x.numel() <= self.MOST_TOKENS * linear.in_features
            or weight.shape != (self.columns.shape[0], x.shape[-1])
        ):
            return type(linear).forward(linear, x)
        return call_linear(x, self.rows, self.columns, weight[:, None], x.shape[-1], bias, "none")


class DecoderStack:
    """Runs decoder layers and the norm after them by one call of `decoder_layers`. Not a module: it owns no tensor.

    heads, scale, activation, eps  as in DecoderWeights

    Weights are read where the modules keep them, so loading or changing them in place is seen at once.
    `unchanged` tells whether the modules still are what the stack was built from. Building raises ValueError for a
    projection that is neither an nn.Linear nor a SparseLinear, and as `decoder_layers` does.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayerModules],
        norm: nn.Module,
        kv_heads: int,
        head_dim: int,
        heads: int,
        scale: float,
        activation: str,
        eps: float,
    ) -> None:
        self.weights = DecoderWeights(
            tuple(_layer_weights(layer) for layer in layers), _norm(norm), heads, scale, activation, eps
        )
        self.cache_shape = (2, len(layers), kv_heads, head_dim)
        self.dtype = self.weights.norm[0].dtype
        check_weights(self.weights, self.weights.norm[0].shape[0], head_dim, kv_heads, self.dtype)
        self._tensors = self.weights.lists()
        modules = [*(module for layer in layers for module in layer.layer.modules()), norm]
        self._hooks: list[Mapping[int, Callable[..., Any]]] = [
            hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        registries = (r for m in modules for r in (m._modules, m._parameters, m._buffers))
        self._registries: list[dict[str, Any]] = [registry for registry in registries if registry]
        self._items = [item for registry in self._registries for item in registry.values()]

    def unchanged(self) -> bool:
        """Whether every submodule, parameter and buffer still is the object that it was."""
        present = chain.from_iterable(map(dict.values, self._registries))
        return all(map(is_, present, self._items))  # in C: this runs for every token

    def hooks(self) -> list[Callable[..., Any]]:
        """The forward hooks of modules that this does not call, global ones included."""
        everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
        if not any(self._hooks) and not any(everywhere):
            return []
        return [hook for hooks in (*self._hooks, *everywhere) for hook in hooks.values()]

    def new_cache(self, batch: int, capacity: int) -> Tensor:
        """Room for keys and values, (2, layers, batch, key heads, capacity, head dimension), with no content."""
        both, layers, kv_heads, head_dim = self.cache_shape
        return torch.empty(both, layers, batch, kv_heads, capacity, head_dim, dtype=self.dtype)

    def __call__(
        self, x: Tensor, cache: Tensor, past: int, rope: Tensor | None, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """As `decoder_layers`, without its checks in Python."""
        w = self.weights
        return call(x, cache, past, self._tensors, w.heads, w.scale, w.activation, w.eps, rope, positions, mask)


def _layer_weights(modules: DecoderLayerModules) -> DecoderLayerWeights:
    return DecoderLayerWeights(
        inputs=tuple(_projection(module) for module in modules.inputs),
        output=_projection(modules.output),
        up=_projection(modules.up),
        down=_projection(modules.down),
        norm1=_norm(modules.norm1),
        norm2=_norm(modules.norm2),
        gate=None if modules.gate is None else _projection(modules.gate),
    )


def _projection(module: nn.Module) -> DecoderProjection:
    if type(module) is SparseLinear and module.activation == "none" and module.input_scale is None:
        return DecoderProjection(module.weight, module.bias)
    if type(module) is nn.Linear and "weight" in module._parameters and module.weight.is_contiguous():
        return DecoderProjection(module.weight, module.bias)
    raise ValueError(f"DecoderStack: expected an nn.Linear or SparseLinear without an activation, got {module}")


def _norm(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"DecoderStack: expected a norm with a weight, got {module}")
    return weight, module._parameters.get("bias")

"""Training with weights rounded to int8, so that converting them afterwards loses nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..prune.layers import mask_of
from ..prune.masked import computed

_SCALE_BITS = ~0x7F  # leaves a float32 scale 17 significant bits, so that its product with an int8 is exact


def round_to_int8(weight: Tensor) -> Tensor:
    """Weights (N, K), each row as multiples -127..127 of its scale, max |w| / 127, like `BlockSparse.quantize`.

    The result has the dtype of `weight`. The scale is cut to 17 bits, less than 2**-16 smaller, so that
    quantizing a float32 result gives it back bit for bit.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    scale = (scale.view(torch.int32) & _SCALE_BITS).view(torch.float32)
    return ((rows / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounds forward; backward as if it did not (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return round_to_int8(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RoundInt8(nn.Module):
    """Parametrization weight -> `round_to_int8(weight)` that comes after a Mask; it has no state of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        return computed(_StraightThrough.apply(weight))


def start_rounding(layers: Iterable[nn.Linear]) -> None:
    """Round the weights of masked layers from now on, until `finalize_`; nothing happens to those that are rounded."""
    for layer in layers:
        if not is_rounded(layer):
            parametrize.register_parametrization(layer, "weight", RoundInt8())


def stop_rounding(layers: Iterable[nn.Linear]) -> None:
    """Take the rounding back; the weights are what they would be without it."""
    for layer in layers:
        if is_rounded(layer):
            del _chain(layer)[-1]


def is_rounded(layer: nn.Linear) -> bool:
    return mask_of(layer) is not None and isinstance(_chain(layer)[-1], RoundInt8)


def _chain(layer: nn.Linear) -> parametrize.ParametrizationList:
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)["weight"])

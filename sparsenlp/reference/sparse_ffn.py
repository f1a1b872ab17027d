"""A feed-forward network of two sparse projections in plain torch: any floating dtype and device."""

from __future__ import annotations

from torch import Tensor

from .add_layer_norm import widen
from .encoder_layer import project


def sparse_ffn(x: Tensor, fc1: list[Tensor], fc2: list[Tensor], activation: str) -> Tensor:
    """fc2(act(fc1(x))), (..., H) -> (..., N); halves are computed in float32."""
    return project(project(widen(x), fc1, activation), fc2).to(x.dtype)

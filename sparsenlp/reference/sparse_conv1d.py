"""sparse_conv1d by torch's convolution with the dense kernel: slow, any dtype and device, differentiable by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..formats.block import to_dense
from .bsr_linear import ACTIVATIONS, quantize_tokens


def sparse_conv1d(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    kernel_size: int,
    stride: int = 1,
    padding: Sequence[int] = (0, 0),
    dilation: int = 1,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    """act(conv(x, W) + b), (B, L, C) -> (B, P, N)."""
    columns, window = kernel_size * x.shape[-1], (stride, padding, dilation)
    if scales is None:
        y = convolve(x, to_dense(crow_indices, col_indices, values, columns), bias, kernel_size, *window)
    else:
        rounded, x_scale = quantize_sequences(x, input_scale)
        weight = to_dense(crow_indices, col_indices, values.double(), columns)
        y = convolve(rounded.double(), weight, None, kernel_size, *window) * (x_scale.double() * scales)
        y = (y if bias is None else y + bias).to(x.dtype)
    return ACTIVATIONS[activation](y)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: Sequence[int],
    dilation: int,
) -> Tensor:
    """conv(x, W) + b: x (B, L, C), weight (N, kernel_size * C) with the inputs of a tap next to each other."""
    kernel = weight.view(weight.shape[0], kernel_size, x.shape[-1]).transpose(1, 2)
    padded = F.pad(x, (0, 0, *padding))
    return F.conv1d(padded.transpose(1, 2), kernel, bias, stride, 0, dilation).transpose(1, 2)


def quantize_sequences(x: Tensor, input_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """As quantize_tokens, with one scale (B, 1, 1) for all of a sequence of x (B, L, C)."""
    rounded, scale = quantize_tokens(x.flatten(1), input_scale)
    return rounded.view(x.shape), scale[..., None]

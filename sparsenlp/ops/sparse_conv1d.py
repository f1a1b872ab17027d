"""Convolution along a sequence with a block-sparse kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..formats import BlockSparse
from ..formats.block import INT8_UNIT
from ..reference import sparse_conv1d as reference
from .bsr_linear import ACTIVATION_BACKWARD, ACTIVATIONS, BACKENDS, NATIVE_DTYPES, check_input_scale
from .devices import on_one_device, register_fake


def sparse_conv1d(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    kernel_size: int,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[b, p] = act(b + sum over taps t of W_t x[b, p stride + t dilation - padding]) for a block-sparse W.

    x            (B, L, C)       any floating dtype; channels last, as an embedding leaves them
    weight       N x (T C)       T = kernel_size; the C inputs of the first tap come first: an nn.Conv1d's weight
                                 (N, C, T) with its last two dimensions swapped. Blocks of n x k, of the dtype of x, or
                                 int8 (see BlockSparse.quantize; C is a multiple of 4 then)
    bias         (N,)            dtype of x
    activation   "none", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    padding      zeros in front of a sequence and behind it, the same number or (front, behind)
    input_scale  int8 only: the scale that rounds x to int8; None finds one for each sequence, max |x| / 127
    backend      "native", "reference", or None: "native" for float32 and bfloat16 on a CPU where the extension is
                 built, else "reference". A named backend runs or raises RuntimeError.
    returns      (B, P, N)       P = (L + paddings - dilation (T - 1) - 1) // stride + 1, dtype of x; sums are kept in
                                 float32, for int8 in int32

    Windows are never copied out of x. int8 rounds as in bsr_linear, but a sequence has one scale, so one value that is
    not finite shows in all its outputs; int8 weights are for inference.
    Under autocast x is cast to the weight's dtype. Indices are checked as in bsr_linear.
    Differentiable in x, the values and the bias; values get gradients at stored blocks only. The backward pass does
    copy the windows, kernel_size times the size of x.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree, a sequence is shorter than the kernel,
    or an argument is out of range, RuntimeError if gradients through int8 are asked for.
    Source: bsr_linear's kernels on overlapping windows.
    """
    front, behind = (padding, padding) if isinstance(padding, int) else padding
    check_window(kernel_size, stride, (front, behind), dilation)
    dtype = weight.values.dtype if weight.scales is None else x.dtype
    if bias is not None and (bias.dtype != dtype or bias.shape != (weight.shape[0],)):
        raise (TypeError if bias.dtype != dtype else ValueError)(
            f"sparse_conv1d: expected bias of shape ({weight.shape[0]},) and dtype {dtype}, "
            f"got {tuple(bias.shape)} and {bias.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"sparse_conv1d: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    if input_scale is not None:
        check_input_scale(input_scale, weight.scales, "sparse_conv1d")
    return call(
        x,
        weight.crow_indices,
        weight.col_indices,
        weight.values,
        weight.shape[1],
        bias,
        activation,
        kernel_size,
        stride,
        (front, behind),
        dilation,
        weight.scales,
        input_scale,
        backend,
    )


def call(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    columns: int,
    bias: Tensor | None,
    activation: str,
    kernel_size: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    scales: Tensor | None = None,
    input_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """sparse_conv1d on bare tensors, for the layer: it checks x, and trusts what the layer checked when it was made."""
    if x.dtype != values.dtype and scales is None:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"sparse_conv1d: expected x of dtype {values.dtype}, got {x.dtype}")
        x = x.to(values.dtype)
    _check_x(x, values, columns, kernel_size, padding, dilation)
    if scales is not None and x.shape[2] % INT8_UNIT:
        raise ValueError(f"sparse_conv1d: expected channels in multiples of {INT8_UNIT} with int8, got {x.shape[2]}")
    window = (kernel_size, stride, padding, dilation)
    scale = input_scale or 0.0
    arguments = (x, crow_indices, col_indices, values, bias, activation, *window, scales, scale)
    if choose_backend(x, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(*arguments)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        if scales is not None and x.requires_grad:
            raise RuntimeError("sparse_conv1d: expected no gradients with int8 weights, got an x that requires them")
        return _op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd
        return _op(*arguments)


def check_window(kernel_size: int, stride: int, padding: tuple[int, int], dilation: int) -> None:
    """Raise ValueError unless all are in range."""
    for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("dilation", dilation, 1)):
        if value < least:
            raise ValueError(f"sparse_conv1d: expected a {name} of at least {least}, got {value}")
    if min(padding) < 0:
        raise ValueError(f"sparse_conv1d: expected paddings of at least 0, got {padding}")


def _check_x(
    x: Tensor, values: Tensor, columns: int, kernel_size: int, padding: tuple[int, int], dilation: int
) -> None:
    if x.dim() != 3 or x.shape[2] * kernel_size != columns:
        raise ValueError(
            f"sparse_conv1d: expected x (B, L, C) with C = {columns} / {kernel_size} channels, got {tuple(x.shape)}"
        )
    if x.device != values.device:
        raise ValueError(f"sparse_conv1d: expected x on {values.device}, got {x.device}")
    needed = dilation * (kernel_size - 1) + 1 - sum(padding)
    if x.shape[1] < max(needed, 1):
        raise ValueError(f"sparse_conv1d: expected sequences of at least {max(needed, 1)} positions, got {x.shape[1]}")


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot."""
    runs = x.is_cpu and x.dtype in NATIVE_DTYPES
    if backend is None:
        return "native" if native.available and runs else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"sparse_conv1d: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native" and not native.available:
        raise RuntimeError(f"sparse_conv1d: backend 'native' cannot run: {native.why_unavailable}")
    if backend == "native" and not runs:
        raise RuntimeError(
            "sparse_conv1d: backend 'native' cannot run: expected float32 or bfloat16 on cpu, "
            f"got {x.dtype} on {x.device}"
        )
    return backend


torch.library.define(
    "sparsenlp::sparse_conv1d",
    "(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, str activation, int kernel_size, "
    "int stride=1, int[] padding=[0, 0], int dilation=1, Tensor? scales=None, float input_scale=0.0) -> Tensor",
)
_op = torch.ops.sparsenlp.sparse_conv1d.default
_dgrad_op = torch.ops.sparsenlp.bsr_linear_dgrad.default
_wgrad_op = torch.ops.sparsenlp.bsr_linear_wgrad.default
_reference = on_one_device("sparse_conv1d", reference.sparse_conv1d)

if not native.available:
    torch.library.impl("sparsenlp::sparse_conv1d", "cpu", reference.sparse_conv1d)


@register_fake("sparse_conv1d")
def _fake(
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
    positions = (x.shape[1] + sum(padding) - dilation * (kernel_size - 1) - 1) // stride + 1
    return x.new_empty(x.shape[0], positions, (crow_indices.shape[0] - 1) * values.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.scales, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, crow, col, values, bias = ctx.saved_tensors
    if ctx.scales is not None:
        raise RuntimeError("sparse_conv1d: expected no gradients with int8 weights")
    window = (ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation)
    if ctx.activation != "none":
        grad = ACTIVATION_BACKWARD[ctx.activation](grad, _op(x, crow, col, values, bias, "none", *window))
    grad_x = grad_values = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    if ctx.needs_input_grad[0]:
        of_windows = _dgrad_op(rows, crow, col, values, ctx.kernel_size * x.shape[-1])
        grad_x = add_windows(of_windows.view(*grad.shape[:2], -1), x.shape[1], *window)
    if ctx.needs_input_grad[3]:
        inputs = windows(x, *window).reshape(rows.shape[0], -1)
        grad_values = _wgrad_op(rows, inputs, crow, col, list(values.shape[1:])).to(values.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    return grad_x, None, None, grad_values, grad_bias, *[None] * 7


def windows(x: Tensor, kernel_size: int, stride: int, padding: Sequence[int], dilation: int) -> Tensor:
    """What each output reads: x (B, L, C) -> a view (B, P, kernel_size, C) of the padded x."""
    span = dilation * (kernel_size - 1) + 1
    return F.pad(x, (0, 0, *padding)).unfold(1, span, stride)[..., ::dilation].transpose(2, 3)


def add_windows(
    grad: Tensor, length: int, kernel_size: int, stride: int, padding: Sequence[int], dilation: int
) -> Tensor:
    """The transpose of `windows`: (B, P, kernel_size C) -> (B, length, C), what overlaps added up in float32."""
    batch, positions, columns = grad.shape
    taps = grad.view(batch, positions, kernel_size, columns // kernel_size)
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(batch, length + sum(padding), taps.shape[-1], dtype=wide)
    for tap in range(kernel_size):
        first = tap * dilation
        total[:, first : first + (positions - 1) * stride + 1 : stride] += taps[:, :, tap]
    return total[:, padding[0] : padding[0] + length].to(grad.dtype)


torch.library.register_autograd("sparsenlp::sparse_conv1d", _backward, setup_context=_setup_context)

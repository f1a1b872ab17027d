"""Residual addition and LayerNorm in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..reference import add_layer_norm as reference
from .bsr_linear import BACKENDS, NATIVE_DTYPES
from .devices import on_one_device, register_fake


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """y = LayerNorm(x + residual) * weight + bias over the last dimension.

    x, residual   (..., H)   any floating dtype, both the same; no residual counts as zeros
    weight, bias  (H,)       dtype of x; no bias counts as zeros
    eps           added to the variance
    backend       None chooses: "native" for float32 and bfloat16 x on a CPU where the extension is built,
                  else "reference". A named backend runs or raises RuntimeError.
    returns       (..., H)   dtype of x; the sum and the statistics are kept in float32 (float64 for float64)

    The variance is that of the deviations from the mean, so large offsets cost no accuracy.
    Under autocast x and residual are cast to the weight's dtype, and the result has that dtype.
    Differentiable in x, residual, weight and bias.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if x.dtype != weight.dtype and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
        residual = residual.to(weight.dtype) if residual is not None else None
    shape = x.shape
    if not shape or not x.dtype.is_floating_point:
        raise ValueError(f"add_layer_norm: expected a floating x (..., H), got {x.dtype} of shape {tuple(shape)}")
    if residual is not None:
        check_like("add_layer_norm", "residual", residual, shape, x)
    check_norm("add_layer_norm", weight, bias, shape[-1], x)
    if choose_backend("add_layer_norm", x, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, residual, weight, bias, eps)
    return call(x, residual, weight, bias, eps)


def call(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """add_layer_norm on CPU tensors of a native dtype, for layers: the op itself checks shapes and dtypes."""
    return call_op(_op, x, residual, weight, bias, eps)


def call_op(op: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """op(*arguments); without gradients, past the Python of register_autograd, which takes 5 to 10 us a call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def check_norm(op: str, weight: Tensor, bias: Tensor | None, hidden: int, like: Tensor) -> None:
    """Raise unless weight and bias are (hidden,), of the dtype and device of `like`."""
    check_like(op, "weight", weight, (hidden,), like)
    if bias is not None:
        check_like(op, "bias", bias, (hidden,), like)


def check_like(op: str, name: str, t: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise unless `t` has this shape, and the dtype and device of `like`."""
    if t.dtype != like.dtype:
        raise TypeError(f"{op}: expected {name} of dtype {like.dtype}, got {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{op}: expected {name} on {like.device}, got {t.device}")


def choose_backend(op: str, x: Tensor, backend: str | None) -> str:
    """The backend that will run for values like x, or RuntimeError if the one asked for cannot."""
    runs = x.dtype in NATIVE_DTYPES and x.is_cpu
    if backend is None:
        return "native" if native.available and runs else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native":
        if not native.available:
            raise RuntimeError(f"{op}: backend 'native' cannot run: {native.why_unavailable}")
        if not runs:
            raise RuntimeError(
                f"{op}: backend 'native' cannot run: expected float32 or bfloat16 on cpu, got {x.dtype} on {x.device}"
            )
    return backend


# The torch.library op. It exists without the extension too (then it runs the reference), so that exported
# programs load everywhere.
torch.library.define(
    "sparsenlp::add_layer_norm", "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps) -> Tensor"
)
_op = torch.ops.sparsenlp.add_layer_norm.default
_reference = on_one_device("add_layer_norm", reference.add_layer_norm)
if not native.available:
    torch.library.impl("sparsenlp::add_layer_norm", "cpu", reference.add_layer_norm)


@register_fake("add_layer_norm")
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, residual, weight, bias = ctx.saved_tensors
    total = reference.widen(x) if residual is None else reference.widen(x) + reference.widen(residual)
    grad_total, grad_weight, grad_bias = reference.normalize_backward(grad, total, weight, bias, ctx.eps)
    grad_x = grad_total.to(x.dtype)
    return grad_x, grad_x if residual is not None else None, grad_weight, grad_bias, None


torch.library.register_autograd("sparsenlp::add_layer_norm", _backward, setup_context=_setup_context)

"""Linear layer with a block-sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats import BlockSparse
from ..formats.block import pack_values, transpose
from ..reference import bsr_linear as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
BACKENDS = ("native", "reference")


def bsr_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b) for a block-sparse W.

    x           (..., K)     any floating dtype
    weight      N x K        blocks of n x k, same dtype as x
    bias        (N,)         same dtype as x
    activation  "none", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    backend     None chooses: "native" for float32 on a CPU where the extension is built, else
                "reference". A named backend runs or raises RuntimeError.
    returns     (..., N)     dtype of x

    Under autocast x is cast to the weight's dtype, and the result has that dtype.
    Indices are trusted here: they were checked when the weight was built or loaded.
    Differentiable in x, the values and the bias; values get gradients at stored blocks only.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree or the activation is unknown.
    Source: BCSR; kernels after Elsen et al. 2020, arXiv:1911.09723.
    """
    rows = weight.shape[0]
    if bias is not None:
        if bias.dtype != weight.values.dtype:
            raise TypeError(f"bsr_linear: expected bias of dtype {weight.values.dtype}, got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"bsr_linear: expected bias of shape ({rows},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"bsr_linear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
    tensors = (weight.crow_indices, weight.col_indices, weight.values)
    return call(x, *tensors, weight.shape[1], bias, activation, backend)


def call(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    columns: int,
    bias: Tensor | None,
    activation: str,
    backend: str | None = None,
) -> Tensor:
    """bsr_linear on bare tensors, for layers: it checks x, and trusts what the layer checked when it was made."""
    if x.dtype != values.dtype:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"bsr_linear: expected x of dtype {values.dtype}, got {x.dtype}")
        x = x.to(values.dtype)
    if not x.dim() or x.shape[-1] != columns:
        raise ValueError(f"bsr_linear: expected K = {columns} columns in x, got shape {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"bsr_linear: expected x on {values.device}, got {x.device}")
    if _choose(x, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return reference.bsr_linear(x, crow_indices, col_indices, values, bias, activation)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _op(x, crow_indices, col_indices, values, bias, activation)
    with torch._C._AutoDispatchBelowAutograd():  # skips the Python of register_autograd: 5 to 10 us a call
        return _op(x, crow_indices, col_indices, values, bias, activation)


def _choose(x: Tensor, backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot."""
    if backend is None:
        return "native" if native.available and x.dtype == torch.float32 and x.is_cpu else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"bsr_linear: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native":
        if not native.available:
            raise RuntimeError(f"bsr_linear: backend 'native' cannot run: {native.why_unavailable}")
        if not x.is_cpu or x.dtype != torch.float32:
            raise RuntimeError(
                f"bsr_linear: backend 'native' cannot run: expected float32 on cpu, got {x.dtype} on {x.device}"
            )
    return backend


# The torch.library op. It exists without the extension too (then it runs the reference), so that
# exported programs load everywhere.
torch.library.define(
    "sparsenlp::bsr_linear",
    "(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, str activation) -> Tensor",
)
torch.library.define(
    "sparsenlp::bsr_linear_wgrad",
    "(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] block) -> Tensor",
)
_op = torch.ops.sparsenlp.bsr_linear.default
_wgrad_op = torch.ops.sparsenlp.bsr_linear_wgrad.default
if not native.available:
    torch.library.impl("sparsenlp::bsr_linear", "cpu", reference.bsr_linear)
    torch.library.impl("sparsenlp::bsr_linear_wgrad", "cpu", reference.bsr_linear_wgrad)


@torch.library.register_fake("sparsenlp::bsr_linear")
def _fake(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], (crow_indices.shape[0] - 1) * values.shape[1])


@torch.library.register_fake("sparsenlp::bsr_linear_wgrad")
def _fake_wgrad(grad: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: list[int]) -> Tensor:
    n, k = block
    return x.new_empty(col_indices.shape[0], k, n).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, crow, col, values, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = _op(x, crow, col, values, bias, "none")
        grad = _ACTIVATION_BACKWARD[ctx.activation](grad, before)
    grad_x = grad_values = grad_bias = None
    grad_rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    if ctx.needs_input_grad[0]:
        crow_t, col_t, values_t = transpose(crow, col, values, x.shape[-1])
        grad_x = _op(grad_rows, crow_t, col_t, pack_values(values_t), None, "none").reshape(x.shape)
    if ctx.needs_input_grad[3]:
        x_rows = x.reshape(-1, x.shape[-1]).contiguous()
        block = list(values.shape[1:])
        grad_values = _wgrad_op(grad_rows, x_rows, crow, col, block)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_rows.sum(0)
    return grad_x, None, None, grad_values, grad_bias, None


_ACTIVATION_BACKWARD = {
    "relu": lambda grad, before: grad * (before > 0),
    "gelu": lambda grad, before: torch.ops.aten.gelu_backward(grad, before, approximate="none"),
    "gelu_tanh": lambda grad, before: torch.ops.aten.gelu_backward(grad, before, approximate="tanh"),
}

torch.library.register_autograd("sparsenlp::bsr_linear", _backward, setup_context=_setup_context)

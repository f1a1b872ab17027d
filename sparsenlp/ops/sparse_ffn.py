"""The feed-forward network of a transformer layer, with sparse weights, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats.encoder import SparseProjection
from ..reference import sparse_ffn as reference
from .add_layer_norm import choose_backend
from .bsr_linear import ACTIVATIONS
from .devices import on_one_device, register_fake
from .encoder_layer import WEIGHT_DTYPES, check_projection


def sparse_ffn(
    x: Tensor, fc1: SparseProjection, fc2: SparseProjection, activation: str = "gelu", backend: str | None = None
) -> Tensor:
    """y = fc2(act(fc1(x))). For inference.

    x           (..., H)  any floating dtype
    fc1, fc2    F x H and N x F, both of float32, bfloat16 or int8 (see BlockSparse.quantize); biases of float32
    activation  "none", "relu", "gelu" (exact, by erf) or "gelu_tanh"
    backend     None chooses: "native" for float32 and bfloat16 x on a CPU where the extension is built, else
                "reference". A named backend runs or raises RuntimeError.
    returns     (..., N)  dtype of x; sums are kept in float32, for int8 in int32

    The F hidden features of 16 or 32 tokens at a time stay in cache: nothing of size F is written to memory. It is made
    for 16 tokens and more; fewer take as long as 16, and two `bsr_linear` are faster then.
    bfloat16 weights round x and the hidden features to bfloat16 if x is, and int8 weights to int8 with a scale for
    each token. Indices are checked as in bsr_linear.

    Raises TypeError if dtypes differ, ValueError if shapes or devices disagree or the activation is unknown,
    RuntimeError if a gradient is asked for.
    """
    _check(x, fc1, fc2, activation)
    return call(x, fc1.tensors(), fc2.tensors(), activation, backend)


def call(x: Tensor, fc1: list[Tensor], fc2: list[Tensor], activation: str, backend: str | None = None) -> Tensor:
    """sparse_ffn on bare tensors, for layers: it trusts the weights, which were checked when they were gathered."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *fc1, *fc2)):
        raise RuntimeError("sparse_ffn: expected torch.no_grad() or tensors without gradients; it is for inference")
    if choose_backend("sparse_ffn", x, backend) == "reference":
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _reference(x, fc1, fc2, activation)
    return _op(x, fc1, fc2, activation)


def _check(x: Tensor, fc1: SparseProjection, fc2: SparseProjection, activation: str) -> None:
    op, values = "sparse_ffn", fc1.weight.values
    neurons, hidden = fc1.weight.shape
    if not x.dim() or x.shape[-1] != hidden or not x.is_floating_point():
        raise ValueError(f"{op}: expected a floating x (..., {hidden}), got {x.dtype} of shape {tuple(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"{op}: expected x on {values.device}, got {x.device}")
    if values.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{op}: expected weights of dtype float32, bfloat16 or int8, got {values.dtype}")
    check_projection(op, "fc1", fc1, fc1.weight.shape, values.dtype, values.device)
    check_projection(op, "fc2", fc2, (fc2.weight.shape[0], neurons), values.dtype, values.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")


# The torch.library op. It exists without the extension too (then it runs the reference), so that exported
# programs load everywhere.
torch.library.define("sparsenlp::sparse_ffn", "(Tensor x, Tensor[] fc1, Tensor[] fc2, str activation) -> Tensor")
_op = torch.ops.sparsenlp.sparse_ffn.default
_reference = on_one_device("sparse_ffn", reference.sparse_ffn)
if not native.available:
    torch.library.impl("sparsenlp::sparse_ffn", "cpu", reference.sparse_ffn)


@register_fake("sparse_ffn")
def _fake(x: Tensor, fc1: list[Tensor], fc2: list[Tensor], *_: Any) -> Tensor:
    crow_indices, values = fc2[0], fc2[2]
    return x.new_empty(*x.shape[:-1], (crow_indices.shape[0] - 1) * values.shape[1])

"""A stack of transformer decoder layers with sparse projections and a cache of keys and values, in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats import BlockSparse
from ..formats.decoder import DecoderProjection, DecoderTensors, DecoderWeights
from ..reference import decoder_layers as reference
from .devices import on_one_device, register_fake

ACTIVATIONS = tuple(reference.ACTIVATIONS)
BACKENDS = ("native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def decoder_layers(
    x: Tensor,
    cache: Tensor,
    past: int,
    weights: DecoderWeights,
    rope: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The next T tokens of B sequences through all layers and the last norm; made for small B * T, right for any.

    x          (B, T, H)   float32 or bfloat16 natively, any floating dtype by the reference
    cache      (2, layers, B, key heads, capacity, head dimension), contiguous, dtype of x: keys (after rotation)
               and values of the tokens before, at [..., :past, :]; those of x are written after them
    past       tokens that the cache holds; past + T <= capacity
    rope       (positions, head dimension) float32, a position's cosines and then its sines, half the head
               dimension each; query and key are rotated as in Llama, pairing the halves of a head. None: not at all
    positions  (B, T) int64, rows of `rope`
    mask       (B, past + T) bool, True = a token that may be attended to, besides the causal mask; None = all. A
               query that may attend to nothing gets zeros from attention
    backend    None chooses: "native" for float32 and bfloat16 on a CPU where the extension is built, else
               "reference". A named backend runs or raises RuntimeError.
    returns    (B, T, H)   dtype of x

    The native kernels keep the residual stream, the scores and all sums in float32. Not differentiable.

    Raises TypeError if dtypes differ, ValueError if shapes disagree or the activation is unknown, RuntimeError if
    gradients are asked for.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Shazeer 2020, arXiv:2002.05202 (gate); Su et al. 2021,
    arXiv:2104.09864 (rotation); Ainslie et al. 2023, arXiv:2305.13245 (shared key heads).
    """
    _check(x, cache, past, weights, rope, positions, mask)
    settings = (weights.heads, weights.scale, weights.activation, weights.eps)
    return call(x, cache, past, weights.lists(), *settings, rope, positions, mask, backend)


def call(
    x: Tensor,
    cache: Tensor,
    past: int,
    tensors: DecoderTensors,
    heads: int,
    scale: float,
    activation: str,
    eps: float,
    rope: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """decoder_layers on lists of tensors that were checked before; the native op checks what keeps memory safe."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("decoder_layers: expected no gradients to be needed, got an x that requires them")
    arguments = (x, cache, past, *tensors, heads, scale, activation, eps, rope, positions, mask)
    if _choose(x, backend) == "reference":
        return _reference(*arguments)
    if torch.compiler.is_compiling():
        return _op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*arguments)


def _check(
    x: Tensor,
    cache: Tensor,
    past: int,
    weights: DecoderWeights,
    rope: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"decoder_layers: expected x of shape (B, T, H), got {tuple(x.shape)}")
    batch, length, hidden = x.shape
    if cache.dim() != 6 or not cache.is_contiguous():
        raise ValueError(
            "decoder_layers: expected a contiguous cache (2, layers, B, key heads, capacity, head dimension), "
            f"got shape {tuple(cache.shape)}"
        )
    both, layers, sequences, kv_heads, capacity, head_dim = cache.shape
    if (both, layers, sequences) != (2, len(weights.layers), batch):
        raise ValueError(
            f"decoder_layers: expected a cache of (2, {len(weights.layers)}, {batch}, ...), got {tuple(cache.shape)}"
        )
    if cache.dtype != x.dtype:
        raise TypeError(f"decoder_layers: expected a cache of dtype {x.dtype}, got {cache.dtype}")
    if past < 0 or past + length > capacity:
        raise ValueError(
            f"decoder_layers: expected room for {past} past and {length} new tokens in the cache, got {capacity}"
        )
    if not kv_heads or weights.heads % kv_heads:
        raise ValueError(f"decoder_layers: expected heads as a multiple of {kv_heads}, got {weights.heads}")
    if weights.activation not in ACTIVATIONS:
        raise ValueError(
            f"decoder_layers: expected an activation among {', '.join(ACTIVATIONS)}, got {weights.activation!r}"
        )
    if rope is not None:
        if rope.dtype != torch.float32 or rope.dim() != 2 or rope.shape[1] != head_dim or head_dim % 2:
            raise ValueError(
                f"decoder_layers: expected float32 rope (positions, {head_dim}) for an even head dimension, "
                f"got {rope.dtype} {tuple(rope.shape)}"
            )
        if positions is None or positions.shape != (batch, length) or positions.dtype != torch.int64:
            got = "None" if positions is None else f"{positions.dtype} {tuple(positions.shape)}"
            raise ValueError(f"decoder_layers: expected int64 positions of shape {(batch, length)}, got {got}")
        known = positions.numel() and not positions.is_meta and not torch.compiler.is_compiling()
        if known and not 0 <= int(positions.min()) <= int(positions.max()) < rope.shape[0]:
            raise ValueError(f"decoder_layers: expected positions in [0, {rope.shape[0]})")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, past + length)):
        raise ValueError(
            f"decoder_layers: expected a bool mask of shape {(batch, past + length)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    check_weights(weights, hidden, head_dim, kv_heads, x.dtype)


def check_weights(weights: DecoderWeights, hidden: int, head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    query, key = weights.heads * head_dim, kv_heads * head_dim
    norms = [weights.norm]
    for at, layer in enumerate(weights.layers):
        if len(layer.inputs) not in (1, 3):
            raise ValueError(f"decoder_layers: expected 1 or 3 inputs in layer {at}, got {len(layer.inputs)}")
        rows = (query, key, key) if len(layer.inputs) == 3 else (query + 2 * key,)
        inner = layer.up.weight.shape[0]
        expected = [*((n, hidden) for n in rows), (hidden, query)]
        expected += [(inner, hidden)] * (1 if layer.gate is None else 2) + [(hidden, inner)]
        for projection, shape in zip(layer.projections, expected, strict=True):
            _check_projection(projection, shape, f"layer {at}", dtype)
        if (len(layer.inputs), layer.gate is None) != (len(weights.layers[0].inputs), weights.layers[0].gate is None):
            raise ValueError(f"decoder_layers: expected layer {at} to have the projections of layer 0")
        norms += [layer.norm1, layer.norm2]
    for weight, bias in norms:
        if (bias is None) != (weights.norm[1] is None):
            raise ValueError("decoder_layers: expected norms that all have a bias, or none")
        for vector in (weight, bias):
            if vector is not None and (vector.shape != (hidden,) or vector.dtype != dtype):
                raise ValueError(
                    f"decoder_layers: expected norms of shape ({hidden},) and dtype {dtype}, "
                    f"got {tuple(vector.shape)} and {vector.dtype}"
                )


def _check_projection(projection: DecoderProjection, shape: tuple[int, int], where: str, dtype: torch.dtype) -> None:
    weight, bias = projection.weight, projection.bias
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"decoder_layers: expected a {shape[0]} x {shape[1]} weight in {where}, got {tuple(weight.shape)}"
        )
    values = weight.values if isinstance(weight, BlockSparse) else weight
    int8 = isinstance(weight, BlockSparse) and weight.scales is not None
    if values.dtype != dtype and not int8:
        raise TypeError(f"decoder_layers: expected weights of dtype {dtype} or int8 in {where}, got {values.dtype}")
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != dtype):
        raise ValueError(
            f"decoder_layers: expected a bias of shape ({shape[0]},) and dtype {dtype} in {where}, "
            f"got {tuple(bias.shape)} and {bias.dtype}"
        )


def _choose(x: Tensor, backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot."""
    runs = x.dtype in NATIVE_DTYPES and x.is_cpu
    if backend is None:
        return "native" if native.available and runs else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"decoder_layers: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native":
        if not native.available:
            raise RuntimeError(f"decoder_layers: backend 'native' cannot run: {native.why_unavailable}")
        if not runs:
            raise RuntimeError(
                f"decoder_layers: backend 'native' cannot run: expected float32 or bfloat16 on cpu, "
                f"got {x.dtype} on {x.device}"
            )
    return backend


torch.library.define(
    "sparsenlp::decoder_layers",
    "(Tensor x, Tensor(a!) cache, int past, Tensor[] crow_indices, Tensor[] col_indices, Tensor[] values, "
    "Tensor[] biases, Tensor[] scales, Tensor[] norm_weights, Tensor[] norm_biases, int heads, float scale, "
    "str activation, float eps, Tensor? rope=None, Tensor? positions=None, Tensor? mask=None) -> Tensor",
)
_op = torch.ops.sparsenlp.decoder_layers.default
_reference = on_one_device("decoder_layers", reference.decoder_layers)

if not native.available:
    torch.library.impl("sparsenlp::decoder_layers", "cpu", reference.decoder_layers)


@register_fake("decoder_layers")
def _fake(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

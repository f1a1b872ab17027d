"""A transformer encoder layer as one op, on a residual stream of packed tokens.

The stream has shape (tiles, H, T), float32: the tokens of all sequences stand one after the other without padding, T of
them to a tile, features first. Only the last used tile may be part full, and tiles after it are unused: there
are always enough for every token of the batch, so that no shape depends on the mask. `spans` (4, tiles * T), int32,
says for each packed token which row b * S + s of the input it is (-1: none, an unused lane), the first and
one-past-last packed index of what it attends to, which are the real tokens of its sequence, and its position s.

The first token of a sequence is packed even if it is padding, unless all of its sequence is: poolers and heads read
it. It attends to the real tokens, and none attends to it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats.encoder import EncoderWeights, SparseProjection
from ..reference import encoder_layer as reference
from .bsr_linear import ACTIVATIONS, BACKENDS
from .devices import on_one_device, register_fake

TILES = (16, 32)
PRECISIONS = ("float32", "bfloat16")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def encoder_pack(
    x: Tensor, mask: Tensor | None = None, tile: int = 16, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Drop the padding of a batch.

    x        (B, S, H)             float32 or bfloat16
    mask     (B, S)                bool, True for a real token; None: all are
    tile     T, tokens in a tile: 16 or 32
    returns  stream (tiles, H, T)  float32, zeros in unused lanes; tiles = ceil(B * S / T)
             spans (4, tiles * T)  int32; unused lanes have the span and position of the last token

    Raises TypeError or ValueError if dtypes, shapes, devices or T are others.
    """
    if x.dim() != 3:
        raise ValueError(f"encoder_pack: expected x of shape (B, S, H), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"encoder_pack: expected x of dtype float32 or bfloat16, got {x.dtype}")
    if tile not in TILES:
        raise ValueError(f"encoder_pack: expected tiles of 16 or 32 tokens, got {tile}")
    if mask is not None:
        check_mask(mask, x)
    if _choose("encoder_pack", x, backend) == "reference":
        return _reference_pack(x, mask, tile)
    return _pack_op(x, mask, tile)


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise TypeError or ValueError unless `mask` is a bool for each token of x (B, S, H)."""
    if mask.dtype != torch.bool:
        raise TypeError(f"encoder_pack: expected a mask of dtype torch.bool, got {mask.dtype}")
    if mask.shape != x.shape[:2] or mask.device != x.device:
        raise ValueError(
            f"encoder_pack: expected a mask of shape {tuple(x.shape[:2])} on {x.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def padding_keys(mask: Tensor) -> Tensor:
    """The keys that a mask of attention leaves, (B or 1, S) bool, where all it does is to hide padding.

    mask  (B or 1, S) or (B or 1, heads or 1, queries or 1, S): bool, or numbers to add to scores

    Raises RuntimeError for a mask that hides other keys from one query or head than from another, or has other numbers
    than 0 and the least of its dtype or below. It is an op, so that a compiled or exported graph looks too.
    """
    return _keys_op(mask)


def hides_the_same_keys(mask: Tensor) -> bool:
    """Whether `padding_keys` can read this mask."""
    row = mask[:, 0, 0] if mask.dim() == 4 else mask
    if mask.dim() == 4 and not bool((mask == row[:, None, None]).all()):
        return False
    return mask.dtype == torch.bool or bool(((row == 0) | (row <= torch.finfo(mask.dtype).min)).all())


def _padding_keys(mask: Tensor) -> Tensor:
    if not hides_the_same_keys(mask):
        raise RuntimeError(
            "encoder: expected a mask that hides the same padding from all queries and heads, which is all that fused "
            f"layers know, got another mask {tuple(mask.shape)} in a compiled or exported graph; call the model "
            "uncompiled, where such a mask runs the original layers, or unfuse_encoders_ it before it is traced"
        )
    row = mask[:, 0, 0] if mask.dim() == 4 else mask
    return row.clone() if mask.dtype == torch.bool else row == 0


def encoder_unpack(
    stream: Tensor,
    spans: Tensor,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """(B, S, H) in float32 or bfloat16 again, with zeros where nothing was packed.

    Raises TypeError or ValueError if stream and spans are not what `encoder_pack` gives for (B, S).
    """
    _check_stream("encoder_unpack", stream, spans)
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"encoder_unpack: expected dtype float32 or bfloat16, got {dtype}")
    tiles, _, tile = stream.shape
    wanted = (batch * length + tile - 1) // tile
    if tiles != wanted:
        raise ValueError(
            f"encoder_unpack: expected {wanted} tiles of {tile} tokens for a batch of {batch} x {length}, got {tiles}"
        )
    if _choose("encoder_unpack", stream, backend) == "reference":
        return _reference_unpack(stream, spans, batch, length, dtype)
    return _unpack_op(stream, spans, batch, length, dtype)


def encoder_layer(
    stream: Tensor,
    spans: Tensor,
    weights: EncoderWeights,
    position_bias: Tensor | None = None,
    precision: str = "float32",
    backend: str | None = None,
) -> Tensor:
    """Self-attention and feed-forward network of one layer, on what `encoder_pack` gives. For inference.

    post-norm: x1 = LN1(x + O attention(Q x, K x, V x)), y = LN2(x1 + fc2 act(fc1 x1))
    pre-norm:  x1 = x + O attention(Q LN1 x, ...),       y = x1 + fc2 act(fc1 LN2 x1)

    stream         (tiles, H, T)      float32
    spans          (4, tiles * T)     int32
    weights        one dtype for all six projections: float32, bfloat16 or int8; an activation of `bsr_linear`
    position_bias  (heads, S, S)      float32, added to the scaled scores of [head, query, key], by position in
                                      the sequence; S more than any position
    precision      of attention and of activations on their way: "float32", or "bfloat16" for bfloat16 and int8 weights
    backend        None chooses: "native" on a CPU where the extension has it, else "reference"
    returns        (tiles, H, T)      float32; unused lanes hold numbers without a meaning

    int8 weights round the input of each projection to int8 with a scale for each token, as `bsr_linear` does.

    Raises TypeError if dtypes disagree, ValueError if shapes do or an option is unknown, RuntimeError if a
    gradient is asked for or a named backend cannot run.
    """
    check_weights(weights)
    return call(stream, spans, arguments(weights), position_bias, precision, backend)


def arguments(weights: EncoderWeights, row_sums: bool = False) -> tuple[Any, ...]:
    """The weights as the op takes them, for layers to keep; `row_sums` adds what it would add up at each call."""
    projections = (weights.query, weights.key, weights.value, weights.output, weights.fc1, weights.fc2)
    return (
        *(projection.tensors(row_sums) for projection in projections),
        [*weights.norm1, *weights.norm2],
        list(weights.query_rows),
        list(weights.value_rows),
        weights.scale,
        weights.activation,
        weights.eps,
        weights.pre_norm,
    )


def call(
    stream: Tensor,
    spans: Tensor,
    arguments: tuple[Any, ...],
    position_bias: Tensor | None = None,
    precision: str = "float32",
    backend: str | None = None,
) -> Tensor:
    """encoder_layer on bare tensors, for layers: it trusts the weights, which were checked when they were gathered."""
    _check_stream("encoder_layer", stream, spans)
    query, norms, query_rows = arguments[0], arguments[6], arguments[7]
    if stream.shape[1] != norms[0].shape[0]:
        raise ValueError(f"encoder_layer: expected a stream of H = {norms[0].shape[0]}, got {tuple(stream.shape)}")
    if stream.device != norms[0].device:
        raise ValueError(f"encoder_layer: expected a stream on {norms[0].device}, got {stream.device}")
    if precision not in PRECISIONS:
        raise ValueError(f"encoder_layer: expected a precision among {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "bfloat16" and query[2].dtype == torch.float32:
        raise ValueError("encoder_layer: expected bfloat16 or int8 weights for precision 'bfloat16', got float32")
    if position_bias is not None:
        _check_position_bias(position_bias, len(query_rows) - 1, stream)
    if torch.is_grad_enabled() and (stream.requires_grad or norms[0].requires_grad or query[2].requires_grad):
        raise RuntimeError("encoder_layer: expected torch.no_grad() or tensors without gradients; it is for inference")
    inputs: tuple[Any, ...] = (stream, spans, *arguments, position_bias, precision)
    if _choose("encoder_layer", stream, backend) == "reference":
        return _reference_layer(*inputs)
    return _layer_op(*inputs)


def check_weights(weights: EncoderWeights) -> None:
    """Raise TypeError or ValueError unless the weights fit together. Indices are left to the op."""
    if weights.activation not in ACTIVATIONS:
        raise ValueError(
            f"encoder_layer: expected an activation among {', '.join(ACTIVATIONS)}, got {weights.activation!r}"
        )
    for name, rows in (("query_rows", weights.query_rows), ("value_rows", weights.value_rows)):
        decreases = any(after < before for before, after in pairwise(rows))
        if len(rows) != len(weights.query_rows) or not rows or rows[0] != 0 or decreases:
            raise ValueError(
                f"encoder_layer: expected {name} as heads + 1 offsets from 0 that do not decrease, got {rows}"
            )
    hidden, neurons = weights.hidden_size, weights.fc1.weight.shape[0]
    shapes = {
        "query": (weights.query_rows[-1], hidden),
        "key": (weights.query_rows[-1], hidden),
        "value": (weights.value_rows[-1], hidden),
        "output": (hidden, weights.value_rows[-1]),
        "fc1": (neurons, hidden),
        "fc2": (hidden, neurons),
    }
    dtype, device = weights.query.weight.values.dtype, weights.query.weight.values.device
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"encoder_layer: expected weights of dtype float32, bfloat16 or int8, got {dtype}")
    for name, shape in shapes.items():
        check_projection("encoder_layer", name, getattr(weights, name), shape, dtype, device)
    for name, norm in (("norm1", weights.norm1), ("norm2", weights.norm2)):
        for vector in norm:
            _check_vector("encoder_layer", name, vector, hidden, device)


def check_projection(
    op: str, name: str, projection: SparseProjection, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise TypeError or ValueError unless the weight has this shape, dtype and device, and the bias fits it."""
    weight = projection.weight
    if weight.shape != shape:
        raise ValueError(f"{op}: expected {name} of shape {shape}, got {weight.shape}")
    if weight.values.dtype != dtype:
        raise TypeError(f"{op}: expected {name} of dtype {dtype}, got {weight.values.dtype}")
    if weight.values.device != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {weight.values.device}")
    _check_vector(op, f"bias of {name}", projection.bias, shape[0], device)


def _check_vector(op: str, name: str, vector: Tensor, size: int, device: torch.device) -> None:
    if vector.dtype != torch.float32 or vector.shape != (size,) or vector.device != device:
        raise ValueError(
            f"{op}: expected {name} of shape ({size},) and dtype torch.float32 on {device}, "
            f"got {tuple(vector.shape)} and {vector.dtype} on {vector.device}"
        )


def _check_stream(op: str, stream: Tensor, spans: Tensor) -> None:
    if stream.dim() != 3 or stream.dtype != torch.float32 or stream.shape[2] not in TILES:
        raise ValueError(
            f"{op}: expected a float32 stream of shape (tiles, H, 16 or 32), got {tuple(stream.shape)} {stream.dtype}"
        )
    tokens = stream.shape[0] * stream.shape[2]
    if spans.shape != (4, tokens) or spans.dtype != torch.int32 or spans.device != stream.device:
        raise ValueError(
            f"{op}: expected int32 spans of shape (4, {tokens}) on {stream.device}, "
            f"got {tuple(spans.shape)} {spans.dtype} on {spans.device}"
        )


def _check_position_bias(bias: Tensor, heads: int, stream: Tensor) -> None:
    if bias.dim() != 3 or bias.shape[0] != heads or bias.shape[1] != bias.shape[2] or bias.dtype != torch.float32:
        raise ValueError(
            f"encoder_layer: expected a float32 position_bias of shape ({heads}, S, S), "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )
    if bias.device != stream.device:
        raise ValueError(f"encoder_layer: expected position_bias on {stream.device}, got {bias.device}")


def native_runs() -> bool:
    """Whether the extension was built with these ops."""
    return native.available and "encoder_layer.f32" in native.kernels()


def _choose(op: str, x: Tensor, backend: str | None) -> str:
    """The backend that will run, or RuntimeError if the one asked for cannot."""
    if backend is None:  # the op itself, which runs the reference where nothing better was built
        return "native" if x.is_cpu else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: expected a backend among {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native" and not native_runs():
        why = native.why_unavailable or "the extension was built without it"
        raise RuntimeError(f"{op}: backend 'native' cannot run: {why}")
    if backend == "native" and not x.is_cpu:
        raise RuntimeError(f"{op}: backend 'native' cannot run: expected a tensor on cpu, got {x.device}")
    return backend


_PROJECTIONS = "Tensor[] query, Tensor[] key, Tensor[] value, Tensor[] output, Tensor[] fc1, Tensor[] fc2"
_SCHEMAS = {
    "padding_keys": "(Tensor mask) -> Tensor",
    "encoder_pack": "(Tensor x, Tensor? mask, int tile) -> (Tensor stream, Tensor spans)",
    "encoder_layer": f"(Tensor stream, Tensor spans, {_PROJECTIONS}, Tensor[] norms, int[] query_rows, "
    "int[] value_rows, float scale, str activation, float eps, bool pre_norm, Tensor? position_bias=None, "
    'str precision="float32") -> Tensor',
    "encoder_unpack": "(Tensor stream, Tensor spans, SymInt batch, SymInt length, ScalarType dtype) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"sparsenlp::{_name}", _schema)
_keys_op = torch.ops.sparsenlp.padding_keys.default
_pack_op = torch.ops.sparsenlp.encoder_pack.default
_layer_op = torch.ops.sparsenlp.encoder_layer.default
_unpack_op = torch.ops.sparsenlp.encoder_unpack.default
_reference_pack = on_one_device("encoder_pack", reference.encoder_pack)
_reference_layer = on_one_device("encoder_layer", reference.encoder_layer)
_reference_unpack = on_one_device("encoder_unpack", reference.encoder_unpack)

torch.library.impl("sparsenlp::padding_keys", "default", _padding_keys)
if not native_runs():
    torch.library.impl("sparsenlp::encoder_pack", "cpu", reference.encoder_pack)
    torch.library.impl("sparsenlp::encoder_layer", "cpu", reference.encoder_layer)
    torch.library.impl("sparsenlp::encoder_unpack", "cpu", reference.encoder_unpack)


@register_fake("padding_keys")
def _fake_keys(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], mask.shape[-1], dtype=torch.bool)


@register_fake("encoder_pack")
def _fake_pack(x: Tensor, mask: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    tiles = (x.shape[0] * x.shape[1] + tile - 1) // tile
    stream = x.new_empty(tiles, x.shape[2], tile, dtype=torch.float32)
    return stream, x.new_empty(4, tiles * tile, dtype=torch.int32)


@register_fake("encoder_layer")
def _fake_layer(stream: Tensor, *_: Any) -> Tensor:
    return stream.new_empty(stream.shape)


@register_fake("encoder_unpack")
def _fake_unpack(stream: Tensor, spans: Tensor, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    return stream.new_empty(batch, length, stream.shape[1], dtype=dtype)

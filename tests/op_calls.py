"""A random valid call of every op, with the arguments of torch.ops.sparsenlp: what tests move, spoil and fence."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from attention_cases import BlockSparseAttentionCase
from cases import AddLayerNormCase, BsrLinearCase, EmbedLayerNormCase, NMLinearCase
from conv_cases import ConvCase
from decoder_cases import DecoderCase
from encoder_cases import DenseAttentionCase, EncoderLayerCase, SparseFfnCase
from recurrent_cases import RecurrentCase

from sparsenlp import reference
from sparsenlp.ops.encoder_layer import arguments as encoder_arguments
from sparsenlp.ops.nm_linear import pack

Arguments = tuple[Any, ...]
BLOCKS = [(16, 1), (8, 1), (4, 1), (2, 1), (1, 1), (8, 4), (4, 4), (1, 4), (3, 4), (5, 2), (1, 16), (8, 8), (40, 12)]
FLOATS = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh"]


def _weight(draw: random.Random, **fixed: Any) -> dict[str, Any]:
    """A block, sizes that it divides, and a dtype, for the cases of linear layers."""
    n, k = draw.choice(BLOCKS)
    rows, columns = n * draw.randint(1, 5), k * draw.randint(1, 9)
    options = {"block": (n, k), "rows": rows, "columns": columns, "density": draw.choice([0, 0.1, 0.5, 1])}
    options |= {"dtype": draw.choice(FLOATS), "int8": k % 4 == 0 and draw.random() < 0.3}
    return options | {"seed": draw.randrange(1000)} | fixed


def bsr_linear(draw: random.Random) -> Arguments:
    tokens = draw.choice([(), (1,), (2, 3), (17,), (40,), (0,)])
    some = {name: draw.random() < 0.5 for name in ("bias", "residual")}
    case = BsrLinearCase(tokens, activation=draw.choice(ACTIVATIONS), **some, **_weight(draw))
    w = case.weight()
    extras = (case.bias_vector(), case.activation, case.residual_tensor(), w.scales, draw.choice([0.0, 0.01]))
    return (case.x(), w.crow_indices, w.col_indices, w.values, *extras)


def bsr_linear_add_(draw: random.Random) -> Arguments:
    x, crow, col, values, bias, activation, _, *int8 = bsr_linear(draw)
    rows = (crow.numel() - 1) * values.shape[1]
    return (torch.randn(*x.shape[:-1], rows).to(x.dtype), x, crow, col, values, bias, activation, *int8)


def bsr_linear_dgrad(draw: random.Random) -> Arguments:
    case = BsrLinearCase((draw.choice([1, 5, 33]),), **_weight(draw, int8=False))
    w = case.weight()
    grad = torch.randn(*case.tokens, case.rows).to(case.dtype)
    return grad, w.crow_indices, w.col_indices, w.values, case.columns


def bsr_linear_wgrad(draw: random.Random) -> Arguments:
    case = BsrLinearCase((draw.choice([1, 5, 33]),), **_weight(draw, int8=False))
    w = case.weight()
    grad = torch.randn(*case.tokens, case.rows).to(case.dtype)
    return grad, case.x(), w.crow_indices, w.col_indices, list(case.block)


def nm_linear(draw: random.Random) -> Arguments:
    pattern = draw.choice([(2, 4), (1, 4), (4, 8)])
    some = {name: draw.random() < 0.5 for name in ("bias", "residual")}
    sizes = (draw.randint(1, 40), pattern[1] * draw.randint(1, 30))
    case = NMLinearCase((draw.choice([0, 1, 2, 9, 20]),), *sizes, pattern, dtype=draw.choice(FLOATS), **some)
    w = case.weight()
    tensors = (case.x(), w.values, w.indices, pack(w.indices, pattern))
    return (*tensors, list(pattern), case.bias_vector(), "relu", case.residual_tensor())


def sparse_conv1d(draw: random.Random) -> Arguments:
    n, k = draw.choice([(8, 1), (4, 4), (1, 1), (3, 4), (1, 16)])
    channels, taps = 4 * draw.randint(1, 5), draw.choice([1, 2, 3, 5])
    k = k if channels * taps % k == 0 else 4
    stride, padding, dilation = draw.randint(1, 4), (draw.randint(0, 5), draw.randint(0, 5)), draw.randint(1, 3)
    length = max(dilation * (taps - 1) + 1, draw.randint(1, 40))
    options = {"dtype": draw.choice(FLOATS), "int8": k % 4 == 0 and draw.random() < 0.3, "bias": draw.random() < 0.5}
    sizes = (draw.choice([0, 1, 3]), length, channels, n * draw.randint(1, 4), taps, (n, k), draw.choice([0, 0.4, 1]))
    return ConvCase(*sizes, stride, padding, dilation, draw.choice(ACTIVATIONS), **options).op_arguments()


def sparse_ffn(draw: random.Random) -> Arguments:
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.int8])
    n, k = draw.choice([(8, 4), (4, 4), (1, 8), (2, 4)])
    sizes = (8 * draw.randint(1, 4), 8 * draw.randint(1, 6), n * draw.randint(1, 5))
    tokens = draw.choice([(1,), (17,), (2, 20), (0,)])
    case = SparseFfnCase(tokens, *sizes, (n, k), weight_dtype=dtype, dtype=draw.choice(FLOATS))
    fc1, fc2 = case.weights()
    return case.x(), fc1.tensors(draw.random() < 0.5), fc2.tensors(), draw.choice(ACTIVATIONS)


def add_layer_norm(draw: random.Random) -> Arguments:
    tokens = draw.choice([(), (1,), (5,), (2, 3)])
    some = {name: draw.random() < 0.5 for name in ("bias", "residual")}
    return AddLayerNormCase(tokens, draw.randint(1, 70), dtype=draw.choice(FLOATS), **some).arguments()


def embed_layer_norm(draw: random.Random) -> Arguments:
    positions = draw.choice(["none", "default", "given", "shared", "counted"])
    types = draw.choice(["none", "default", "given", "shared"])
    case = EmbedLayerNormCase(
        (2,), draw.randint(1, 9), draw.randint(1, 70), positions, types, dtype=draw.choice(FLOATS)
    )
    names = ("ids", "word", "position", "token_type", "position_ids", "token_type_ids", "weight", "bias", "eps")
    arguments = case.arguments()
    return (*(arguments[name] for name in names), arguments["padding_idx"])


def dense_attention(draw: random.Random) -> Arguments:
    lengths = tuple(draw.randint(0, 40) for _ in range(draw.randint(1, 3)))
    lengths = (*lengths, draw.randint(1, 20))
    widths = {"width": draw.randint(1, 20), "value_width": draw.randint(1, 20), "heads": draw.randint(1, 3)}
    some = {name: draw.random() < 0.5 for name in ("position_bias", "holes", "views")}
    return tuple(
        DenseAttentionCase(lengths, dtype=draw.choice(FLOATS), scale=0.3, **widths, **some).arguments().values()
    )


def _attention(draw: random.Random) -> BlockSparseAttentionCase:
    queries = draw.choice([1, 5, 17, 40])
    options = {"batch": draw.choice([1, 2]), "heads": 2, "kv_heads": draw.choice([1, 2]), "width": draw.randint(1, 20)}
    options |= {"mask": draw.choice(["window", "causal", "none", "whole", "bigbird"]), "padding": draw.random() < 0.5}
    sizes = {"keys": queries + draw.choice([0, 30]), "block": draw.choice([(16, 16), (32, 32), (16, 48)])}
    return BlockSparseAttentionCase(queries, dtype=draw.choice(FLOATS), **sizes, **options)


def block_sparse_attention(draw: random.Random) -> Arguments:
    return _attention(draw).raw_arguments()


def block_sparse_attention_backward(draw: random.Random) -> Arguments:
    case = _attention(draw)
    query, key, value, *mask = case.raw_arguments()
    y, lse = case.expected()
    grad, _ = case.grad()
    return (grad, query, key, value, lse.float(), (grad.double() * y).sum(3).float(), *mask)


def _encoder(draw: random.Random) -> EncoderLayerCase:
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.int8])
    precision = "float32" if dtype == torch.float32 else draw.choice(["float32", "bfloat16"])
    lengths = tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 3)))
    options = {"block": draw.choice([(8, 4), (4, 4), (1, 4)]), "tile": draw.choice([16, 32]), "precision": precision}
    some = {name: draw.random() < 0.5 for name in ("pre_norm", "position_bias")}
    return EncoderLayerCase(lengths, heads=((16, 8), (8, 16)), weight_dtype=dtype, **options, **some)


def encoder_pack(draw: random.Random) -> Arguments:
    case = _encoder(draw)
    return case.x().to(draw.choice(FLOATS)), case.mask() if draw.random() < 0.7 else None, case.tile


def encoder_layer(draw: random.Random) -> Arguments:
    case = _encoder(draw)
    packed = reference.encoder_layer.encoder_pack(case.x(), case.mask(), case.tile)
    return (*packed, *encoder_arguments(case.weights(), draw.random() < 0.5), case.bias(), case.precision)


def encoder_unpack(draw: random.Random) -> Arguments:
    case = _encoder(draw)
    packed = reference.encoder_layer.encoder_pack(case.x(), case.mask(), case.tile)
    return (*packed, len(case.lengths), case.length, draw.choice(FLOATS))


def decoder_layers(draw: random.Random) -> Arguments:
    names = ("gated", "one_input", "layer_norm", "bias", "rotary", "padded", "dense")
    some = {name: draw.random() < 0.5 for name in names}
    block, int8 = draw.choice([(8, 4), (4, 1), (16, 1), (1, 8)]), draw.random() < 0.3 and not some["dense"]
    options = {"block": (8, 4) if int8 else block, "int8": int8, "dtype": draw.choice(FLOATS)}
    sizes = {"batch": draw.randint(1, 2), "length": draw.randint(1, 3), "past": draw.randint(0, 6)}
    case = DecoderCase(layers=draw.randint(1, 2), activation=draw.choice(["silu", "gelu"]), **sizes, **options, **some)
    inputs, weights = case.inputs(), case.weights()
    settings = (weights.heads, weights.scale, weights.activation, weights.eps)
    last = (inputs[name] for name in ("rope", "positions", "mask"))
    return (inputs["x"], inputs["cache"], inputs["past"], *weights.lists(), *settings, *last)


def _recurrent(op: str, draw: random.Random, **fixed: Any) -> RecurrentCase:
    lengths = draw.choice([(), (), (3, 1), (6, 6, 2)])
    block, int8 = draw.choice([(8, 1), (4, 4), (3, 4), (1, 1)]), draw.random() < 0.3
    options = {"block": (8, 4) if int8 else block, "int8": int8, "dtype": draw.choice(FLOATS), "lengths": lengths}
    options |= {"steps": draw.randint(1, 6), "batch": draw.randint(1, 4), "directions": draw.randint(1, 2)}
    options |= {"reverse": draw.random() < 0.5, "bias": draw.random() < 0.5, "columns": 12, "hidden": 24}
    projection = draw.choice([0, 24]) if op == "sparse_lstm" else 0
    return RecurrentCase(op, **options | {"projection": projection} | fixed)


def sparse_lstm(draw: random.Random) -> Arguments:
    return (*_recurrent("sparse_lstm", draw).arguments(), draw.random() < 0.5)


def sparse_gru(draw: random.Random) -> Arguments:
    return (*_recurrent("sparse_gru", draw).arguments(), draw.random() < 0.5)


def sparse_lstm_backward(draw: random.Random) -> Arguments:
    arguments = _recurrent("sparse_lstm", draw, int8=False, block=(4, 1)).arguments()
    _, batch_sizes, crow, col, values, _, _, _, c0, reverse = arguments
    y, h_n, c_n, gates, cells = reference.sparse_lstm.sparse_lstm(*arguments, True)
    grads = (torch.randn_like(t) for t in (y, h_n, c_n))
    return (*grads, batch_sizes, crow, col, values, gates, cells, c0, reverse)


def sparse_gru_backward(draw: random.Random) -> Arguments:
    arguments = _recurrent("sparse_gru", draw, int8=False, block=(4, 1)).arguments()
    _, batch_sizes, crow, col, values, _, _, h0, reverse = arguments
    y, h_n, gates = reference.sparse_gru.sparse_gru(*arguments, True)
    return (torch.randn_like(y), torch.randn_like(h_n), batch_sizes, crow, col, values, gates, y, h0, reverse)


CALLS: dict[str, Callable[[random.Random], Arguments]] = {
    function.__name__: function
    for function in (
        *(bsr_linear, bsr_linear_add_, bsr_linear_dgrad, bsr_linear_wgrad, nm_linear, sparse_conv1d, sparse_ffn),
        *(add_layer_norm, embed_layer_norm, dense_attention, block_sparse_attention, block_sparse_attention_backward),
        *(encoder_pack, encoder_layer, encoder_unpack, decoder_layers),
        *(sparse_lstm, sparse_lstm_backward, sparse_gru, sparse_gru_backward),
    )
}
GPU_ONLY = {"sparse_lstm_persistent": sparse_lstm, "sparse_gru_persistent": sparse_gru}


def draw_call(op: str, seed: int) -> Arguments:
    """Valid arguments of sparsenlp::<op>, always the same for a seed."""
    torch.manual_seed(seed)
    return (CALLS | GPU_ONLY)[op](random.Random(f"{op} {seed}"))


def op_of(name: str) -> Any:
    return getattr(torch.ops.sparsenlp, name).default


def argument_names(op: str) -> list[str]:
    return [argument.name for argument in op_of(op)._schema.arguments]

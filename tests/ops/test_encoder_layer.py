from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import each_backend
from encoder_cases import ENCODER_LAYER, RAGGED, EncoderLayerCase, encoder_cases

from sparsenlp import BlockSparse, native
from sparsenlp.formats.encoder import SparseProjection
from sparsenlp.ops import encoder_layer, encoder_pack, encoder_unpack
from sparsenlp.ops.encoder_layer import arguments, native_runs, padding_keys
from sparsenlp.reference import encoder_layer as encoder_reference

CASE = EncoderLayerCase(RAGGED)
PACK_BACKENDS = ["reference", *["native"] * native_runs()]


def poison(numel: int) -> None:
    """Leave freed memory of this size full of NaN, for the allocator to hand out next."""
    junk = [torch.full((max(numel, 1),), torch.nan) for _ in range(3)]
    del junk


def run(case: EncoderLayerCase, backend: str | None = None) -> torch.Tensor:
    x, weights, bias = case.x(), case.weights(), case.bias()
    x[~case.mask()] = torch.nan  # padding is never read
    stream, spans = encoder_pack(x, case.mask(), case.tile, backend=backend)
    poison(stream.numel())
    y = encoder_layer(stream, spans, weights, bias, case.precision, backend=backend)
    poison(x.numel())
    return encoder_unpack(y, spans, *x.shape[:2], backend=backend)


@pytest.mark.parametrize(("backend", "case"), each_backend("encoder_layer", ENCODER_LAYER), indirect=["backend"])
def test_layer(case, backend):
    torch.testing.assert_close(run(case, backend).double(), case.expected(), **case.tolerance)


def test_the_reference_is_the_textbook_formula():
    """Post-norm, one sequence, by torch's own attention and dense weights."""
    case = EncoderLayerCase((9,), position_bias=True)
    w, x = case.weights(), case.x()

    def linear(x, projection):
        return torch.nn.functional.linear(x, projection.weight.to_dense(), projection.bias)

    q, k, v = (linear(x, p).unflatten(2, (2, 16)).transpose(1, 2) for p in (w.query, w.key, w.value))
    attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, case.bias(), scale=w.scale)
    x = torch.nn.functional.layer_norm(
        x + linear(attention.transpose(1, 2).flatten(2), w.output), (32,), *w.norm1, w.eps
    )
    ffn = linear(torch.nn.functional.gelu(linear(x, w.fc1)), w.fc2)
    expected = torch.nn.functional.layer_norm(x + ffn, (32,), *w.norm2, w.eps)
    torch.testing.assert_close(case.expected().float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PACK_BACKENDS)
@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_and_unpack(tile, dtype, backend):
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]).bool()
    packed = mask.clone()
    packed[1, 0] = True  # heads read the first token of a sequence, padding or not
    x = torch.randn(4, 5, 8).to(dtype)
    x[~packed] = torch.nan
    poison(8 * tile)
    stream, spans = encoder_pack(x, mask, tile, backend=backend)
    assert stream.shape == (-(-20 // tile), 8, tile)
    assert stream.dtype == torch.float32
    assert spans.dtype == torch.int32
    unused = spans.shape[1] - 9
    assert spans[0].tolist() == [0, 1, 2, 5, 6, 15, 16, 18, 19] + [-1] * unused
    assert spans[1].tolist() == [0, 0, 0, 4, 4] + [5] * (4 + unused)
    assert spans[2].tolist() == [3, 3, 3, 5, 5] + [9] * (4 + unused)
    assert spans[3].tolist() == [0, 1, 2, 0, 1, 0, 1, 3, 4] + [4] * unused
    assert torch.equal(stream[0, :, :9].t(), x[packed].float())
    assert not stream[0, :, 9:].any()
    assert not stream[1:].any()
    poison(x.numel())
    y = encoder_unpack(stream, spans, 4, 5, dtype, backend=backend)
    assert torch.equal(y, x.masked_fill(~packed[:, :, None], 0))


@pytest.mark.parametrize("backend", PACK_BACKENDS)
def test_pack_without_padding_and_without_tokens(backend):
    x = torch.randn(2, 32, 8)
    stream, spans = encoder_pack(x, backend=backend)
    assert stream.shape == (4, 8, 16)
    assert torch.equal(encoder_unpack(stream, spans, 2, 32, backend=backend), x)
    x = torch.randn(0, 4, 32)
    stream, spans = encoder_pack(x, backend=backend)
    stream = encoder_layer(stream, spans, CASE.weights(), backend=backend)
    assert encoder_unpack(stream, spans, 0, 4, backend=backend).shape == x.shape


@pytest.mark.parametrize(
    ("backend", "case"), each_backend("encoder_layer", [EncoderLayerCase((7, 30, 2))]), indirect=["backend"]
)
def test_tokens_do_not_depend_on_what_shares_the_batch(case, backend):
    stream, spans = encoder_pack(case.x(), case.mask(), backend=backend)
    whole = encoder_unpack(encoder_layer(stream, spans, case.weights(), backend=backend), spans, 3, 30, backend=backend)
    for row, length in enumerate(case.lengths):
        stream, spans = encoder_pack(case.x()[row : row + 1, :length].contiguous(), backend=backend)
        alone = encoder_layer(stream, spans, case.weights(), backend=backend)
        torch.testing.assert_close(encoder_unpack(alone, spans, 1, length, backend=backend)[0], whole[row, :length])


MIXED = [c for tile in (16, 32) for c in encoder_cases(lengths=(3, 150, 2, 7, 1), tile=tile)]


@pytest.mark.parametrize(
    ("backend", "case"),
    [pair for pair in each_backend("encoder_layer", MIXED) if pair.values[0] != "reference"],  # which packs nothing
    indirect=["backend"],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_sequence_of_any_numbers_leaves_the_others_alone(case, value, backend):
    """Whichever shares tiles of 16 or 32 tokens with it, before or after it, in one chunk of 128 keys or two."""
    x, weights = case.x(), case.weights()

    def run(x):
        stream, spans = encoder_pack(x, case.mask(), case.tile, backend=backend)
        for _ in range(2):
            stream = encoder_layer(stream, spans, weights, None, case.precision, backend=backend)
        return encoder_unpack(stream, spans, *x.shape[:2], backend=backend)

    expected = run(x)
    for strange in (0, 1, 4):
        changed = x.clone()
        changed[strange, 0, 1::3] = value
        got = run(changed)
        others = [row for row in range(len(x)) if row != strange]
        assert torch.equal(got[others], expected[others])
        if value != 1e30:
            assert not got[strange, 0].isfinite().all()


HOLES = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize(
    ("backend", "case"),
    each_backend(
        "encoder_layer", [c for bias in (False, True) for c in encoder_cases(lengths=(5,) * 5, position_bias=bias)]
    ),
    indirect=["backend"],
)
def test_masked_first_tokens_attend_to_the_real_ones(case, backend):
    x, weights, bias = case.x(), case.weights(), case.bias()
    stream, spans = encoder_pack(x, HOLES, case.tile, backend=backend)
    y = encoder_layer(stream, spans, weights, bias, case.precision, backend=backend)
    got = encoder_unpack(y, spans, 5, 5, backend=backend)
    for row, mask in enumerate(HOLES):
        packed = mask | (torch.arange(5) == 0) & mask.any()
        assert not got[row, ~packed].any()
        if mask.any():  # as torch attends: every token to the real ones
            want = masked_layer(x[row].double(), mask, case)
            torch.testing.assert_close(got[row, packed].double(), want[packed], **case.tolerance)


def masked_layer(x, mask, case):
    """What the layer gives for x (S, H) float64 by torch's own attention."""
    w, bias = case.weights(), case.bias()
    round_ = encoder_reference._ROUNDINGS[case.precision]

    def project(x, projection, activation="none"):
        return encoder_reference.project(round_(x), projection.tensors(), activation)

    q, k, v = (round_(project(x, p)).unflatten(1, (2, 16)).transpose(0, 1) for p in (w.query, w.key, w.value))
    scores = w.scale * q @ k.transpose(1, 2) + (0 if bias is None else bias.double())
    context = round_(scores.masked_fill(~mask, -torch.inf).softmax(dim=2)) @ v

    def normalize(x, norm):
        return torch.nn.functional.layer_norm(x, x.shape[1:], *(t.double() for t in norm), w.eps)

    x = normalize(x + project(context.transpose(0, 1).flatten(1), w.output), w.norm1)
    return normalize(x + project(project(x, w.fc1, w.activation), w.fc2), w.norm2)


@pytest.mark.parametrize("case", encoder_cases(position_bias=True, lengths=(16, 2, 30)), ids=str)
def test_opcheck(case):
    stream, spans = encoder_pack(case.x(), case.mask(), case.tile)
    stream, spans = stream[:3].contiguous(), spans[:, : 3 * case.tile].contiguous()  # every lane is used
    inputs = (stream, spans, *arguments(case.weights()), case.bias(), case.precision)
    torch.library.opcheck(torch.ops.sparsenlp.encoder_layer.default, inputs)


LEAST = torch.finfo(torch.float32).min
KEYS = torch.tensor([[True, True, False], [False, True, False]])


@pytest.mark.parametrize(
    "mask",
    [
        KEYS[:, None, None],
        KEYS[:, None, None].expand(2, 4, 3, 3),
        torch.where(KEYS, 0.0, LEAST)[:, None, None],
        torch.where(KEYS, 0.0, -torch.inf)[:, None, None].expand(2, 1, 3, 3),
        torch.where(KEYS, 0.0, -torch.inf),
    ],
)
def test_keys_of_masks_that_hide_padding(mask):
    assert torch.equal(padding_keys(mask), KEYS)
    torch.library.opcheck(torch.ops.sparsenlp.padding_keys.default, (mask,))


CAUSAL = torch.ones(3, 3).tril().bool()


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL.expand(2, 1, 3, 3),
        torch.where(CAUSAL, 0.0, LEAST).expand(2, 1, 3, 3),
        torch.stack([torch.ones(3, 3).bool(), CAUSAL]).expand(2, 2, 3, 3),
        torch.block_diag(torch.ones(2, 2), torch.ones(1, 1)).bool()[None, None],
        torch.where(KEYS, 0.0, -1e4)[:, None, None],
        torch.full((2, 1, 1, 3), torch.nan),
        torch.where(KEYS, -1.0, LEAST),
    ],
)
def test_masks_that_do_more_are_refused(mask):
    with pytest.raises(RuntimeError, match=r"hides the same padding .*; call the model uncompiled"):
        padding_keys(mask)


def test_opcheck_pack_and_unpack():
    for mask in (CASE.mask(), None):
        torch.library.opcheck(torch.ops.sparsenlp.encoder_pack.default, (CASE.x(), mask, 16))
    stream, spans = encoder_pack(CASE.x(), CASE.mask())
    torch.library.opcheck(torch.ops.sparsenlp.encoder_unpack.default, (stream, spans, 4, 30, torch.bfloat16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    weights, bias = CASE.weights(), EncoderLayerCase(RAGGED, position_bias=True).bias()

    def f(x, mask):
        stream, spans = encoder_pack(x * 2, mask)
        y = encoder_layer(stream, spans, weights, bias)
        return encoder_unpack(y, spans, x.shape[0], x.shape[1]) + 1

    with torch.no_grad():
        got = torch.compile(f, fullgraph=True, dynamic=dynamic)(CASE.x(), CASE.mask())
        torch.testing.assert_close(got, f(CASE.x(), CASE.mask()))


def test_is_for_inference():
    stream, spans = encoder_pack(CASE.x(), CASE.mask())
    with pytest.raises(RuntimeError, match="it is for inference"):
        encoder_layer(stream.requires_grad_(), spans, CASE.weights())
    with torch.no_grad():
        encoder_layer(stream, spans, CASE.weights())


def test_native_backend_without_extension(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="encoder_pack: backend 'native' cannot run: not built"):
        encoder_pack(CASE.x(), backend="native")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 30)}, ValueError, r"expected x of shape \(B, S, H\), got \(4, 30\)"),
        (
            {"x": torch.zeros(4, 30, 8).double()},
            TypeError,
            "expected x of dtype float32 or bfloat16, got torch.float64",
        ),
        ({"mask": torch.ones(4, 29).bool()}, ValueError, r"expected a mask of shape \(4, 30\) on cpu, got \(4, 29\)"),
        ({"mask": torch.ones(4, 30)}, TypeError, "expected a mask of dtype torch.bool, got torch.float32"),
        ({"tile": 8}, ValueError, "expected tiles of 16 or 32 tokens, got 8"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors_of_pack(change, error, message):
    with pytest.raises(error, match=message):
        encoder_pack(**{"x": torch.zeros(4, 30, 8), "mask": None} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 5}, ValueError, "expected 10 tiles of 16 tokens for a batch of 5 x 30, got 8"),
        ({"dtype": torch.float16}, TypeError, "expected dtype float32 or bfloat16, got torch.float16"),
        ({"spans": torch.zeros(4, 7).int()}, ValueError, r"expected int32 spans of shape \(4, 128\) on cpu"),
    ],
)
def test_errors_of_unpack(change, error, message):
    stream, spans = encoder_pack(CASE.x(), CASE.mask())
    with pytest.raises(error, match=message):
        encoder_unpack(**{"stream": stream, "spans": spans, "batch": 4, "length": 30} | change)


def sparse(rows, columns, dtype=torch.float32, bias_dtype=torch.float32):
    weight = BlockSparse.from_dense(torch.ones(rows, columns, dtype=dtype), (8, 1))
    return SparseProjection(weight, torch.zeros(rows, dtype=bias_dtype))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stream": torch.zeros(8, 32, 8)}, ValueError, r"expected a float32 stream of shape \(tiles, H, 16 or 32\)"),
        ({"stream": torch.zeros(8, 40, 16)}, ValueError, r"expected a stream of H = 32, got \(8, 40, 16\)"),
        ({"stream": torch.zeros(8, 32, 16).double()}, ValueError, "expected a float32 stream .* torch.float64"),
        ({"spans": torch.zeros(4, 128)}, ValueError, "expected int32 spans .* torch.float32"),
        (
            {"position_bias": torch.zeros(3, 30, 30)},
            ValueError,
            r"expected a float32 position_bias of shape \(2, S, S\)",
        ),
        ({"position_bias": torch.zeros(2, 30, 30).double()}, ValueError, "float32 position_bias .* torch.float64"),
        ({"precision": "float16"}, ValueError, "expected a precision among float32, bfloat16, got 'float16'"),
        ({"precision": "bfloat16"}, ValueError, "expected bfloat16 or int8 weights for precision 'bfloat16'"),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
    ],
)
def test_errors_of_layer(change, error, message):
    stream, spans = encoder_pack(CASE.x(), CASE.mask())
    with pytest.raises(error, match=message):
        encoder_layer(**{"stream": stream, "spans": spans, "weights": CASE.weights()} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "expected an activation among none, relu, gelu, gelu_tanh, got 'swish'"),
        ({"query_rows": (0, 16)}, ValueError, "expected value_rows as heads . 1 offsets from 0"),
        ({"query_rows": ()}, ValueError, "expected query_rows as heads . 1 offsets from 0"),
        (
            {"query_rows": (0, 20, 16)},
            ValueError,
            "expected query_rows as heads . 1 offsets from 0 that do not decrease",
        ),
        ({"query_rows": (0, 16, 24)}, ValueError, r"expected query of shape \(24, 32\), got \(32, 32\)"),
        ({"fc2": sparse(32, 72)}, ValueError, r"expected fc2 of shape \(32, 64\), got \(32, 72\)"),
        ({"key": sparse(32, 32, torch.bfloat16)}, TypeError, "expected key of dtype torch.float32, got torch.bfloat16"),
        ({"query": sparse(32, 32, torch.float64)}, TypeError, "weights of dtype float32, bfloat16 or int8"),
        ({"key": sparse(32, 32, bias_dtype=torch.bfloat16)}, ValueError, "expected bias of key .* torch.float32"),
        ({"norm2": (torch.ones(31), torch.ones(32))}, ValueError, r"expected norm2 of shape \(32,\)"),
    ],
)
def test_errors_of_weights(change, error, message):
    stream, spans = encoder_pack(CASE.x(), CASE.mask())
    with pytest.raises(error, match=message):
        encoder_layer(stream, spans, replace(CASE.weights(), **change))


def test_int8_rows_that_could_overflow_are_refused(needs_native):
    case = EncoderLayerCase(RAGGED, neurons=66312, block=(8, 4), density=0.0, weight_dtype=torch.int8)
    stream, spans = encoder_pack(case.x(), case.mask(), case.tile)
    with pytest.raises(RuntimeError, match="expected at most 66311 columns of int8 in fc2, got 66312"):
        encoder_layer(stream, spans, case.weights(), backend="native")

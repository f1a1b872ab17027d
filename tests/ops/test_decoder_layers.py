from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decoder_cases import DECODER_LAYERS, DecoderCase

from sparsenlp import native
from sparsenlp.ops import decoder_layers

CASE = DecoderCase(batch=2, length=3)
GPT2 = DecoderCase(kv_heads=4, one_input=True, layer_norm=True, bias=True, rotary=False, gated=False)


def run(case, backend=None, **change):
    inputs = case.inputs() | change
    return decoder_layers(weights=case.weights(), backend=backend, **inputs), inputs["cache"]


@pytest.mark.parametrize("case", DECODER_LAYERS, ids=str)
def test_forward(case, backend):
    expected, expected_cache = case.expected()
    y, cache = run(case, backend)
    assert y.dtype == cache.dtype == case.dtype
    torch.testing.assert_close(y.double(), expected, **case.tolerance)
    torch.testing.assert_close(cache.double(), expected_cache, equal_nan=True, **case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_the_reference(dtype):
    case = replace(CASE, dtype=dtype)
    y, _ = run(case)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), case.expected()[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_at_a_time_gives_what_all_at_once_give(dtype, needs_native):
    case = DecoderCase(batch=2, length=6, past=0, dtype=dtype)
    inputs, weights = case.inputs(), case.weights()
    at_once, cache = run(case, "native")
    x, positions, own = inputs["x"], inputs["positions"], inputs["cache"]
    steps = [
        decoder_layers(x[:, t : t + 1], own, t, weights, inputs["rope"], positions[:, t : t + 1].contiguous())
        for t in range(case.length)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, **case.tolerance)
    torch.testing.assert_close(own, cache, equal_nan=True, **case.tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (1, 40)])
def test_results_do_not_depend_on_threads(batch, length, dtype, needs_native):
    case = DecoderCase(batch, length, past=50, hidden=256, heads=8, head_dim=32, inner=512, dtype=dtype, layers=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, cache = run(case, "native")
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            many, many_cache = run(case, "native")
            assert torch.equal(one, many)
            assert torch.equal(cache.nan_to_num(9), many_cache.nan_to_num(9))
    finally:
        torch.set_num_threads(threads)


def test_tokens_after_a_query_do_not_matter(backend):
    y, _ = run(CASE, backend)
    x = CASE.inputs()["x"]
    x[:, -1] = 100.0
    changed, _ = run(CASE, backend, x=x)
    torch.testing.assert_close(changed[:, :-1], y[:, :-1])
    assert not torch.allclose(changed[:, -1], y[:, -1])


def test_masked_tokens_do_not_matter(backend):
    case = replace(CASE, padded=True)
    y, _ = run(case, backend)
    inputs = case.inputs()
    cache = inputs["cache"]
    hidden = ~inputs["mask"][:, : case.past]
    for b, p in hidden.nonzero().tolist():
        cache[:, :, b, :, p] = 1e4
    changed, _ = run(case, backend, cache=cache)
    torch.testing.assert_close(changed, y)


@pytest.mark.parametrize(
    "case",
    [CASE, DecoderCase(kv_heads=4, one_input=True, layer_norm=True, bias=True, rotary=False, gated=False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    case = replace(case, dtype=dtype)
    weights, inputs = case.weights(), case.inputs()
    settings = (weights.heads, weights.scale, weights.activation, weights.eps)
    others = (inputs["rope"], inputs["positions"], inputs["mask"])
    cache = inputs["cache"].nan_to_num(0.0)
    arguments = (inputs["x"], cache, case.past, *weights.lists(), *settings, *others)
    torch.library.opcheck(torch.ops.sparsenlp.decoder_layers.default, arguments)


def test_compile_fullgraph():
    weights, inputs = CASE.weights(), CASE.inputs()

    def f(x, cache):
        return decoder_layers(x * 2, cache, CASE.past, weights, inputs["rope"], inputs["positions"]) + 1

    with torch.no_grad():
        expected_cache, cache = inputs["cache"].clone(), inputs["cache"].clone()
        expected = f(inputs["x"], expected_cache)
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(inputs["x"], cache), expected)
    torch.testing.assert_close(cache, expected_cache, equal_nan=True)


def change_layer(weights, **change):
    return replace(weights, layers=(replace(weights.layers[0], **change), *weights.layers[1:]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 48)}, ValueError, r"expected x of shape \(B, T, H\)"),
        ({"cache": torch.zeros(2, 2, 2, 2, 16)}, ValueError, "expected a contiguous cache"),
        ({"cache": torch.zeros(2, 3, 2, 2, 16, 16)}, ValueError, r"expected a cache of \(2, 2, 2, ...\)"),
        ({"cache": torch.zeros(2, 2, 2, 2, 16, 16).double()}, TypeError, "expected a cache of dtype torch.float32"),
        ({"past": 13, "cache": torch.zeros(2, 2, 2, 2, 15, 16)}, ValueError, "expected room for 13 past and 3 new"),
        ({"past": -1}, ValueError, "expected room for -1 past"),
        ({"cache": torch.zeros(2, 2, 2, 3, 16, 16)}, ValueError, "expected heads as a multiple of 3, got 4"),
        ({"rope": torch.zeros(40, 8)}, ValueError, r"expected float32 rope \(positions, 16\)"),
        ({"positions": None}, ValueError, r"expected int64 positions of shape \(2, 3\), got None"),
        ({"positions": torch.full((2, 3), 40)}, ValueError, r"expected positions in \[0, 40\)"),
        ({"mask": torch.ones(2, 8)}, ValueError, r"expected a bool mask of shape \(2, 8\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"expected a bool mask of shape \(2, 8\)"),
        ({"weights": replace(CASE.weights(), activation="swish")}, ValueError, "activation among silu, .* got 'swish'"),
        (
            {"weights": change_layer(CASE.weights(), up=CASE.weights().layers[0].down)},
            ValueError,
            "expected a 48 x 48 weight in layer 0, got",
        ),
        (
            {"weights": change_layer(CASE.weights(), inputs=CASE.weights().layers[0].inputs[:2])},
            ValueError,
            "expected 1 or 3 inputs in layer 0, got 2",
        ),
        (
            {"weights": replace(CASE, dtype=torch.bfloat16).weights()},
            TypeError,
            "expected weights of dtype torch.float32 or int8 in layer 0, got torch.bfloat16",
        ),
        (
            {"weights": replace(CASE.weights(), norm=(torch.ones(47), None))},
            ValueError,
            r"expected norms of shape \(48,\)",
        ),
        (
            {"weights": replace(CASE.weights(), norm=(torch.ones(48), torch.ones(48)))},
            ValueError,
            "expected norms that all have a bias, or none",
        ),
        ({"backend": "cudnn"}, ValueError, "expected a backend among native, reference, got 'cudnn'"),
        ({"x": torch.zeros(2, 3, 48, requires_grad=True)}, RuntimeError, "expected no gradients to be needed"),
    ],
)
def test_errors(change, error, message):
    arguments = CASE.inputs() | {"weights": CASE.weights()} | change
    with pytest.raises(error, match=message):
        decoder_layers(**arguments)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("x", torch.zeros(2, 3, 47)),
        ("x", torch.zeros(2, 48)),
        ("cache", torch.zeros(2, 2, 2, 2, 7, 16)),
        ("cache", torch.zeros(2, 2, 1, 2, 16, 16)),
        ("cache", torch.zeros(2, 2, 2, 2, 16, 32)[..., ::2]),
        ("past", -1),
        ("heads", 3),
        ("heads", 8),
        ("activation", "swish"),
        ("positions", torch.full((2, 3), -1)),
        ("positions", torch.full((2, 3), 40)),
        ("positions", None),
        ("rope", torch.zeros(40, 8)),
        ("mask", torch.ones(2, 7, dtype=torch.bool)),
        ("values", []),
        ("col_indices", [torch.zeros(1, dtype=torch.int32)] * 14),
        ("crow_indices", [torch.zeros(7, dtype=torch.int64)] * 14),
        ("biases", [torch.ones(3)] * 14),
        ("norm_weights", [torch.ones(48)] * 4),
        ("norm_biases", [torch.ones(47)] * 5),
        ("scales", [torch.ones(48)]),
    ],
)
def test_raw_op_refuses_inconsistent_tensors(name, replacement, needs_native):
    weights, inputs = CASE.weights(), CASE.inputs()
    settings = {"heads": weights.heads, "scale": weights.scale, "activation": weights.activation, "eps": weights.eps}
    arguments = inputs | weights.lists()._asdict() | settings | {name: replacement}
    with pytest.raises(RuntimeError, match="decoder_layers"):
        torch.ops.sparsenlp.decoder_layers(**arguments)


def test_native_backend_runs_or_raises(monkeypatch, needs_native):
    with pytest.raises(RuntimeError, match=r"expected float32 or bfloat16 on cpu, got torch\.float16"):
        run(replace(CASE, dtype=torch.float16), "native")
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "not built")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: not built"):
        run(CASE, "native")

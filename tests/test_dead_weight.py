from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from math import lcm

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsenlp import BlockSparse
from sparsenlp.dead_weight import PROJECTIONS, remove_dead_neurons, remove_dead_weight
from sparsenlp.formats import EncoderWeights, SparseProjection
from sparsenlp.formats.rearrange import nonzero_columns, nonzero_rows
from sparsenlp.reference.bsr_linear import ACTIVATIONS

HIDDEN, HEAD = 4, 4
BLOCK = (2, 1)


def linear(projection, x):
    return F.linear(x, projection.weight.to_dense().double(), projection.bias.double())


def evaluate(weights, x, position_bias=None):
    """The layer for one sequence x (S, H) float64, with position_bias (heads, S, S) or None, from its definition."""

    def norm(x, parameters):
        return F.layer_norm(x, x.shape[1:], *(p.double() for p in parameters), weights.eps)

    def attention(x):
        query, key, value = (linear(p, x) for p in (weights.query, weights.key, weights.value))
        outputs = [x[:, :0]]
        for head, (q, v) in enumerate(zip(pairwise(weights.query_rows), pairwise(weights.value_rows), strict=True)):
            scores = query[:, slice(*q)] @ key[:, slice(*q)].T * weights.scale
            scores = scores if position_bias is None else scores + position_bias[head]
            outputs.append(scores.softmax(1) @ value[:, slice(*v)])
        return linear(weights.output, torch.cat(outputs, 1))

    def ffn(x):
        return linear(weights.fc2, ACTIVATIONS[weights.activation](linear(weights.fc1, x)))

    if weights.pre_norm:
        x = x + attention(norm(x, weights.norm1))
        return x + ffn(norm(x, weights.norm2))
    x = norm(x + attention(x), weights.norm1)
    return norm(x + ffn(x), weights.norm2)


def tensors(weights):
    return [t for name in PROJECTIONS for t in getattr(weights, name).tensors()]


def check(weights, tolerance=1e-12, sequence=7):
    """Remove dead weight and check everything that holds for every layer; returns the smaller one and the record."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sequence, weights.hidden_size, generator=generator).double()
    position_bias = torch.randn(weights.heads, sequence, sequence, generator=generator).double()
    before = [t.clone() for t in tensors(weights)]
    smaller, record = remove_dead_weight(weights)

    assert all(map(torch.equal, tensors(weights), before)), "the input was modified"
    for name in PROJECTIONS:
        old, new = getattr(weights, name), getattr(smaller, name)
        new.weight.validate()
        assert new.weight.values.numel() <= old.weight.values.numel()
        assert new.weight.block == old.weight.block
        assert new.bias.shape == new.weight.shape[:1]
        assert new.bias.dtype == old.bias.dtype
    kept = list(record.kept_heads)
    for bias, kept_bias in ((None, None), (position_bias, position_bias[kept])):
        expected, got = evaluate(weights, x, bias), evaluate(smaller, x, kept_bias)
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert smaller.heads == len(kept) == record.heads[1] - record.heads[0]
    again, nothing = remove_dead_weight(smaller)
    assert all(a is b for a, b in zip(tensors(again), tensors(smaller), strict=True))
    assert nothing.blocks[0] == nothing.heads[0] == nothing.neurons[0] == nothing.query_dims[0] == 0
    return smaller, record


def layer(zeros=(), biases=(), block=BLOCK, dtype=torch.float64, heads=2, neurons=6, **options):
    """A dense layer of hidden size 4 with heads of 4 dimensions, but for its zeros.

    zeros    (projection, index) of weights that are zero; those of whole blocks are not stored
    biases   (projection, index, value)
    """
    generator = torch.Generator().manual_seed(1)
    inner = heads * HEAD
    shapes = dict.fromkeys(("query", "key", "value"), (inner, HIDDEN))
    shapes |= {"output": (HIDDEN, inner), "fc1": (neurons, HIDDEN), "fc2": (HIDDEN, neurons)}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    vectors = {name: torch.randn(shape[0], generator=generator).to(dtype) for name, shape in shapes.items()}
    for name, index in zeros:
        weights[name][index] = 0
    for name, index, value in biases:
        vectors[name][index] = value
    norms = [tuple(torch.randn(2, HIDDEN, generator=generator)) for _ in range(2)]
    offsets = tuple(range(0, inner + 1, HEAD))
    projections = [SparseProjection(BlockSparse.from_dense(weights[n], block), vectors[n]) for n in PROJECTIONS]
    return EncoderWeights(*projections, *norms, offsets, offsets, HEAD**-0.5, **options)


ALL = slice(None)


def test_a_dense_layer_keeps_its_tensors():
    weights = layer()
    smaller, record = check(weights)
    assert all(a is b for a, b in zip(tensors(smaller), tensors(weights), strict=True))
    assert smaller.query_rows == weights.query_rows
    assert record.as_dict()["blocks"] == {
        "removed": 0,
        "of": sum(getattr(weights, n).weight.nnz_blocks for n in PROJECTIONS),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_constant_neuron_goes_into_the_bias(activation, pre_norm):
    weights = layer([("fc1", slice(2, 4))], [("fc1", 2, 0.7)], activation=activation, pre_norm=pre_norm)
    smaller, record = check(weights)
    assert record.neurons == (2, 6)
    constant = ACTIVATIONS[activation](weights.fc1.bias[2:4])
    torch.testing.assert_close(smaller.fc2.bias, weights.fc2.bias + weights.fc2.weight.to_dense()[:, 2:4] @ constant)
    assert torch.equal(smaller.fc1.bias, weights.fc1.bias[[0, 1, 4, 5]])


def test_a_neuron_that_nobody_reads_goes():
    weights = layer([("fc2", (ALL, slice(4, 6)))])
    smaller, record = check(weights)
    assert record.neurons == (2, 6)
    assert smaller.fc2.bias is weights.fc2.bias
    assert torch.equal(smaller.fc1.weight.to_dense(), weights.fc1.weight.to_dense()[:4])


def test_dead_neurons_that_must_stay_are_zeros():
    smaller, record = check(layer([("fc1", 1), ("fc2", (ALL, 2)), ("fc1", (3, 0))]))
    assert record.neurons == (2, 6), "neurons 0 and 3 share a block row"
    smaller, record = check(layer([("fc1", 1), ("fc1", (0, 3))], neurons=4))
    assert record.neurons == (0, 4)
    assert record.blocks[0] == 2, "those of fc2's column 1"
    assert smaller.fc1.bias[1] == 0
    smaller, record = check(layer([("fc2", (ALL, 2)), ("fc1", (3, 0))], neurons=4))
    assert record.neurons == (0, 4)
    assert record.blocks[0] == 1, "the one of neuron 2 alone"
    assert not smaller.fc1.weight.to_dense()[2].any()
    assert smaller.fc1.bias[2] == 0


def test_live_neurons_share_block_rows():
    dead = [("fc2", (ALL, j)) for j in (1, 2, 5)]
    smaller, record = check(layer(dead, neurons=8))
    assert record.neurons == (2, 8)
    assert smaller.fc1.weight.nnz_blocks == 3 * HIDDEN


def test_merging_keeps_to_blocks_of_fc2():
    weights = layer([("fc2", (ALL, slice(2, 6))), ("fc2", (ALL, 7))], block=(4, 2), neurons=12)
    smaller, record = check(weights)
    assert record.neurons == (4, 12)
    assert smaller.fc2.weight.nnz_blocks == weights.fc2.weight.nnz_blocks == 4


def test_a_constant_value_channel_goes_into_the_bias():
    weights = layer([("value", slice(0, 2))])
    smaller, record = check(weights)
    assert record.value_channels == (2, 8)
    assert smaller.value_rows == (0, 2, 6)
    expected = weights.output.bias + weights.output.weight.to_dense()[:, :2] @ weights.value.bias[:2]
    torch.testing.assert_close(smaller.output.bias, expected)


def test_a_value_channel_that_nobody_reads_goes():
    weights = layer([("output", (ALL, slice(6, 8)))])
    smaller, record = check(weights)
    assert record.value_channels == (2, 8)
    assert smaller.value_rows == (0, 4, 6)
    assert smaller.output.bias is weights.output.bias


def test_value_channels_do_not_change_heads():
    smaller, record = check(layer([("value", 0), ("value", 5)]))
    assert record.value_channels == (0, 8), "one dead channel in each head: no block row to save"
    smaller, record = check(layer([("value", 0), ("value", 3)]))
    assert record.value_channels == (2, 8)
    assert smaller.value_rows == (0, 2, 6)


@pytest.mark.parametrize(
    "zeros",
    [
        [("value", slice(0, 4))],
        [("output", (ALL, slice(0, 4)))],
        [("value", slice(0, 2)), ("output", (ALL, slice(2, 4)))],
    ],
)
def test_a_head_without_value_channels_goes_with_its_queries_and_keys(zeros):
    smaller, record = check(layer(zeros))
    assert record.heads == (1, 2)
    assert record.kept_heads == (1,)
    assert record.query_dims == (4, 8)
    assert smaller.query_rows == smaller.value_rows == (0, 4)


def test_an_empty_key_row_goes_with_its_query_row():
    weights = layer([("key", slice(4, 6))])
    assert weights.key.bias[4:6].all()
    assert weights.query.bias[4:6].all()
    smaller, record = check(weights)
    assert record.query_dims == (2, 8)
    assert smaller.query_rows == (0, 4, 6)


def test_an_empty_query_row_goes_only_without_bias():
    zeros = [("query", slice(4, 6))]
    smaller, record = check(layer(zeros, [("query", slice(4, 6), 0.0)]))
    assert record.query_dims == (2, 8)
    assert smaller.query_rows == (0, 4, 6)
    smaller, record = check(layer(zeros))
    assert record.query_dims == (0, 8)
    smaller, record = check(layer(zeros, [("query", 4, 0.0)]))
    assert record.query_dims == (0, 8)
    assert not smaller.key.weight.to_dense()[4].any(), "dimension 4 stays only for its block row's sake"


def test_a_head_without_query_dimensions_attends_uniformly():
    smaller, record = check(layer([("key", slice(0, 4))]))
    assert record.heads == (0, 2)
    assert smaller.query_rows == (0, 0, 4)
    assert smaller.value_rows == (0, 4, 8)


def test_heads_that_share_a_block_row():
    weights = layer([("value", slice(0, 3))])
    smaller, record = check(replace(weights, query_rows=(0, 3, 8), value_rows=(0, 3, 8)))
    assert smaller.value_rows == (0, 1, 6), "channel 2 is dead but shares its block row with the other head"
    smaller, record = check(replace(layer([("value", slice(0, 4))]), query_rows=(0, 3, 8)))
    assert record.kept_heads == (1,)
    assert smaller.query_rows == (0, 6), "so does dimension 2, now zeros in the head that is left"
    assert not smaller.query.weight.to_dense()[0].any()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_stored_blocks_of_zeros_go(name):
    weights = layer()
    projection = getattr(weights, name)
    values = projection.weight.values.clone()
    values[[0, 5]] = 0
    stored = replace(projection, weight=replace(projection.weight, values=values))
    smaller, record = check(replace(weights, **{name: stored}))
    assert record.blocks[0] == 2
    assert getattr(smaller, name).weight.nnz_blocks == projection.weight.nnz_blocks - 2


@pytest.mark.parametrize("dead", ["value", "output"])
def test_a_layer_that_is_a_bias(dead):
    weights = layer([(dead, ALL), ("fc1", ALL)], pre_norm=True)
    smaller, record = check(weights)
    assert record.attention_is_constant
    assert record.ffn_is_constant
    assert smaller.query_rows == smaller.value_rows == (0,)
    assert sum(getattr(smaller, name).weight.nnz_blocks for name in PROJECTIONS) == 0
    assert smaller.fc1.weight.shape == (0, HIDDEN)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(evaluate(weights, x), x + smaller.output.bias + smaller.fc2.bias)


def test_int8_weights_fold_as_dequantized():
    zeros = [("fc1", slice(0, 8)), ("fc2", (ALL, slice(8, 12))), ("value", slice(0, 4)), ("key", slice(4, 8))]
    weights = layer(zeros, block=(4, 4), dtype=torch.float32, neurons=16)
    quantized = {n: replace(getattr(weights, n), weight=getattr(weights, n).weight.quantize()) for n in PROJECTIONS}
    weights = replace(weights, **quantized)
    smaller, record = check(weights, tolerance=1e-6)
    assert record.neurons == (12, 16)
    assert record.kept_heads == (1,)
    assert smaller.query_rows == (0, 0)
    fc2 = weights.fc2.weight.to_dense().double()[:, :8]
    expected = weights.fc2.bias + fc2 @ F.gelu(weights.fc1.bias[:8].double())
    torch.testing.assert_close(smaller.fc2.bias, expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(smaller.fc1.weight.scales, weights.fc1.weight.scales[12:])


def test_bfloat16_weights_stay_bfloat16():
    weights = layer([("fc1", slice(2, 4)), ("output", (ALL, slice(0, 2)))], dtype=torch.bfloat16)
    weights = replace(
        weights, **{n: replace(getattr(weights, n), bias=getattr(weights, n).bias.float()) for n in PROJECTIONS}
    )
    smaller, record = check(weights, tolerance=1e-6)
    assert smaller.fc1.weight.values.dtype == torch.bfloat16
    assert record.neurons == (2, 6)
    assert record.value_channels == (2, 8)


@st.composite
def layers(draw):
    """Layers of hidden size 48 with heads of any sizes, projections in any blocks, full of empty rows and columns."""
    size = 48
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    density = draw(st.sampled_from([0.02, 0.1, 0.5, 1.0]))
    empty = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    def projection():
        n, k = (draw(st.sampled_from([1, 2, 3, 4, 8, 16])) for _ in range(2))
        stored = rand(size // n, size // k) < density
        stored[rand(size // n) < empty * draw(st.booleans())] = False
        stored[:, rand(size // k) < empty * draw(st.booleans())] = False
        mask = stored.repeat_interleave(n, 0).repeat_interleave(k, 1)
        dense = torch.randn(size, size, generator=generator, dtype=torch.float64) * mask / 8
        dense[rand(size) < empty * draw(st.booleans())] = 0
        dense[:, rand(size) < empty * draw(st.booleans())] = 0
        bias = torch.randn(size, generator=generator, dtype=torch.float64) * (rand(size) < 0.5)
        return SparseProjection(BlockSparse.from_dense(dense, (n, k), mask), bias)

    heads = draw(st.integers(1, 6))
    step = draw(st.sampled_from([1, 8, 16]))
    cuts = [sorted(draw(st.lists(st.integers(0, size // step), min_size=heads - 1, max_size=heads - 1))) for _ in "qv"]
    query_rows, value_rows = ((0, *(step * cut for cut in cut_list), size) for cut_list in cuts)
    norms = [tuple(torch.randn(2, size, generator=generator, dtype=torch.float64)) for _ in range(2)]
    activation, pre_norm = draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.booleans())
    projections = [projection() for _ in PROJECTIONS]
    return EncoderWeights(*projections, *norms, query_rows, value_rows, 0.25, activation, pre_norm=pre_norm)


@settings(deadline=None, max_examples=40)
@given(layers())
def test_any_layer_computes_the_same(weights):
    smaller, _ = check(weights)
    query, key, value, output, fc1, fc2 = (getattr(smaller, name) for name in PROJECTIONS)
    reads_query = nonzero_rows(query.weight) | (query.bias != 0)
    for rows, read, side in (
        (key, reads_query, query.weight.block[0]),
        (value, nonzero_columns(output.weight), output.weight.block[1]),
        (fc1, nonzero_columns(fc2.weight), fc2.weight.block[1]),
    ):
        live = nonzero_rows(rows.weight) & read
        assert live.view(-1, lcm(rows.weight.block[0], side)).any(1).all(), "a group without a live channel is left"
        assert not rows.weight.to_dense()[~live].any(), "a dead channel has weights"
        assert not rows.bias[~live].any(), "a dead channel has a bias"
    assert smaller.query_rows[-1] == query.weight.shape[0] == key.weight.shape[0]
    assert smaller.value_rows[-1] == value.weight.shape[0] == output.weight.shape[1]


@settings(deadline=None, max_examples=30)
@given(layers())
def test_any_pair_of_linears_computes_the_same(weights):
    fc1, fc2 = remove_dead_neurons(weights.value, weights.fc2, "relu")
    x = torch.randn(5, 48, dtype=torch.float64)
    expected = linear(weights.fc2, linear(weights.value, x).relu())
    torch.testing.assert_close(linear(fc2, linear(fc1, x).relu()), expected, rtol=1e-12, atol=1e-12)


def test_the_record_is_a_line_and_json():
    _, record = check(layer([("value", ALL), ("fc1", slice(2, 4))]))
    assert str(record) == (
        "removed 2 of 2 heads, 8 of 8 query/key dimensions, 8 of 8 value channels, 2 of 6 neurons, "
        "52 of 68 stored blocks; only a bias is left of attention"
    )
    data = json.loads(json.dumps(record.as_dict()))
    assert data["neurons"] == {"removed": 2, "of": 6}
    assert data["kept_heads"] == []
    assert data["attention_is_constant"]
    assert not data["ffn_is_constant"]
    assert {f.name for f in fields(record)} <= data.keys()


def test_errors():
    weights = layer()
    with pytest.raises(ValueError, match=r"remove_dead_neurons: expected an activation among none, .* got 'swish'"):
        remove_dead_neurons(weights.fc1, weights.fc2, "swish")
    with pytest.raises(ValueError, match="remove_dead_neurons: expected fc2 with 6 columns, got 8"):
        remove_dead_neurons(weights.fc1, weights.output)
    with pytest.raises(ValueError, match="remove_dead_weight: expected output with 8 columns, got 6"):
        remove_dead_weight(replace(weights, output=weights.fc2))
    with pytest.raises(ValueError, match="remove_dead_weight: expected key with 8 rows, got 6"):
        remove_dead_weight(replace(weights, key=weights.fc1))
    with pytest.raises(ValueError, match=r"expected query_rows to rise from 0 to 8, got \(0, 4\)"):
        remove_dead_weight(replace(weights, query_rows=(0, 4)))
    with pytest.raises(ValueError, match="expected value_rows for 2 heads, got 1"):
        remove_dead_weight(replace(weights, value_rows=(0, 8)))

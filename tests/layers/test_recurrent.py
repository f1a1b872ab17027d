"""SparseLSTM and SparseGRU against nn.LSTM and nn.GRU with the same zeros."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from sparsenlp import SparseGRU, SparseLinear, SparseLSTM

KINDS = {SparseLSTM: nn.LSTM, SparseGRU: nn.GRU}
BLOCK = (8, 1)
SPACE = [
    {"num_layers": layers, "bidirectional": both, "batch_first": batch_first, "bias": bias, "proj_size": projection}
    for layers, both, batch_first, bias, projection in itertools.product(
        (1, 2), (False, True), (False, True), (False, True), (0, 8)
    )
]
EACH = [(kind, options) for kind in KINDS for options in SPACE if kind is SparseLSTM or not options["proj_size"]]


def pruned(kind, input_size=12, hidden_size=16, block=BLOCK, **options):
    """torch's layer with most blocks of its weights zero."""
    torch.manual_seed(0)
    if not options.get("proj_size"):
        options.pop("proj_size", None)
    rnn = KINDS[kind](input_size, hidden_size, **options)
    n, k = block
    for name, weight in rnn.named_parameters():
        if name.startswith("weight"):
            keep = torch.rand(weight.shape[0] // n, weight.shape[1] // k) < 0.4
            weight.data *= keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    return rnn


def states(rnn, batch, kind, unbatched=False):
    cells = rnn.num_layers * (2 if rnn.bidirectional else 1)
    shape = (cells,) if unbatched else (cells, batch)
    h = torch.randn(*shape, rnn.proj_size or rnn.hidden_size, requires_grad=True)
    return (h, torch.randn(*shape, rnn.hidden_size, requires_grad=True)) if kind is SparseLSTM else h


def flat(results):
    y, after = results
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *after] if isinstance(after, tuple) else [y, after]


def total(results):
    return sum((r.cos() * torch.linspace(0.5, 1, r.numel()).view_as(r)).sum() for r in flat(results))


def check_same(sparse, dense, x, state):
    """Results and gradients of both layers agree."""
    got, expected = sparse(x, state), dense(x, state)
    assert type(got[0]) is type(expected[0])
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    inputs = [t for t in ((x, *state) if isinstance(state, tuple) else (x, state)) if isinstance(t, torch.Tensor)]
    inputs = [t for t in inputs if t.requires_grad]
    names = [name.removeprefix("weight_") for name, _ in dense.named_parameters() if name.startswith("weight")]
    matrices = [sparse.get_submodule(name) for name in names]
    ours = torch.autograd.grad(total(got), [*inputs, *(m.values for m in matrices)])
    theirs = torch.autograd.grad(total(expected), [*inputs, *(getattr(dense, f"weight_{name}") for name in names)])
    for a, b in zip(ours[: len(inputs)], theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for matrix, a, b in zip(matrices, ours[len(inputs) :], theirs[len(inputs) :], strict=True):
        n, k = matrix.block
        stored = b.unfold(0, n, n).unfold(1, k, k)[matrix.weight.row_indices(), matrix.col_indices.long()]
        torch.testing.assert_close(a, stored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), EACH)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_same_as_torch(kind, options):
    dense = pruned(kind, **options)
    sparse = kind.from_dense(dense, BLOCK)
    batch_first = options["batch_first"]
    x = torch.randn(*((3, 5) if batch_first else (5, 3)), 12, requires_grad=True)
    check_same(sparse, dense, x, None)
    check_same(sparse, dense, x, states(dense, 3, kind))
    unbatched = torch.randn(4, 12, requires_grad=True)
    check_same(sparse, dense, unbatched, states(dense, 1, kind, unbatched=True))
    packed = pack_padded_sequence(
        torch.randn(*((3, 5) if batch_first else (5, 3)), 12), [2, 5, 1], batch_first, enforce_sorted=False
    )
    check_same(sparse, dense, packed, states(dense, 3, kind))
    check_same(sparse, dense, pack_padded_sequence(torch.randn(5, 3, 12), [5, 2, 2]), None)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_streaming_continues_where_it_stopped(kind):
    layer = kind.from_dense(pruned(kind, num_layers=2), BLOCK)
    x = torch.randn(6, 1, 12)
    y, last = layer(x)
    parts, state = [], None
    for step in x:
        part, state = layer(step[None], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), y)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_only_in_training(kind):
    dense = pruned(kind, num_layers=2, dropout=0.5)
    sparse = kind.from_dense(dense, BLOCK)
    x = torch.randn(5, 3, 12)
    torch.manual_seed(1)
    first = flat(sparse(x))[0]
    torch.manual_seed(1)
    assert torch.equal(flat(sparse(x))[0], first)
    assert not torch.equal(flat(sparse(x))[0], first)
    torch.testing.assert_close(flat(sparse.eval()(x)), flat(dense.eval()(x)))
    dense, sparse = (rnn.train() for rnn in (dense, sparse))
    dense.dropout = sparse.dropout = 1.0
    torch.testing.assert_close(flat(sparse(x)), flat(dense(x)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masks_decide_what_is_stored(kind):
    dense = KINDS[kind](12, 16)
    mask = torch.zeros(dense.weight_ih_l0.shape)
    mask[:, 2] = 1
    sparse = kind.from_dense(dense, BLOCK, {"weight_ih_l0": mask})
    assert sparse.ih_l0.weight.nnz_blocks == mask.shape[0] // 8
    assert sparse.hh_l0.weight.density == 1
    dense.weight_ih_l0 *= mask
    x = torch.randn(5, 3, 12)
    torch.testing.assert_close(flat(sparse(x)), flat(dense(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_and_back(kind):
    dense = pruned(kind, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1, proj_size=0).eval()
    sparse = kind.from_dense(dense, BLOCK)
    again = sparse.to_dense()
    assert type(again) is KINDS[kind]
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert (again.batch_first, again.dropout, again.training) == (True, 0.1, False)
    assert sparse.ih_l0.bias is dense.bias_ih_l0


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_loads_into_another(kind):
    sparse = kind.from_dense(pruned(kind), BLOCK)
    state = sparse.state_dict()
    assert sorted(state) == [
        f"{name}.{tensor}"
        for name in ("hh_l0", "ih_l0")
        for tensor in ("bias", "col_indices", "crow_indices", "values")
    ]
    matrices = {
        name: SparseLinear(m.in_features, m.out_features, m.block, m.weight.nnz_blocks)
        for name, m in sparse.named_children()
    }
    other = kind(12, 16, matrices=matrices)
    other.load_state_dict(state)
    x = torch.randn(5, 3, 12)
    assert torch.equal(other(x)[0], sparse(x)[0])
    broken = copy.deepcopy(state)
    broken["hh_l0.col_indices"][0] = 1000
    with pytest.raises(ValueError, match="hh_l0: BlockSparse: expected col_indices"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_only_stored_blocks(kind):
    sparse = kind.from_dense(pruned(kind), BLOCK)
    before = sparse.to_dense().state_dict()
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
    x, target = torch.randn(6, 4, 12), torch.randn(6, 4, 16) / 4
    losses = []
    for _ in range(15):
        loss = (sparse(x)[0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = sparse.to_dense().state_dict()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(after[name] == 0, before[name] == 0)
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_int8(kind):
    dense = pruned(kind, block=(8, 4), num_layers=2, bidirectional=True)
    int8 = kind.from_dense(dense, (8, 4)).quantize()
    assert int8.ih_l0.values.dtype == torch.int8
    x = torch.randn(5, 3, 12)
    for a, b in zip(flat(int8(x)), flat(dense(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16_and_autocast(kind):
    dense = pruned(kind)
    x = torch.randn(5, 3, 12)
    expected = dense(x)[0]
    sparse = kind.from_dense(dense, BLOCK).bfloat16()
    torch.testing.assert_close(sparse(x.bfloat16())[0].float(), expected, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = sparse(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph(kind):
    layer = kind.from_dense(pruned(kind, num_layers=2), BLOCK)
    x = torch.randn(5, 3, 12)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_survives_deepcopy_and_to(kind):
    sparse = kind.from_dense(pruned(kind), BLOCK)
    x = torch.randn(5, 3, 12)
    assert torch.equal(copy.deepcopy(sparse)(x)[0], sparse(x)[0])
    double = copy.deepcopy(sparse).double()
    torch.testing.assert_close(double(x.double())[0].float(), sparse(x)[0])


def test_repr_and_flags():
    dense = pruned(SparseLSTM, num_layers=2, proj_size=8).eval().requires_grad_(False)
    sparse = SparseLSTM.from_dense(dense, BLOCK)
    assert "SparseLSTM(\n  12, 16, num_layers=2, proj_size=8" in repr(sparse)
    assert not sparse.training
    assert not any(p.requires_grad for p in sparse.parameters())
    assert sparse.flatten_parameters() is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseLSTM.from_dense(nn.GRU(8, 8), BLOCK), TypeError, "SparseLSTM: expected an nn.LSTM, got GRU"),
        (
            lambda: SparseGRU.from_dense(nn.GRU(8, 10), BLOCK),
            ValueError,
            "SparseGRU: weight_ih_l0: BlockSparse: expected a shape divisible by blocks of 8x1, got 30x8",
        ),
        (
            lambda: SparseGRU.from_dense(nn.GRU(8, 8), BLOCK, {"weight_l0": torch.ones(24, 8)}),
            ValueError,
            "expected masks of weights, got weight_l0",
        ),
        (
            lambda: SparseLSTM(8, 8, matrices={}),
            ValueError,
            "SparseLSTM: expected matrices ih_l0, hh_l0, got ",
        ),
        (
            lambda: SparseLSTM(
                8, 8, matrices={"ih_l0": SparseLinear(8, 32, BLOCK, 0), "hh_l0": SparseLinear(9, 32, BLOCK, 0)}
            ),
            ValueError,
            "expected hh_l0 of 32 x 8, got 32 x 9",
        ),
        (
            lambda: SparseLSTM(
                8, 8, bias=False, matrices={n: SparseLinear(8, 32, BLOCK, 0) for n in ("ih_l0", "hh_l0")}
            ),
            ValueError,
            "expected ih_l0 without a bias",
        ),
        (lambda: SparseGRU(8, 8, proj_size=2, matrices={}), ValueError, "expected no proj_size"),
        (lambda: SparseLSTM(8, 8, dropout=2.0, matrices={}), ValueError, "expected a dropout from 0 to 1, got 2.0"),
    ],
)
def test_errors_in_making(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(12),), ValueError, r"expected x of 2 or 3 dimensions, got shape \(12,\)"),
        ((torch.zeros(5, 3, 11),), ValueError, "expected input_size = 12 features, got 11"),
        ((torch.zeros(0, 3, 12),), ValueError, "expected at least one step"),
        ((torch.zeros(5, 3, 12).double(),), TypeError, "expected x of dtype torch.float32"),
        ((torch.zeros(5, 3, 12), torch.zeros(1, 2, 16)), ValueError, r"expected states of shape \(1, 3, 16\)"),
        ((torch.zeros(5, 12), torch.zeros(1, 1, 16)), ValueError, "expected states of 2 dimensions with unbatched x"),
    ],
)
def test_errors_in_calling(arguments, error, message):
    layer = SparseGRU.from_dense(pruned(SparseGRU), BLOCK)
    with pytest.raises(error, match="SparseGRU: " + message):
        layer(*arguments)


def test_sequences_without_steps_are_refused():
    """torch refuses to pack them; packed by hand they get the same kind of error."""
    layer = SparseGRU.from_dense(pruned(SparseGRU), BLOCK)
    with pytest.raises(ValueError, match="expected batch_sizes that never grow, stay above 0"):
        layer(PackedSequence(torch.zeros(4, 12), torch.tensor([2, 2, 0])))

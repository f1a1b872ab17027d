import copy

import pytest
import torch
from torch import nn

from sparsenlp import native
from sparsenlp.prune import NM, Block, Unstructured, masked_layers, prune_
from sparsenlp.train import RecoveryConfig, recover
from sparsenlp.train import sparse_steps as module
from sparsenlp.train.int8 import start_rounding, stop_rounding
from sparsenlp.train.sparse_steps import MAX_DENSITY, sparse_steps

needs_kernels = pytest.mark.skipif(not native.available, reason=f"no kernels: {native.why_unavailable}")


def masked(pattern, sparsity, rows=48, columns=32, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias))
    prune_(model, pattern, sparsity)
    return model


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """Sets whether the CPU has tiles, at first that it has none."""

    def have(tiles):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)

    have(False)
    return have


@pytest.fixture
def calls(monkeypatch):
    """How often the sparse op was called."""
    counted = []
    op = module.bsr_linear

    def count(*arguments):
        counted.append(arguments[3].shape)
        return op(*arguments)

    monkeypatch.setattr(module, "bsr_linear", count)
    return counted


def step(model, x):
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"y": y.detach(), "x": x.grad, **gradients}


@needs_kernels
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block", [(8, 1), (16, 2), (8, 8), (48, 1), (24, 4)], ids=lambda b: f"{b[0]}x{b[1]}")
def test_outputs_and_gradients_are_those_of_the_masked_weight(calls, block, bias):
    model = masked(Block(*block), 0.8, bias=bias)
    x = torch.randn(2, 5, 32)
    expected = step(model, x)
    with sparse_steps(model, True):
        found = step(model, x)
    assert len(calls) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@needs_kernels
def test_it_follows_masks_that_tighten_and_that_are_put_back(calls):
    model = masked(Block(8, 1), 0.5)
    x = torch.randn(7, 32)
    mask = masked_layers(model)["0"].parametrizations.weight[0].mask
    before = mask.clone()
    with sparse_steps(model, True):
        model(x)
        assert not calls, f"more than {MAX_DENSITY:.0%} is kept"
        for sparsity in (0.8, 0.95):
            prune_(model, Block(8, 1), sparsity)
            torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        assert [shape[0] for shape in calls] == [192 - round(sparsity * 192) for sparsity in (0.8, 0.95)]
        mask.copy_(before)
        model(x)
        assert len(calls) == 2


@needs_kernels
def test_int8_rounding_is_kept():
    model = masked(Block(8, 1), 0.8)
    x = torch.randn(7, 32)
    plain = model(x)
    with sparse_steps(model, True):
        start_rounding([model[0]])
        expected = nn.functional.linear(x, model[0].weight, model[0].bias)
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(model(x), expected)
        assert step(model, x)["0.parametrizations.weight.original"].any()
        stop_rounding([model[0]])
        torch.testing.assert_close(model(x), plain)


@needs_kernels
def test_it_computes_in_float32_under_autocast(calls):
    model = masked(Block(8, 1), 0.9)
    x = torch.randn(7, 32)
    with sparse_steps(model, True), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert model(x.bfloat16()).dtype == torch.float32
    assert len(calls) == 2
    torch.testing.assert_close(y, model(x))


@needs_kernels
@pytest.mark.parametrize(("tiles", "autocast", "sparse"), [(True, True, 1), (True, False, 2), (False, True, 2)])
def test_beside_amx_only_where_a_tenth_is_kept(calls, amx, tiles, autocast, sparse):
    amx(tiles)
    for sparsity in (0.8, 0.9):
        model = masked(Block(8, 1), sparsity)
        with sparse_steps(model, True), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(torch.randn(7, 32))
    assert len(calls) == sparse


@needs_kernels
def test_a_call_without_autocast_does_not_decide_for_later_ones(calls, amx):
    amx(True)
    model, x = masked(Block(8, 1), 0.8), torch.randn(7, 32)
    with sparse_steps(model, True):
        model(x)
        assert len(calls) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        assert len(calls) == 1


@pytest.mark.parametrize("pattern", [Block(4, 1), Unstructured(), NM(2, 4)], ids=str)
def test_other_patterns_stay_as_they_are(pattern):
    model = masked(pattern, min(0.9, pattern.max_sparsity))
    with sparse_steps(model, True):
        assert "forward" not in vars(model[0])


def test_layers_without_kernels_stay_as_they_are(monkeypatch):
    wide, off, absent = (masked(Block(8, 1), 0.9) for _ in range(3))
    with sparse_steps(wide.double(), True), sparse_steps(off, False):
        assert "forward" not in vars(wide[0]) | vars(off[0])
    monkeypatch.setattr(native, "available", False)
    with sparse_steps(absent, True):
        assert "forward" not in vars(absent[0])


@needs_kernels
def test_layers_are_put_back_after_an_error():
    model = masked(Block(8, 1), 0.9)

    def fail():
        with sparse_steps(model, True):
            assert "forward" in vars(model[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(model[0])


@needs_kernels
def test_recovery_ends_with_the_same_masks_and_nearly_the_same_weights(make_model, make_data, calls):
    dense, data = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), make_data()
    config = RecoveryConfig(
        epochs=3, batch_size=8, update_every=2, learning_rate=1e-3, sparsity=0.8, scope="local", bf16=False
    )
    models, losses = [], []
    for sparse in (False, True):
        model = copy.deepcopy(dense)
        losses.append(recover(model, dense, data, _with(config, sparse)).losses)
        models.append(model.state_dict())
        assert bool(calls) == sparse
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def _with(config, sparse):
    return RecoveryConfig(**(vars(config) | {"sparse_kernels": sparse}))

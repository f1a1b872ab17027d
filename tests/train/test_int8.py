import copy
import os
import signal

import pytest
import torch
from torch import nn

from sparsenlp.formats import BlockSparse
from sparsenlp.prune import Block, finalize_, masked_layers, prunable, prune_, sparsity_of
from sparsenlp.train import RecoveryConfig, predict, recover
from sparsenlp.train.int8 import is_rounded, round_to_int8, start_rounding, stop_rounding

CONFIG = RecoveryConfig(
    epochs=3,
    spliced=0.0,
    batch_size=8,
    update_every=2,
    learning_rate=1e-3,
    sparsity=0.75,
    int8_fraction=0.25,
    dropout=True,
)


def quantized(weight, block=(8, 1)):
    return BlockSparse.from_dense(weight, block).quantize().to_dense()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 7e8])
def test_rounding_is_what_quantizing_gives_and_then_quantizing_changes_nothing(scale):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    rounded = round_to_int8(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= 0.501 * step).all()
    same = torch.isclose(rounded, quantized(weight), rtol=2**-15, atol=0)
    assert same.float().mean() > 0.999, "only what lies half-way between two steps may be rounded to the other one"
    assert torch.equal(round_to_int8(rounded), rounded)
    assert torch.equal(quantized(rounded), rounded)
    assert not rounded[3].any()


def test_gradients_pass_straight_through_but_not_past_the_mask():
    layer = nn.Linear(16, 16)
    prune_(layer, Block(8, 1), 0.5, filter_fn=lambda module, name: True)
    start_rounding([layer])
    mask = layer.parametrizations.weight[0].mask
    coefficients = torch.randn(16, 16)
    (layer.weight * coefficients).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, coefficients * mask)
    assert not layer.weight[~mask].any()


def test_rounding_can_be_taken_back(make_model):
    model = make_model()
    prune_(model, Block(8, 1), 0.5)
    layers = list(masked_layers(model).values())
    names, before = list(model.state_dict()), [layer.weight.clone() for layer in layers]
    start_rounding(layers)
    start_rounding(layers)
    assert all(is_rounded(layer) and len(layer.parametrizations.weight) == 2 for layer in layers)
    assert list(model.state_dict()) == names, "a state does not tell whether weights are rounded"
    prune_(model, Block(8, 1), 0.75)
    assert sparsity_of(model) >= 0.75
    prune_(model, Block(8, 1), 0.75)
    stop_rounding(layers)
    stop_rounding(layers)
    assert not any(is_rounded(layer) for layer in layers)
    for layer, weight in zip(layers, before, strict=True):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], weight[kept])


def test_int8_layers_compute_with_the_trained_weights(make_model, make_data):
    dense, data = make_model(), make_data()
    model = copy.deepcopy(dense)
    recover(model, dense, data, CONFIG)
    assert all(is_rounded(layer) for layer in masked_layers(model).values())
    logits = predict(model, data)
    finalize_(model)
    assert not masked_layers(model)
    assert torch.equal(predict(model, data), logits)
    assert sparsity_of(model) >= 0.749
    for layer in prunable(model).values():
        assert torch.equal(quantized(layer.weight.detach()), layer.weight)


def test_without_it_quantizing_changes_the_weights(make_model, make_data):
    dense = make_model()
    model = copy.deepcopy(dense)
    recover(model, dense, make_data(), RecoveryConfig(**vars(CONFIG) | {"int8_fraction": 0.0}))
    finalize_(model)
    assert not all(torch.equal(quantized(layer.weight.detach()), layer.weight) for layer in prunable(model).values())


@pytest.mark.parametrize("step", [5, 18, 19, 24], ids=["in the ramp", "before int8", "first of int8", "last"])
def test_a_stopped_run_resumes_to_the_same_result(make_model, make_data, tmp_path, step):
    dense, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    validation = make_data(40, seed=1)

    def interrupt(info):
        if info.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    config = RecoveryConfig(**vars(CONFIG) | {"evaluate_every": 1})
    whole, resumed = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = recover(whole, dense, data, config, validation=validation)
    assert [e.step for e in expected.evaluations] == [19, 20, 21, 22, 23, 24], "only rounded states count"
    with pytest.raises(KeyboardInterrupt):
        recover(copy.deepcopy(dense), dense, data, config, None, path, on_step=interrupt, validation=validation)
    log = recover(resumed, dense, data, config, None, path, validation=validation)
    assert (log.losses, log.evaluations) == (expected.losses, expected.evaluations)
    assert torch.equal(predict(resumed, data), predict(whole, data))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_first_rounded_step_that_fails_is_undone(make_model, make_data):
    dense, data = make_model(), make_data()
    model, seen = copy.deepcopy(dense), []

    def explode(info):
        seen[:] = [layer.weight.clone() for layer in masked_layers(model).values()]
        if info.step == 18:
            model.classifier.bias.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(FloatingPointError, match="at step 19 of 24; the model is as after step 18"):
        recover(model, dense, data, CONFIG, on_step=explode)
    assert not any(is_rounded(layer) for layer in masked_layers(model).values())
    for layer, weight in zip(masked_layers(model).values(), seen, strict=True):
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("fraction", [-0.1, 0.6])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match=f"int8_fraction: expected at most 1 - ramp_fraction, got {fraction}"):
        RecoveryConfig(int8_fraction=fraction)

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparsenlp.prune import (
    NM,
    Block,
    GradientStatistics,
    Threshold,
    Unstructured,
    cubic_sparsity,
    finalize_,
    harden_,
    movement_,
    movement_penalty,
    prunable,
    prune_,
    sparsity_of,
)

PATTERNS = [Unstructured(), Block(4, 2), NM(2, 4)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def loss_of(model, seed=0):
    return model(torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))).square().sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_get_the_straight_through_gradient_and_weights_the_masked_one(pattern):
    """dL/dS = Σ over the unit of w · dL/d(masked w), masked or not."""
    model = mlp()
    mask = movement_(model, pattern)["0"]
    with torch.no_grad():
        mask.scores.copy_(torch.rand(mask.scores.shape))
    mask.sparsity = 0.5
    weight, kept = model[0].parametrizations.weight.original, mask.mask()
    assert 0 < kept.sum() < kept.numel()
    plain = mlp()
    with torch.no_grad():
        plain[0].weight *= kept
    loss_of(plain).backward()
    loss_of(model).backward()
    product = weight.detach() * plain[0].weight.grad
    torch.testing.assert_close(mask.scores.grad, pattern.scores(product) if isinstance(pattern, Block) else product)
    torch.testing.assert_close(weight.grad, plain[0].weight.grad * kept)


def test_trained_scores_are_the_movement_criterion_times_the_rate():
    model = mlp()
    masks = movement_(model, Unstructured())
    statistics = GradientStatistics(prunable(model), ["movement"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        statistics.update()
        optimizer.step()
    for name, mask in masks.items():
        torch.testing.assert_close(mask.scores.data / 0.01, statistics[name].movement)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_hard_movement_reaches_its_sparsity_and_hardens(pattern):
    model = mlp()
    parameters = {id(p) for p in model.parameters()}
    masks = movement_(model, pattern)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = []
    for step in range(20):
        for mask in masks.values():
            mask.sparsity = cubic_sparsity(step, 0, 10, 0.5)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        history.append(masks["0"].mask())
    assert any((later & ~earlier).any() for earlier, later in pairwise(history)), "some came back"
    x = torch.randn(3, 8)
    expected, kept = model(x), masks["0"].mask()
    assert harden_(model) is model
    torch.testing.assert_close(model(x), expected)
    assert {id(p) for p in model.parameters()} == parameters
    assert torch.equal(model[0].weight != 0, kept)
    prune_(model, pattern, 0.5)
    assert torch.equal(model[0].weight != 0, kept)
    assert sparsity_of(finalize_(model)) == 0.5


def test_soft_movement_prunes_what_the_loss_does_not_hold():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(64, 8) * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    y = x @ layer.weight.detach().T * 3
    masks = movement_(layer, Block(4, 1), Threshold(absolute=-0.5))
    assert masks[""].mask().all()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        ((layer(x) - y).square().sum(1).mean() + 2.0 * movement_penalty(masks)).backward()
        optimizer.step()
    assert masks[""].mask().all(dim=0).tolist() == [True] * 4 + [False] * 4


def test_the_penalty_by_hand():
    masks = movement_(mlp(), Unstructured())
    assert movement_penalty(masks).item() == pytest.approx(0.5)
    with torch.no_grad():
        masks["0"].scores.fill_(100.0)  # 128 of the 256 scores
    assert movement_penalty(masks).item() == pytest.approx(0.75)


def test_scores_follow_state_dict_and_deepcopy():
    model, other = mlp(), mlp()
    masks = movement_(model, Block(4, 2), 0.5)
    with torch.no_grad():
        masks["0"].scores.normal_()
    movement_(other, Block(4, 2), 0.5)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def tied():
    model = mlp()
    model.append(nn.Linear(8, 16))
    model[3].weight = model[0].weight
    return model


def pruned(model):
    prune_(model, Unstructured(), 0.5)
    return model


def torch_pruned(model):
    torch_prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


@pytest.mark.parametrize(
    ("model", "pattern", "sparsity", "message"),
    [
        (mlp(), Unstructured(), 1.0, r"in \[0, 1\), got 1.0"),
        (mlp(), NM(2, 4), 0.75, "at most 0.5 for 2:4, got 0.75"),
        (mlp(), Unstructured(), Threshold(alpha=0.5), "movement_: expected an absolute threshold"),
        (mlp(), Block(16, 1), 0.5, "movement_: 2: 16x1: expected a shape divisible"),
        (pruned(mlp()), Unstructured(), 0.5, "movement_: 0: expected a weight without a mask"),
        (torch_pruned(mlp()), Unstructured(), 0.5, "movement_: 0: expected a weight without a mask"),
        (tied(), Unstructured(), 0.5, "movement_: expected each layer to have its own weight, got one of 0 and 3"),
    ],
)
def test_errors_leave_the_model_untouched(model, pattern, sparsity, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        movement_(model, pattern, sparsity)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_prune_refuses_masks_under_training():
    model = mlp()
    movement_(model, Unstructured())
    with pytest.raises(ValueError, match="0: expected a plain weight, got one parametrized by MovementMask"):
        prune_(model, Unstructured(), 0.5)

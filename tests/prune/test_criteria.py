"""Each criterion by a case computed by hand, and by the property that defines it."""

import math

import pytest
import torch
from torch import nn

from sparsenlp.prune import (
    CRITERIA,
    NM,
    Block,
    Criterion,
    GradientStatistics,
    InputStatistics,
    LayerStatistics,
    Unstructured,
    prunable,
    prune_,
    sparsity_of,
)

W = torch.tensor([[1.0, -2.0], [0.0, 4.0]])

BY_HAND = {
    "magnitude": ({}, [[1, 2], [0, 4]]),
    "relative": ({}, [[1 / 7, 2 / 7], [0, 4 / 7]]),
    "gradient": ({"gradient_sum": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]]),
    "taylor": ({"taylor": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]]),
    "fisher": ({"gradient_square": [[1, 2], [3, 0.5]]}, [[1, 8], [0, 8]]),
    "snip": ({"connection": [[1, 2], [3, 4]]}, [[1, 2], [3, 4]]),
    "movement": ({"movement": [[1, -2], [3, -4]]}, [[1, -2], [3, -4]]),
    "wanda": ({"input_square": [9, 0.25]}, [[3, 1], [0, 2]]),
}
"""Criterion -> (statistics of W, scores); "random" has none."""


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    fields, expected = BY_HAND[name]
    assert tuple(fields) == CRITERIA[name].needs
    statistics = LayerStatistics(**{field: torch.tensor(value).float() for field, value in fields.items()})
    torch.testing.assert_close(CRITERIA[name].score(W, statistics), torch.tensor(expected).float())


def test_every_criterion_has_a_case():
    assert set(BY_HAND) | {"random"} == set(CRITERIA)


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.needs])
def test_missing_statistics_are_refused(name):
    with pytest.raises(ValueError, match=f"statistics: expected {CRITERIA[name].needs[0]}, got None"):
        CRITERIA[name].score(W, LayerStatistics())


def model_and_inputs(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), torch.randn(5, 8)


def loss_of(model, x):
    return model(x).square().sum()


@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 1), NM(2, 4)], ids=str)
@pytest.mark.parametrize("scope", ["local", "row", "global"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_goes_with_every_pattern_and_scope(name, scope, pattern):
    model, x = model_and_inputs()
    layers = prunable(model)
    gradients = GradientStatistics(layers, GradientStatistics.fields_offered)
    inputs = InputStatistics(layers)
    with inputs.observing():
        loss_of(model, x).backward()
    gradients.update()
    statistics = inputs if name == "wanda" else gradients
    prune_(model, pattern, 0.5, name, scope, statistics=statistics)
    assert sparsity_of(model) == 0.5


def test_relative_does_not_see_the_scale_of_a_layer():
    statistics = LayerStatistics()
    score = CRITERIA["relative"].score
    torch.testing.assert_close(score(1000 * W, statistics), score(W, statistics))
    assert score(W, statistics).sum() == pytest.approx(1)
    assert not score(torch.zeros(2, 2), statistics).any()


def test_random_is_seeded_and_blind_to_the_weight():
    score = CRITERIA["random"].score
    torch.manual_seed(3)
    first, second = score(W, LayerStatistics()), score(W, LayerStatistics())
    torch.manual_seed(3)
    assert torch.equal(score(100 * W, LayerStatistics()), first)
    assert not torch.equal(first, second)


def test_taylor_keeps_what_the_loss_depends_on_whatever_its_size():
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(10.0)
        model[0].weight[:, 0] = 0.1
    statistics = GradientStatistics(prunable(model))
    model(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).sum().backward()
    statistics.update()
    prune_(model, Block(8, 1), 0.75, criterion="taylor", statistics=statistics)
    assert (model[0].weight != 0).nonzero()[:, 1].unique().tolist() == [0]


def test_gradient_scores_do_not_see_the_weight_itself():
    """y = w x, so that dL/dw is x whatever w is."""
    layer = nn.Linear(3, 1, bias=False)
    statistics = GradientStatistics({"": layer}, ["gradient_sum"])
    for x in ([1.0, -2.0, 0.0], [1.0, 2.0, -0.5]):
        layer.zero_grad()
        layer(torch.tensor([x])).sum().backward()
        statistics.update()
    assert CRITERIA["gradient"].score(layer.weight, statistics[""]).tolist() == [[2.0, 4.0, 0.5]]


def test_half_the_fisher_score_is_the_loss_that_a_weight_costs():
    """For the log-likelihood of a Gaussian at its optimum the empirical Fisher is the Hessian in expectation."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 2) * torch.tensor([1.0, 3.0])
    truth = torch.tensor([[0.5, -0.25]])
    y = x @ truth.T + torch.randn(len(x), 1)
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(truth)
    gradients = (x @ truth.T - y) * x
    score = CRITERIA["fisher"].score(layer.weight.data, LayerStatistics(gradient_square=gradients.square().mean(0)))

    def loss(weight):
        return 0.5 * (x @ weight.T - y).square().mean()

    for i in range(2):
        without = truth.clone()
        without[0, i] = 0
        cost = (loss(without) - loss(truth)).item()
        assert score[0, i].item() / 2 == pytest.approx(cost, rel=0.1)


def test_snip_is_the_gradient_with_respect_to_the_mask():
    model, x = model_and_inputs()
    layer = model[0]
    mask = torch.ones(16, 8, requires_grad=True)
    hidden = torch.nn.functional.linear(x, layer.weight.detach() * mask, layer.bias)
    model[2](model[1](hidden)).square().sum().backward()
    model.zero_grad()
    statistics = GradientStatistics({"0": layer}, ["connection"])
    for part in x.split(2):
        loss_of(model, part).backward()
        statistics.update()
        model.zero_grad()
    torch.testing.assert_close(CRITERIA["snip"].score(layer.weight, statistics["0"]), mask.grad.abs())


class StraightThrough(torch.autograd.Function):
    """Keep the weights whose scores are in the top half; the gradient goes to the scores as if they were the mask."""

    @staticmethod
    def forward(ctx, scores):
        return (scores >= scores.median()).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_movement_is_what_straight_through_training_adds_to_the_scores():
    """Sanh et al. 2020: S is stepped by -lr · dL/dS, with dL/dS = dL/dW' · W, while W' = W · mask(S) trains too."""
    torch.manual_seed(0)
    x, y, rate = torch.randn(30, 6), torch.randn(30, 4), 0.05
    weight = torch.randn(4, 6, requires_grad=True)
    scores = torch.randn(4, 6, requires_grad=True)
    start = scores.detach().clone()
    shadow = nn.Linear(6, 4, bias=False)
    statistics = GradientStatistics({"": shadow}, ["movement"])
    for _ in range(5):
        masked = weight * StraightThrough.apply(scores)
        masked.retain_grad()
        (x @ masked.T - y).square().mean().backward()
        shadow.weight.data.copy_(weight.detach())
        shadow.weight.grad = masked.grad
        statistics.update()
        with torch.no_grad():
            for tensor in (scores, weight):
                tensor -= rate * tensor.grad
                tensor.grad = None
    moved = (scores.detach() - start) / rate
    torch.testing.assert_close(CRITERIA["movement"].score(weight, statistics[""]), moved)


def test_movement_is_positive_where_a_weight_grows():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.fill_(1.0)
    layer(torch.tensor([[1.0, -1.0]])).sum().backward()
    statistics = GradientStatistics({"": layer}, ["movement"])
    statistics.update()
    assert statistics[""].movement.tolist() == [[-1.0, 1.0]]  # a step of descent takes the first towards zero


def test_wanda_is_invariant_to_moving_scale_between_a_layer_and_its_inputs():
    """y = (w / s) (s x): the function is the same, and so is the score."""
    torch.manual_seed(0)
    weight, x, scale = torch.randn(4, 6), torch.randn(50, 6), torch.rand(6) * 10 + 0.1

    def score(weight, x):
        return CRITERIA["wanda"].score(weight, LayerStatistics(input_square=x.square().mean(0)))

    torch.testing.assert_close(score(weight / scale, x * scale), score(weight, x))


def test_wanda_in_its_own_scope_is_the_paper_s_mask():
    """|W| · ||x||, the lowest half of every row."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5, bias=False), torch.randn(20, 8)
    expected = (layer.weight.abs() * x.norm(dim=0)).detach()
    order = expected.argsort(dim=1)
    keep = torch.ones_like(expected, dtype=torch.bool).scatter_(1, order[:, :4], False)
    statistics = InputStatistics({"": layer})
    with statistics.observing():
        layer(x)
    prune_(layer, Unstructured(), 0.5, "wanda", CRITERIA["wanda"].scope, statistics=statistics)
    assert torch.equal(layer.weight != 0, keep)


def test_magnitude_of_a_block_is_its_norm_unless_another_aggregation_is_asked_for():
    layer = nn.Linear(2, 2, bias=False)
    kept = {}
    for aggregation in (None, "l2", "sum", "mean"):
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.data.copy_(torch.tensor([[3.0, 2.2], [0.0, 2.0]]))
        prune_(layer, Block(2, 1), 0.5, aggregation=aggregation)
        kept[aggregation] = int((layer.weight[0] != 0).nonzero())
    assert math.hypot(2.2, 2.0) < 3.0 < 2.2 + 2.0
    assert kept == {None: 0, "l2": 0, "sum": 1, "mean": 1}


def test_a_criterion_of_one_s_own():
    layer = nn.Linear(4, 1, bias=False)
    first = Criterion(lambda weight, statistics: torch.arange(4.0)[None])
    prune_(layer, Unstructured(), 0.5, first)
    assert (layer.weight != 0).tolist() == [[False, False, True, True]]
    with pytest.raises(ValueError, match=r"expected scores of shape \(1, 4\), that of the weight, got \(4,\)"):
        prune_(layer, Unstructured(), 0.5, Criterion(lambda weight, statistics: weight[0]))

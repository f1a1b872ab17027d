import math

import pytest
import torch
from torch import nn

from sparsenlp.layers.composite import join_composites_, split_composites_
from sparsenlp.prune import NM, Block, Unstructured, proximal_step_, prunable, prune_, sparsity_of


def layer_of(weight):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def test_single_weights_by_hand():
    layer = layer_of([[1.0, -2.0, 0.25], [0.0, 0.5, -0.5]])
    proximal_step_({"": layer}, Unstructured(), 0.5)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.0, 0.0]]))


def test_blocks_by_hand():
    """Norms 5 and 1, sqrt(2) · 1 off each."""
    layer = layer_of([[3.0, 0.6], [4.0, 0.8]])
    proximal_step_({"": layer}, Block(2, 1), 1.0)
    scale = 1 - math.sqrt(2) / 5
    torch.testing.assert_close(layer.weight.data, torch.tensor([[3 * scale, 0.0], [4 * scale, 0.0]]))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2)], ids=str)
def test_the_step_minimizes_its_objective(pattern):
    """prox(w) = argmin_v ||v - w||² / 2 + strength · Σ sqrt(n k) ||v_b||: no point near it is better."""
    torch.manual_seed(0)
    weight, strength = torch.randn(8, 6, dtype=torch.float64), 0.7
    layer = layer_of(weight).double()
    start = layer.weight.data.clone()
    proximal_step_({"": layer}, pattern, strength)

    def objective(v):
        norms = pattern.scores(v.abs(), "l2")
        return (v - start).square().sum() / 2 + strength * math.sqrt(v.numel() / norms.numel()) * norms.sum()

    least = objective(layer.weight.data)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            assert objective(layer.weight.data + size * torch.randn_like(start)) > least


def test_proximal_gradient_descent_solves_the_lasso():
    """With orthonormal inputs the solution is the soft threshold of X'y."""
    torch.manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(20, 6)).Q
    targets, factor, rate = torch.randn(20, 3), 0.3, 0.5
    layer = layer_of(torch.randn(3, 6))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (layer(inputs) - targets).square().sum()).backward()
        optimizer.step()
        proximal_step_({"": layer}, Unstructured(), rate * factor)
    least_squares = targets.T @ inputs
    solution = least_squares.sign() * (least_squares.abs() - factor).clamp_min(0)
    assert (solution == 0).any()
    torch.testing.assert_close(layer.weight.data, solution)


def test_group_lasso_makes_whole_blocks_zero_that_relative_importance_then_prunes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(64, 8) * torch.tensor([1.0, 1, 1, 1, 0.01, 0.01, 0.01, 0.01])
    y = x @ torch.randn(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        proximal_step_(prunable(model), Block(8, 1), 0.2 * 0.01)
    zero = (model[0].weight == 0).view(2, 8, 8).all(dim=1)
    assert zero[:, 4:].all(), "what reads the inputs that carry nothing is zero"
    assert not zero[:, :4].all()
    found = sparsity_of(model)
    before = [layer.weight.clone() for layer in prunable(model).values()]
    prune_(model, Block(8, 1), found, "relative", "global")
    assert all(torch.equal(layer.weight, w) for layer, w in zip(prunable(model).values(), before, strict=True))


def test_a_mask_stays_and_a_shared_weight_shrinks_once():
    layer, other = layer_of(torch.full((4, 4), 2.0)), nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    proximal_step_({"a": layer, "b": other}, Unstructured(), 0.5)
    assert (layer.weight == 1.5).all()
    masked = layer_of(torch.full((4, 4), 2.0))
    prune_(masked, Block(2, 2), 0.5)
    pruned = masked.weight == 0
    proximal_step_({"": masked}, Block(2, 2), 0.25)
    assert torch.equal(masked.weight == 0, pruned)
    torch.testing.assert_close(masked.weight[~pruned], torch.full((8,), 1.75))


def test_strength_zero_changes_nothing():
    layer = layer_of([[0.0, 1.0], [-3.0, 0.0]])
    proximal_step_({"": layer}, Block(2, 1), 0.0)
    assert layer.weight.tolist() == [[0.0, 1.0], [-3.0, 0.0]]


@pytest.mark.parametrize(
    ("pattern", "strength", "message"),
    [
        (Unstructured(), -1.0, "expected a finite strength >= 0, got -1"),
        (Unstructured(), float("nan"), "expected a finite strength >= 0, got nan"),
        (NM(2, 4), 0.1, "expected single weights or blocks, got pattern 2:4"),
        (Block(3, 1), 0.1, "second: 3x1: expected a shape divisible"),
    ],
)
def test_errors_change_nothing(pattern, strength, message):
    layers = {"first": layer_of(torch.ones(6, 4)), "second": layer_of(torch.ones(4, 4))}
    with pytest.raises(ValueError, match=f"proximal_step_: {message}"):
        proximal_step_(layers, pattern, strength)
    assert all((layer.weight == 1).all() for layer in layers.values())


def test_a_copy_of_a_convolution_is_refused_and_its_split_weight_is_not():
    """The copy that `prunable` gives for nn.Conv1d would take the step and leave the model as it was."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3))
    with pytest.raises(ValueError, match=r"expected weights that are trained, got 0\.filters, which takes no gradient"):
        proximal_step_(prunable(model), Unstructured(), 10.0)
    split_composites_(model)
    proximal_step_(prunable(model), Unstructured(), 10.0)
    assert not join_composites_(model)[0].weight.any()

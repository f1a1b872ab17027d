import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsenlp.prune import NM, Block, EmpiricalFisher, Unstructured, block_obs_, finalize_, masked_layers, prune_
from sparsenlp.prune.fisher import group_width
from sparsenlp.prune.reconstruct import arrange


def gradients(count, shape=(4, 6)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 1), NM(1, 2)], ids=str)
def test_the_inverse_is_that_of_the_sum_of_outer_products(pattern):
    fisher = EmpiricalFisher((4, 6), pattern, samples=5, group_size=6, dampening=0.1)
    groups = []
    for gradient in gradients(5):
        fisher.update(gradient)
        groups.append(arrange(gradient, pattern).view(4, 6))
    rows = torch.stack(groups)  # [S, G, B]
    expected = torch.einsum("sga,sgb->gab", rows, rows) / 5 + 0.1 * torch.eye(6)
    torch.testing.assert_close(fisher.inverse, expected.inverse(), atol=1e-4, rtol=1e-4)


def test_groups_hold_whole_units_and_divide_the_weight():
    assert group_width((64, 48), Unstructured(), 32) == 32
    assert group_width((6, 5), Unstructured(), 32) == 30
    assert group_width((7, 7), Unstructured(), 32) == 7
    assert group_width((64, 48), Block(8, 1), 30) == 24
    assert group_width((64, 48), Block(16, 4), 32) == 64


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def data(count=64):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 16, generator=generator)
    inputs = torch.randn(count, 4, generator=generator) @ mix + 0.1 * torch.randn(count, 16, generator=generator)
    return [(inputs[i : i + 1], torch.tensor([i % 8])) for i in range(count)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def total(model):
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in data())


def fitted():
    """Near a minimum, where the Fisher stands for the Hessian."""
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 1)], ids=str)
def test_the_loss_rises_less_than_by_magnitude(pattern):
    model, other = fitted(), fitted()
    sparsities = block_obs_(model, data(), pattern, 0.5, loss, dampening=1e-4)
    prune_(other, pattern, 0.5)
    assert sparsities == {"0": 0.5, "2": 0.5}
    assert masked_layers(model).keys() == {"0", "2"}
    assert total(model) < total(other)


def test_the_memory_limit_changes_nothing():
    model, other = classifier(), classifier()
    block_obs_(model, data(), Block(4, 1), 0.5, loss)
    block_obs_(other, data(), Block(4, 1), 0.5, loss, memory=1)
    finalize_(model), finalize_(other)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_gradients_and_what_is_trainable_stay_as_they_were():
    model = classifier()
    model[0].weight.requires_grad_(False)
    block_obs_(model, data(8), Unstructured(), 0.5, loss)
    finalize_(model)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def nan_loss(model, batch):
    return loss(model, batch) * float("nan")


def first_layer_loss(model, batch):
    return model[0](batch[0]).square().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "block_obs_: expected at least one batch, got none"),
        ({"sparsity": 1.0}, "sparsity: expected a fraction"),
        ({"pattern": Block(5, 1)}, "block_obs_: 0: 5x1: expected a shape divisible"),
        ({"loss": nan_loss}, "EmpiricalFisher: expected a finite gradient .* NaN"),
        ({"loss": first_layer_loss}, "block_obs_: expected a gradient in 2, got none"),
        ({"dampening": 0.0}, "expected a group_size of at least 1 and a dampening above 0, got 32 and 0.0"),
        ({"group_size": 0}, "expected a group_size of at least 1"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = classifier()
    arguments = {"batches": data(8), "pattern": Unstructured(), "sparsity": 0.5, "loss": loss} | arguments
    with pytest.raises(ValueError, match=message):
        block_obs_(model, **arguments)
    assert all(torch.equal(value, classifier().state_dict()[name]) for name, value in model.state_dict().items())


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected a finite gradient of shape \(4, 6\), got shape \(6, 4\)"):
        EmpiricalFisher((4, 6), Unstructured(), 1).update(torch.ones(6, 4))
    with pytest.raises(ValueError, match="expected at least one gradient, got 0"):
        EmpiricalFisher((4, 6), Unstructured(), 0)

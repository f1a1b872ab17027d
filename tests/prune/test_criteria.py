import pytest
import torch
from torch import nn

from sparsenlp.prune import Block, GradientStatistics, Unstructured, prunable, prune_
from sparsenlp.prune.criteria import magnitude, taylor


def model_and_loss(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(5, 8)
    return model, lambda: model(x).square().sum()


def test_magnitude_is_the_square():
    assert torch.equal(magnitude(torch.tensor([[-3.0, 2.0]])), torch.tensor([[9.0, 4.0]]))


def test_statistics_are_a_running_mean_of_weight_times_gradient():
    model, loss = model_and_loss()
    statistics = GradientStatistics(prunable(model), decay=0.75)
    expected = None
    for _ in range(3):
        loss().backward()
        product = (model[0].weight * model[0].weight.grad).abs().detach()
        expected = product if expected is None else 0.75 * expected + 0.25 * product
        statistics.update()
        with torch.no_grad():
            model[0].weight -= 0.01 * model[0].weight.grad
        model.zero_grad()
    torch.testing.assert_close(statistics.means["0"], expected)
    assert statistics.updates == 3


def test_statistics_see_the_masked_weight():
    model, loss = model_and_loss()
    prune_(model, Unstructured(), 0.5)
    statistics = GradientStatistics(prunable(model))
    loss().backward()
    statistics.update()
    for name, layer in prunable(model).items():
        pruned = layer.weight == 0
        assert pruned.any()
        assert (statistics.means[name][pruned] == 0).all()
        assert (statistics.means[name][~pruned] > 0).any()


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


def test_state_round_trip():
    model, loss = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    loss().backward()
    statistics.update()
    other = GradientStatistics(prunable(model_and_loss(seed=1)[0]))
    other.load_state_dict(statistics.state_dict())
    assert other.updates == 1
    assert all(torch.equal(other.means[name], mean) for name, mean in statistics.means.items())


def test_update_without_gradients_is_refused():
    model, _ = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    with pytest.raises(RuntimeError, match="expected a gradient in 0, got None"):
        statistics.update()
    assert statistics.updates == 0


def test_state_of_other_layers_is_refused():
    model, _ = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    with pytest.raises(ValueError, match="expected a state of the same layers"):
        statistics.load_state_dict({"updates": torch.tensor(1)})
    wrong = statistics.state_dict() | {"means.2": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"means.2 of shape \(8, 16\), got \(2, 2\)"):
        statistics.load_state_dict(wrong)


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
        GradientStatistics({}, decay=1.0)


def test_taylor_without_statistics_is_refused():
    with pytest.raises(ValueError, match="taylor: expected statistics"):
        taylor(torch.ones(2, 2), None)

import pytest
import torch
from torch import nn

from sparsenlp.prune import (
    GradientStatistics,
    InputStatistics,
    LayerStatistics,
    Unstructured,
    collector,
    fisher_from_adam,
    prunable,
    prune_,
)


def model_and_loss(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(5, 8)
    return model, lambda: model(x).square().sum()


@pytest.mark.parametrize("decay", [0.75, None])
def test_gradient_statistics_over_three_steps(decay):
    model, loss = model_and_loss()
    statistics = GradientStatistics(prunable(model), GradientStatistics.fields_offered, decay)
    products, gradients = [], []
    for _ in range(3):
        loss().backward()
        gradients.append(model[0].weight.grad.clone())
        products.append((model[0].weight * gradients[-1]).detach())
        statistics.update()
        with torch.no_grad():
            model[0].weight -= 0.01 * gradients[-1]
        model.zero_grad()

    def mean(values):
        if decay is None:
            return torch.stack(values).mean(0)
        return decay * (decay * values[0] + (1 - decay) * values[1]) + (1 - decay) * values[2]

    found = statistics["0"]
    torch.testing.assert_close(found.taylor, mean([p.abs() for p in products]))
    torch.testing.assert_close(found.gradient_square, mean([g.square() for g in gradients]))
    torch.testing.assert_close(found.gradient_sum, sum(g.abs() for g in gradients))
    torch.testing.assert_close(found.connection, sum(products).abs())
    torch.testing.assert_close(found.movement, -sum(products))
    assert statistics.seen == {"0": 3, "2": 3}


def test_only_what_is_asked_for_is_kept():
    model, loss = model_and_loss()
    statistics = GradientStatistics(prunable(model), ["gradient_sum"])
    loss().backward()
    statistics.update()
    assert statistics["0"].gradient_sum is not None
    assert statistics["0"].taylor is None
    assert sorted(statistics.state_dict()) == ["gradient_sum.0", "gradient_sum.2", "seen"]


def test_statistics_are_empty_until_the_first_update():
    model, loss = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    assert not statistics
    assert "0" not in statistics
    loss().backward()
    statistics.update()
    assert list(statistics) == ["0", "2"]


def test_statistics_see_the_masked_weight():
    model, loss = model_and_loss()
    prune_(model, Unstructured(), 0.5)
    statistics = GradientStatistics(prunable(model))
    loss().backward()
    statistics.update()
    for name, layer in prunable(model).items():
        pruned = layer.weight == 0
        assert pruned.any()
        assert (statistics[name].taylor[pruned] == 0).all()
        assert (statistics[name].taylor[~pruned] > 0).any()


def test_bfloat16_gradients_are_accumulated_in_float32():
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    statistics = GradientStatistics({"": layer}, ["gradient_sum"])
    for _ in range(300):
        layer.weight.grad = torch.ones(1, 1, dtype=torch.bfloat16)
        statistics.update()
    assert statistics[""].gradient_sum.item() == 300  # bfloat16 sums stop at 256


def test_update_without_gradients_is_refused():
    model, _ = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    with pytest.raises(RuntimeError, match="expected a gradient in 0, got None"):
        statistics.update()
    assert not statistics


@pytest.mark.parametrize("kind", [GradientStatistics, InputStatistics])
def test_state_round_trip(kind):
    model, loss = model_and_loss()
    statistics = kind(prunable(model), kind.fields_offered)
    with statistics.observing():
        loss().backward()
    statistics.update()
    other = kind(prunable(model_and_loss(seed=1)[0]), kind.fields_offered)
    other.load_state_dict(statistics.state_dict())
    assert other.seen == statistics.seen
    for name, found in statistics.items():
        for field in kind.fields_offered:
            assert torch.equal(getattr(other[name], field), getattr(found, field))


def test_state_of_other_layers_is_refused():
    model, _ = model_and_loss()
    statistics = GradientStatistics(prunable(model))
    with pytest.raises(ValueError, match="expected a state of the same layers"):
        statistics.load_state_dict({"seen": torch.tensor([1])})
    wrong = statistics.state_dict() | {"taylor.2": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"taylor.2 of shape \(8, 16\), got \(2, 2\)"):
        statistics.load_state_dict(wrong)
    assert not statistics


@pytest.mark.parametrize("kind", [GradientStatistics, InputStatistics])
def test_decay_out_of_range_is_refused(kind):
    with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
        kind({}, decay=1.0)


@pytest.mark.parametrize("fields", [[], ["input_square"], ["taylor", "luck"]])
def test_unknown_fields_are_refused(fields):
    with pytest.raises(ValueError, match="GradientStatistics: expected fields among taylor, "):
        GradientStatistics({}, fields)


def test_collector_chooses_by_field():
    assert collector({}, ()) is None
    assert isinstance(collector({}, ("movement",)), GradientStatistics)
    assert isinstance(collector({}, ("input_gram",)), InputStatistics)
    with pytest.raises(ValueError, match="InputStatistics: expected fields among"):
        collector({}, ("input_gram", "taylor"))


def test_input_statistics_are_means_over_tokens():
    model, _ = model_and_loss()
    statistics = InputStatistics(prunable(model), ["input_square", "input_gram"])
    batches = [torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(1, 7, 8)]
    for batch in batches:
        with statistics.observing():
            model(batch)
    for name, run in (("0", lambda x: x), ("2", model[:2])):
        tokens = torch.cat([run(batch).reshape(-1, model[int(name)].in_features) for batch in batches]).detach()
        torch.testing.assert_close(statistics[name].input_square, tokens.square().mean(0))
        torch.testing.assert_close(statistics[name].input_gram, tokens.T @ tokens / len(tokens))
    assert statistics.seen == {"0": 17, "2": 17}


def test_input_statistics_keep_float32_under_autocast():
    model, _ = model_and_loss()
    statistics, x = InputStatistics({"0": model[0]}, InputStatistics.fields_offered), torch.randn(50, 8)
    with torch.autocast("cpu", torch.bfloat16), statistics.observing():
        model(x)
    torch.testing.assert_close(statistics["0"].input_square, x.square().mean(0))
    torch.testing.assert_close(statistics["0"].input_gram, x.T @ x / 50)


def test_decaying_input_statistics_count_forward_passes():
    layer = nn.Linear(1, 1)
    statistics = InputStatistics({"": layer}, decay=0.75)
    for x in (1.0, 2.0):
        with statistics.observing():
            layer(torch.full((5, 1), x))
    assert statistics[""].input_square.item() == pytest.approx(0.75 * 1 + 0.25 * 4)


def test_padding_is_left_out():
    model, _ = model_and_loss()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = 1e6
    statistics = InputStatistics(prunable(model))
    with statistics.observing(mask):
        model(x)
        model(x.flatten(0, 1))
    torch.testing.assert_close(statistics["0"].input_square, x[mask == 1].square().mean(0))
    assert statistics.seen["0"] == 6


def test_a_batch_of_nothing_but_padding_counts_nothing():
    model, _ = model_and_loss()
    statistics = InputStatistics(prunable(model))
    with statistics.observing(torch.zeros(2, 3)):
        model(torch.randn(2, 3, 8))
    assert not statistics


def test_inputs_that_the_mask_does_not_fit_are_refused():
    model, _ = model_and_loss()
    statistics = InputStatistics(prunable(model))
    with (
        pytest.raises(ValueError, match=r"expected 6 tokens in 0, as in attention_mask, got inputs of shape \(2, 8\)"),
        statistics.observing(torch.ones(2, 3)),
    ):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8))
    assert not statistics, "no hook is left"


def test_fisher_from_adam_is_what_the_gradients_say():
    """Adam's second moment decays from zero, the collected mean from the first value: both agree on constant gradients,
    and on any once the first steps are forgotten."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.9))
    statistics = GradientStatistics({"": layer}, ["gradient_square"], decay=0.9)
    constant = torch.randn(3, 4)
    for step in range(200):
        layer.weight.grad = constant if step < 3 else torch.randn(3, 4)
        statistics.update()
        optimizer.step()
        if step == 2:
            found = fisher_from_adam(optimizer, {"": layer})[""].gradient_square
            torch.testing.assert_close(found, constant.square())
    found = fisher_from_adam(optimizer, {"": layer})[""].gradient_square
    torch.testing.assert_close(found, statistics[""].gradient_square)


def test_fisher_from_adam_reads_through_a_mask_and_scores():
    model, loss = model_and_loss()
    prune_(model, Unstructured(), 0.25)
    optimizer = torch.optim.Adam(model.parameters())
    loss().backward()
    optimizer.step()
    prune_(model, Unstructured(), 0.5, "fisher", statistics=fisher_from_adam(optimizer, prunable(model)))
    assert (model[0].weight == 0).sum() == 64


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_fisher_from_an_optimizer_without_it_is_refused(make):
    layer = nn.Linear(2, 2)
    optimizer = make(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"expected w to have been stepped by Adam, got none .* in {make.__name__}"):
        fisher_from_adam(optimizer, {"w": layer})


def test_require_names_the_missing_field():
    with pytest.raises(ValueError, match="statistics: expected taylor, got None"):
        LayerStatistics().require("taylor")

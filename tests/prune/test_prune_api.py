import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparsenlp.prune import (
    NM,
    Block,
    GradientStatistics,
    LayerStatistics,
    Threshold,
    Unstructured,
    finalize_,
    layer_sparsity,
    mask_zeros_,
    masked_layers,
    prunable,
    prune_,
    sparsity_of,
)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 1), NM(2, 4)], ids=str)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_prune_reaches_the_sparsity_and_reports_it(pattern, scope):
    model = mlp()
    report = prune_(model, pattern, 0.5, scope=scope)
    assert sparsity_of(model) == pytest.approx(0.5)
    assert layer_sparsity(model) == pytest.approx(report)
    assert list(report) == ["0", "2"]
    if scope == "local":
        assert report == {"0": 0.5, "2": 0.5}


def test_the_output_is_that_of_the_masked_weight():
    model = mlp()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    prune_(model, Block(8, 1), 0.5)
    mask = model[0].weight != 0
    x = torch.randn(3, 16)
    torch.testing.assert_close(model[0](x), x @ (weight * mask).T + bias)


def test_masks_hold_through_optimizer_steps():
    model = mlp()
    prune_(model, Unstructured(), 0.7)
    masks = {name: layer.weight != 0 for name, layer in masked_layers(model).items()}
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model[0].weight, before)
    for name, layer in masked_layers(model).items():
        assert not (layer.weight.detach()[~masks[name]]).any()


def test_masks_follow_state_dict_deepcopy_and_to():
    model = mlp()
    prune_(model, Block(8, 1), 0.5)
    x = torch.randn(3, 16)
    other = mlp()
    prune_(other, Block(8, 1), 0.0)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(x), model(x))
    prune_(clone, Block(8, 1), 0.75)
    assert sparsity_of(model) == 0.5
    clone = copy.deepcopy(model).to(torch.bfloat16)
    assert clone[0].weight.dtype == torch.bfloat16
    assert clone[0].parametrizations.weight[0].mask.dtype == torch.bool
    assert sparsity_of(clone) == 0.5


def test_a_second_call_tightens():
    model = mlp()
    prune_(model, Block(8, 1), 0.25)
    first = {name: layer.weight == 0 for name, layer in masked_layers(model).items()}
    prune_(model, Block(8, 1), 0.5, scope="global")
    assert sparsity_of(model) == 0.5
    for name, layer in masked_layers(model).items():
        assert (layer.weight.detach()[first[name]] == 0).all()
        assert len(layer.parametrizations.weight) == 1
    report = prune_(model, Block(8, 1), 0.1)
    assert sum(report.values()) / 2 >= 0.5 - 0.25


def test_finalize_leaves_ordinary_modules():
    model = mlp()
    parameters = [id(p) for p in model.parameters()]
    prune_(model, Block(8, 1), 0.5)
    x = torch.randn(3, 16)
    expected = model(x)
    assert finalize_(model) is model
    assert type(model[0]) is nn.Linear
    assert [*model.state_dict()] == [*mlp().state_dict()]
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model[0].weight, nn.Parameter)
    torch.testing.assert_close(model(x), expected)
    assert sparsity_of(model) == 0.5
    assert not masked_layers(model)
    finalize_(model)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"projection": nn.Linear(8, 8)})
        self.encoder = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.attention = nn.MultiheadAttention(8, 2)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(8, 8)})
        self.classifier = nn.Linear(8, 2)


def test_default_filter_leaves_heads_poolers_and_embeddings():
    assert list(prunable(Classifier())) == ["encoder.0", "encoder.1"]


def test_filter_fn_selects():
    model = Classifier()
    prune_(model, Unstructured(), 0.5, filter_fn=lambda module, name: name == "classifier")
    assert list(masked_layers(model)) == ["classifier"]


def test_a_model_that_is_one_linear():
    model = nn.Linear(8, 8)
    prune_(model, Block(4, 4), 0.5)
    assert sparsity_of(model) == 0.5


def test_bert_has_six_matrices_per_layer():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    names = list(prunable(transformers.BertForSequenceClassification(config)))
    assert len(names) == 12
    assert all(name.startswith("bert.encoder.layer.") for name in names)


def other_statistics():
    layer = nn.Linear(4, 4)
    statistics = GradientStatistics({"elsewhere": layer})
    layer(torch.ones(1, 4)).sum().backward()
    statistics.update()
    return statistics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"pattern": NM(2, 4), "sparsity": 0.9}, "at most 0.5 for 2:4, got 0.9"),
        ({"criterion": "luck"}, "criterion: expected one of magnitude, relative, .* got luck"),
        ({"scope": "galactic"}, "scope: expected one of local, row, global, got galactic"),
        ({"criterion": "taylor"}, "statistics: expected taylor for taylor, got None"),
        ({"criterion": "taylor", "statistics": GradientStatistics({})}, "got statistics without an update"),
        ({"criterion": "taylor", "statistics": other_statistics()}, "got none of 0"),
        ({"criterion": "snip", "statistics": {"0": LayerStatistics()}}, "0: statistics: expected connection, got None"),
        ({"aggregation": "max"}, "aggregation: expected one of sum, l2, mean, got max"),
        ({"filter_fn": lambda module, name: False}, "expected filter_fn to select a layer, got none of 2"),
        ({"pattern": Block(16, 1)}, "prune_: 2: 16x1: expected a shape divisible .* got 8x32"),
        ({"scope": "global", "sparsity": 0.999}, "keeps 1% of every matrix, got 0.999"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune_(model, **({"pattern": Unstructured(), "sparsity": 0.5} | arguments))
    assert_unchanged(model, before)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with nn.Linear layers, got none in Conv1d"):
        prune_(nn.Conv1d(4, 4, 1), Unstructured(), 0.5)


def test_another_pattern_needs_finalize_first():
    model = mlp()
    prune_(model, Unstructured(), 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"expected pattern unstructured, .* got 8x1; call finalize_ first"):
        prune_(model, Block(8, 1), 0.5)
    assert_unchanged(model, before)
    prune_(finalize_(model), Block(8, 1), 0.5)


def test_foreign_parametrizations_are_refused():
    model = mlp()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match="2: expected a plain weight, got one parametrized by Identity"):
        prune_(model, Unstructured(), 0.5)
    assert not masked_layers(model)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(1, 16), NM(2, 4)], ids=str)
def test_torch_prune_masks_are_taken_over(pattern):
    model, twin = mlp(), mlp()
    prune_(twin, pattern, 0.5)
    for layer, other in zip((model[0], model[2]), (twin[0], twin[2]), strict=True):
        torch_prune.custom_from_mask(layer, "weight", other.weight != 0)
    parameters = {id(p) for p in model.parameters()}
    report = prune_(model, pattern, 0.0)
    assert report == {"0": 0.5, "2": 0.5}
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), twin(x))
    assert {id(p) for p in model.parameters()} == parameters
    assert not torch_prune.is_pruned(model)
    finalize_(model)
    assert sorted(model.state_dict()) == sorted(mlp().state_dict())


def test_torch_prune_masks_tighten():
    model = mlp()
    torch_prune.random_unstructured(model[0], "weight", amount=0.5)
    pruned = model[0].weight == 0
    prune_(model, Unstructured(), 0.75)
    assert (model[0].weight[pruned] == 0).all()
    assert sparsity_of(model) == 0.75


def test_torch_prune_masks_of_other_units_are_refused():
    model = mlp()
    torch_prune.random_unstructured(model[2], "weight", amount=0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"2: expected a mask of torch\.nn\.utils\.prune in whole units of 8x1"):
        prune_(model, Block(8, 1), 0.5)
    assert_unchanged(model, before)
    assert torch_prune.is_pruned(model)


def test_zeros_of_other_tools_become_masks():
    model = mlp()
    with torch.no_grad():
        model[0].weight[:8, :4] = 0
        model[0].weight[20, 5] = 0
    assert mask_zeros_(model, Block(8, 1)) == {"0": 32 / 512, "2": 0.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    assert not model[0].weight[:8, :4].any()
    assert model[0].weight[20, 5] != 0, "a zero outside of a zero block is a weight"
    prune_(model, Block(8, 1), 0.5)
    assert not model[0].weight[:8, :4].any()


def test_zeros_in_n_of_every_m_become_masks():
    model = nn.Linear(8, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, 0, 0, 1, 1, 1, 0, 1]]))
    assert mask_zeros_(model, NM(2, 4)) == {"": 0.25}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.second.weight = self.first.weight
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.second(self.first(self.embedding(ids)).tanh()))


def body(module, name):
    return name in ("first", "second")


def test_layers_that_share_a_weight_share_its_mask():
    model = Tied()
    statistics = GradientStatistics(prunable(model, body))
    model(torch.arange(4)).square().sum().backward()
    statistics.update()
    for sparsity in (0.25, 0.5):
        report = prune_(model, Block(4, 1), sparsity, "taylor", "global", body, statistics)
        assert report == {"first": sparsity, "second": sparsity}
        assert torch.equal(model.first.weight, model.second.weight)
    finalize_(model)
    assert model.first.weight is model.second.weight
    assert sparsity_of(model, body) == 0.5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("first",), "expected first to have a weight of its own, got one that second uses too"),
        (("first", "second", "out"), "expected out to have a weight of its own, got one that embedding uses too"),
    ],
)
def test_a_weight_shared_with_what_is_not_selected_is_refused(names, message):
    model = Tied()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune_(model, Unstructured(), 0.5, filter_fn=lambda module, name: name in names)
    assert_unchanged(model, before)
    assert not masked_layers(model)


def test_a_layer_that_is_called_twice_is_one_layer():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert prune_(model, Unstructured(), 0.5) == {"0": 0.5}


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 3)])
def test_alpha_prunes_below_a_fraction_of_the_highest_magnitude(alpha, expected):
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [0.5, 4.0]]) if alpha else torch.zeros(2, 2))
    assert prune_(layer, Unstructured(), Threshold(alpha=alpha)) == {"": expected / 4}


def test_alpha_of_the_highest_accumulated_gradient():
    model = mlp()
    statistics = GradientStatistics(prunable(model), ["gradient_sum"])
    for _ in range(2):
        model(torch.randn(4, 16)).square().sum().backward()
        statistics.update()
        model.zero_grad()
    prune_(model, Unstructured(), Threshold(alpha=0.1), "gradient", statistics=statistics)
    for name, layer in masked_layers(model).items():
        gradients = statistics[name].gradient_sum
        assert torch.equal(layer.weight != 0, gradients >= 0.1 * gradients.max())

import copy
import math

import pytest
import torch
from torch import nn

from sparsenlp.prune import sparsity_of
from sparsenlp.train import CachedTeacher, RecoveryConfig, recover
from sparsenlp.train.distill import LiveTeacher
from sparsenlp.train.relations import RELATIONS, last_projections, recorded, relation_loss


def quick(**options):
    options = {"epochs": 1, "spliced": 0.0, "batch_size": 8, "update_every": 2, "relation_weight": 1.0} | options
    return RecoveryConfig(**options)


def random_projections(width, seed, batch=2, length=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("relation", RELATIONS)
def test_it_is_the_divergence_of_attention_like_distributions(relation):
    heads, lengths = 2, (5, 3)
    ours, theirs = random_projections(8, 0), random_projections(4, 1)
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    total, first, second = 0.0, *RELATIONS[relation]
    for row, length in enumerate(lengths):
        for head in range(heads):
            p, q = (
                (a[row, :length, part] @ b[row, :length, part].T / math.sqrt(width // heads)).softmax(-1)
                for width, a, b in ((4, theirs[first], theirs[second]), (8, ours[first], ours[second]))
                for part in [slice(head * width // heads, (head + 1) * width // heads)]
            )
            total += (p * (p / q).log()).sum().item()
    loss = relation_loss(ours, theirs, mask, [relation], heads)
    assert loss.item() == pytest.approx(total / heads / sum(lengths), rel=1e-5)


def test_the_same_projections_lose_nothing_and_padding_does_not_matter():
    ours = [tensor.requires_grad_() for tensor in random_projections(8, 0)]
    theirs = [tensor.detach().clone() for tensor in ours]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for tensor in theirs:
        tensor[1, 2:] = 1e4
    loss = relation_loss(ours, theirs, mask, list(RELATIONS), heads=2)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    assert all(tensor.grad.isfinite().all() for tensor in ours)


def test_several_relations_are_averaged():
    ours, theirs, mask = random_projections(8, 0), random_projections(8, 1), torch.ones(2, 5)
    each = [relation_loss(ours, theirs, mask, [name], 2).item() for name in ("queries", "values")]
    assert relation_loss(ours, theirs, mask, ["queries", "values"], 2).item() == pytest.approx(sum(each) / 2)


def test_the_last_layer_is_recorded(make_model, make_data):
    model, data = make_model(), make_data(4)
    layer = model.bert.encoder.layer[-1].attention.self
    assert last_projections(model) == [layer.query, layer.key, layer.value]
    with recorded([layer.query]) as outputs:
        model(**data.batch([0, 1]))
    assert outputs[0].shape == (2, max(data.lengths[:2]), 32)
    assert not layer.query._forward_hooks


def test_recovery_pulls_the_relations_to_the_teacher(make_model, make_data):
    dense, data = make_model(), make_data()

    def distance(model):
        with torch.no_grad():
            ours, theirs = (LiveTeacher(m, data, False, False, True).outputs(range(64))[1] for m in (model, dense))
        mask = data.batch(range(64))["attention_mask"]
        return relation_loss(ours, theirs, mask, ["attention", "values"], 2).item()

    results = []
    for weight in (0.0, 100.0):
        model = copy.deepcopy(dense)
        options = {"epochs": 6, "sparsity": 0.75, "learning_rate": 2e-3, "hidden_weight": 0.0, "bf16": False}
        recover(model, dense, data, quick(relation_weight=weight, **options))
        assert sparsity_of(model) == pytest.approx(0.75, abs=1e-3)
        results.append(distance(model))
    assert results[1] < 0.5 * results[0]


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_cached_and_live_teachers_agree(make_model, make_data, hidden_weight):
    dense, data, losses = make_model(), make_data(), []
    for gib in (1.0, 0.0):
        config = quick(cache_gib=gib, hidden_weight=hidden_weight)
        losses.append(recover(copy.deepcopy(dense), dense, data, config).losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_cache_with_relations_serves_runs_without(make_model, make_data):
    dense, data, losses = make_model(), make_data(), []
    for relations in (False, True):
        teacher = CachedTeacher(dense, data, relations=relations)
        losses.append(recover(copy.deepcopy(dense), teacher, data, quick(relation_weight=0.0)).losses)
    assert losses[0] == losses[1]


def test_a_narrower_student_can_learn_relations(make_model, make_data):
    student = make_model(hidden_size=16)
    recover(student, make_model(), make_data(), quick(hidden_weight=0.0, relation_heads=4))
    assert sparsity_of(student) == pytest.approx(0.9, abs=2e-3)


def test_what_cannot_be_compared_is_refused(make_model, make_data):
    dense, data = make_model(), make_data()
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="teacher: expected outputs cached with relations=True"):
        recover(model, CachedTeacher(dense, data), data, quick())
    with pytest.raises(ValueError, match="relation_loss: expected widths divisible by 5 heads, got 32"):
        recover(model, dense, data, quick(relation_heads=5))
    with pytest.raises(ValueError, match="relations: expected a model with separate projections"):
        last_projections(nn.Linear(2, 2))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ("attention", "luck")}, "relations: expected some of attention, .*, got attention, luck"),
        ({"relations": ()}, "relations: expected some of .*, got none"),
        ({"relation_heads": 0}, "relation_heads: expected at least 1, got 0"),
        ({"relation_weight": -1.0}, "loss weights: expected none negative"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(**options)

import copy

import pytest
import torch

from sparsenlp.data import UNLABELLED, without_labels
from sparsenlp.prune import (
    CRITERIA,
    NM,
    Block,
    Unstructured,
    finalize_,
    layer_sparsity,
    masked_layers,
    prune_,
    sparsity_of,
)
from sparsenlp.train import (
    CachedTeacher,
    FinetuneConfig,
    RecoveryConfig,
    finetune,
    kl_divergence,
    predict,
    recover,
    training_texts,
)


def quick(**options):
    return RecoveryConfig(
        **({"epochs": 4, "batch_size": 8, "update_every": 2, "learning_rate": 2e-3, "spliced": 0.0} | options)
    )


@pytest.fixture(scope="module")
def dense(make_model, make_data):
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    finetune(model, make_data(), FinetuneConfig(epochs=6, batch_size=8, learning_rate=3e-3))
    return model


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("pattern", [Block(8, 1), Unstructured(), NM(2, 4)], ids=str)
def test_it_reaches_the_sparsity(dense, make_data, pattern, scope):
    model = copy.deepcopy(dense)
    sparsity = min(0.75, pattern.max_sparsity)
    recover(model, dense, make_data(), quick(epochs=1, pattern=pattern, sparsity=sparsity, scope=scope))
    finalize_(model)
    assert sparsity_of(model) == pytest.approx(sparsity, abs=2e-4)
    assert max(layer_sparsity(model).values()) <= 0.99


def test_it_recovers_what_one_shot_pruning_loses(dense, make_data):
    data = make_data()
    reference = predict(dense, data)
    one_shot, recovered = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(one_shot, Block(8, 1), 0.75)
    recover(recovered, dense, data, quick(epochs=12, sparsity=0.75))
    assert kl_divergence(predict(recovered, data), reference) < 0.3 * kl_divergence(predict(one_shot, data), reference)


def test_sparsity_rises_then_masks_stay(dense, make_data):
    model, data = copy.deepcopy(dense), make_data()
    seen, masks = [], []

    def watch(info):
        seen.append(sparsity_of(model))
        masks.append({name: layer.weight != 0 for name, layer in masked_layers(model).items()})

    recover(model, dense, data, quick(sparsity=0.8, ramp_fraction=0.5), on_step=watch)
    assert len(seen) == 32
    assert seen == sorted(seen)
    assert seen[1] == 0.0 < seen[2] < seen[10] < seen[15]
    assert seen[16] == seen[-1] == pytest.approx(0.8, abs=1e-3)
    for name, mask in masks[-1].items():
        assert torch.equal(mask, masks[16][name])
        assert not (mask & ~masks[5][name]).any()


def test_the_teacher_is_left_alone(dense, make_data):
    before = {name: p.clone() for name, p in dense.named_parameters()}
    recover(copy.deepcopy(dense), dense, make_data(), quick(epochs=1))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in dense.named_parameters())


def test_cached_and_live_teachers_agree(dense, make_data):
    data, losses = make_data(), []
    for gib in (1.0, 0.0):
        losses.append(recover(copy.deepcopy(dense), dense, data, quick(epochs=1, cache_gib=gib)).losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_recovers(dense, make_data, criterion):
    model, scope = copy.deepcopy(dense), CRITERIA[criterion].scope
    recover(model, dense, make_data(), quick(epochs=1, sparsity=0.75, criterion=criterion, scope=scope))
    assert sparsity_of(model) == pytest.approx(0.75, abs=1e-3)
    assert all(not layer._forward_pre_hooks for layer in masked_layers(model).values())


def test_magnitude_and_logits_only(dense, make_data):
    model = copy.deepcopy(dense)
    recover(model, dense, make_data(), quick(epochs=1, criterion="magnitude", hidden_weight=0.0, bf16=False))
    assert sparsity_of(model) == pytest.approx(0.9, abs=1e-3)


def assert_untouched(model, reference):
    assert not masked_layers(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"num_hidden_layers": 1}, {"hidden_size": 16}, {"num_labels": 3}])
def test_a_teacher_of_another_shape_is_refused(dense, make_model, make_data, options):
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="teacher: expected logits and hidden states of shapes"):
        recover(model, make_model(**options), make_data(), quick())
    assert_untouched(model, dense)


def test_a_cache_of_other_data_is_refused(dense, make_data):
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="expected outputs cached over training_texts"):
        recover(model, CachedTeacher(dense, make_data(seed=1)), make_data(), quick())
    assert_untouched(model, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": Block(24, 1)}, "24x1: expected a shape divisible"),
        ({"pattern": Block(5, 1), "scope": "local"}, "bert.encoder.layer.0.attention.self.query: 5x1"),
    ],
)
def test_a_pattern_that_does_not_divide_is_refused(dense, make_data, options, message):
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match=message):
        recover(model, dense, make_data(), quick(**options))
    assert_untouched(model, dense)


def test_a_filter_that_matches_nothing_is_refused(dense, make_data):
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="expected filter_fn to select a layer"):
        recover(model, dense, make_data(), quick(), filter_fn=lambda module, name: False)
    assert_untouched(model, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a fraction of zeros in \[0, 1\), got 1.0"),
        ({"pattern": NM(2, 4)}, "at most 0.5 for 2:4, got 0.9"),
        ({"criterion": "luck"}, "criterion: expected one of"),
        ({"scope": "all"}, "scope: expected one of"),
        ({"ramp_fraction": 1.5}, "ramp_fraction: expected"),
        ({"update_every": 0}, "update_every: expected"),
        ({"statistics_decay": 1.0}, "statistics_decay: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"hidden_weight": -1.0}, "loss weights: expected none negative"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecoveryConfig(**options)


def test_texts_without_labels_are_imitated_only(dense, make_data):
    data = make_data()
    models = [copy.deepcopy(dense) for _ in range(2)]
    recover(models[0], dense, without_labels(data), quick(epochs=1))
    recover(models[1], dense, data, quick(epochs=1, label_weight=0.0))
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, msg=name)
    with pytest.raises(ValueError, match="labels: expected one for each of 64 texts, got 64 without"):
        finetune(models[0], without_labels(data))


def test_spliced_texts_train_beside_labelled_ones(dense, make_data):
    data = make_data()
    model = copy.deepcopy(dense)
    log = recover(model, dense, data, quick(epochs=2, spliced=0.5))
    assert log.steps == 2 * 12
    texts = training_texts(data, quick(spliced=0.5))
    assert (texts.labels == UNLABELLED).tolist() == [False] * 64 + [True] * 32
    assert training_texts(data, quick(spliced=0.5, seed=1)).columns != texts.columns
    assert training_texts(data, quick()).columns == data.columns
    assert torch.tensor(log.losses).isfinite().all()

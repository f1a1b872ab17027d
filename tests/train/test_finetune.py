import pytest
import torch

from sparsenlp.prune import Block, masked_layers, proximal_step_, prunable, prune_, sparsity_of
from sparsenlp.train import FinetuneConfig, accuracy, finetune, predict
from sparsenlp.train.loop import learning_rate


def test_it_learns(make_model, make_data):
    model, data = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), make_data(128)
    log = finetune(model, data, FinetuneConfig(epochs=12, batch_size=16, learning_rate=3e-3))
    assert log.steps == len(log.losses) == 96
    assert sum(log.losses[-8:]) < 0.7 * sum(log.losses[:8])
    assert accuracy(predict(model, data), data.labels) > 0.9
    assert log.steps_per_second > 0


def test_group_lasso_after_every_step(make_model, make_data):
    model, data = make_model(), make_data(64)
    layers = prunable(model)

    def shrink(info):
        proximal_step_(layers, Block(8, 1), 1e-3)

    finetune(model, data, FinetuneConfig(epochs=4, batch_size=8, learning_rate=1e-3, dropout=False), on_step=shrink)
    assert 0.2 < sparsity_of(model) < 1
    for layer in layers.values():
        blocks = layer.weight.unflatten(0, (-1, 8)) == 0
        assert torch.equal(blocks.any(dim=1), blocks.all(dim=1)), "zeros come in whole blocks"


def test_everything_borrowed_is_given_back(make_model, make_data):
    model, data = make_model(), make_data(16)
    model.bert.pooler.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    finetune(model, data, FinetuneConfig(epochs=1, freeze_embeddings=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.bert.pooler.training
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_frozen_embeddings_do_not_move(make_model, make_data):
    model, data = make_model(), make_data(16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    finetune(model, data, FinetuneConfig(epochs=1, freeze_embeddings=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".embeddings." in name), name


def test_masks_are_kept(make_model, make_data):
    model, data = make_model(), make_data(32)
    prune_(model, Block(8, 1), 0.5)
    masks = {name: layer.weight == 0 for name, layer in masked_layers(model).items()}
    finetune(model, data, FinetuneConfig(epochs=2, learning_rate=1e-3))
    for name, layer in masked_layers(model).items():
        assert torch.equal(layer.weight == 0, masks[name])
    assert sparsity_of(model) == 0.5


def test_same_seed_same_result(make_model, make_data):
    data = make_data(32)
    logs = [finetune(make_model(), data, FinetuneConfig(epochs=1, seed=seed)) for seed in (0, 0, 1)]
    assert logs[0].losses == logs[1].losses != logs[2].losses


def test_learning_rate_warms_up_and_decays():
    config = FinetuneConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 / 89)
    assert learning_rate(0, 1, config) == 1.0


def test_labels_beyond_the_classes_are_refused(make_model, make_data):
    model, data = make_model(), make_data(16)
    data.labels[3] = 2
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="below the model's 2 classes, got 2"):
        finetune(model, data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("max_gradient_norm", -1.0), ("warmup_fraction", 1.0)],
)
def test_impossible_configs_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        FinetuneConfig(**{field: value})

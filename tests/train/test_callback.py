import copy
import importlib.util

import pytest
import torch

from sparsenlp.prune import Block, masked_layers, prune_, sparsity_of
from sparsenlp.train import PruningConfig

transformers = pytest.importorskip("transformers", reason="the Trainer comes from transformers")
if importlib.util.find_spec("accelerate") is None:
    pytest.skip("the Trainer needs the package accelerate", allow_module_level=True)

callback_module = pytest.importorskip("sparsenlp.train.callback")
PruningCallback = callback_module.PruningCallback
CONFIG = PruningConfig(sparsity=0.75, update_every=2)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Watch(transformers.TrainerCallback):
    def __init__(self, model):
        self.model, self.seen = model, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(sparsity_of(self.model))


def trainer(model, data, directory, *callbacks, **options):
    options = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "save_steps": 4,
        "learning_rate": 1e-3,
    } | options
    arguments = transformers.TrainingArguments(
        str(directory), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, **options
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=range(len(data)),
        eval_dataset=range(len(data)),
        data_collator=lambda indices: data.batch(indices) | {"labels": data.labels[indices]},
        callbacks=list(callbacks),
    )


def masks_of(model):
    return {name: layer.parametrizations.weight[0].mask for name, layer in masked_layers(model).items()}


def assert_same(model, expected):
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_sparsity_rises_inside_a_trainer(make_model, make_data, tmp_path, criterion):
    model = make_model()
    watch = Watch(model)
    callback = PruningCallback(model, PruningConfig(sparsity=0.75, update_every=2, criterion=criterion))
    trainer(model, make_data(), tmp_path, callback, watch).train()
    assert watch.seen == sorted(watch.seen)
    assert watch.seen[0] == 0.0 < watch.seen[4] < watch.seen[14] == watch.seen[-1] == pytest.approx(0.75, abs=1e-3)
    assert set(masks_of(model)) == {n for n in masks_of(model) if "encoder" in n}


@pytest.mark.parametrize("step", [4, 16], ids=["in the ramp", "masks frozen"])
def test_a_run_resumes_to_the_same_result(make_model, make_data, tmp_path, step):
    data, whole, stopped, resumed = make_data(), make_model(), make_model(), make_model()
    trainer(whole, data, tmp_path / "whole", PruningCallback(whole, CONFIG)).train()
    trainer(stopped, data, tmp_path / "run", PruningCallback(stopped, CONFIG), StopAt(step)).train()
    trainer(resumed, data, tmp_path / "run", PruningCallback(resumed, CONFIG)).train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_accumulated_gradients_give_the_masks_of_the_whole_batch(make_model, make_data, tmp_path):
    data, masks = make_data(), []
    for i, options in enumerate(({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 16})):
        model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer(model, data, tmp_path / str(i), PruningCallback(model, CONFIG), **options).train()
        masks.append(masks_of(model))
    assert masks[0].keys() == masks[1].keys()
    total = sum(mask.numel() for mask in masks[0].values())
    assert sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0]) > 0.98 * total


def test_finalize_leaves_an_ordinary_model(make_model, make_data, tmp_path):
    model = make_model()
    names = set(model.state_dict())
    trainer(model, make_data(), tmp_path, PruningCallback(model, CONFIG, finalize=True)).train()
    assert set(model.state_dict()) == names
    assert sparsity_of(model) == pytest.approx(0.75, abs=1e-3)


def test_the_best_model_is_one_with_all_its_zeros(make_model, make_data, tmp_path):
    model = make_model()
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True}
    run = trainer(model, make_data(), tmp_path, PruningCallback(model, CONFIG, finalize=True), **options)
    run.train()
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert max(losses, key=losses.get) < 14, "the case is of no use unless an early model is the best"
    assert run.state.best_global_step >= 14
    assert sparsity_of(model) == pytest.approx(0.75, abs=1e-3)


def test_a_checkpoint_of_another_run_is_refused(make_model, make_data, tmp_path):
    data, model = make_data(), make_model()
    trainer(model, data, tmp_path, PruningCallback(model, CONFIG), StopAt(4)).train()
    other = PruningCallback(copy.deepcopy(model), PruningConfig(sparsity=0.5))
    with pytest.raises(ValueError, match="PruningCallback: expected a checkpoint of a run with this config"):
        trainer(other.model, data, tmp_path, other).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / callback_module.STATISTICS_FILE).unlink()
    with pytest.raises(ValueError, match="PruningCallback: expected statistics of the checkpoint in"):
        trainer(model, data, tmp_path, PruningCallback(model, CONFIG)).train(resume_from_checkpoint=True)


def test_masks_of_another_pattern_are_refused(make_model):
    model = make_model()
    prune_(model, Block(4, 1), 0.5)
    before = {name: mask.clone() for name, mask in masks_of(model).items()}
    with pytest.raises(ValueError, match="expected pattern 4x1"):
        PruningCallback(model, CONFIG)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())


def test_a_criterion_of_inputs_is_refused(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="PruningCallback: expected a criterion of weights or gradients, got wanda"):
        PruningCallback(model, PruningConfig(criterion="wanda"))
    assert not masked_layers(model)


@pytest.mark.parametrize("finalize", [False, True])
def test_what_the_trainer_saves_is_what_was_trained(make_model, make_data, tmp_path, finalize):
    data, model = make_data(), make_model()
    run = trainer(model, data, tmp_path, PruningCallback(model, CONFIG, finalize=finalize), save_steps=24)
    run.train()
    run.save_model(str(tmp_path / "final"))
    expected = model.eval()(**data.batch(range(8))).logits
    for directory in (tmp_path / "final", tmp_path / "checkpoint-24"):
        loaded = type(model).from_pretrained(directory)
        assert torch.equal(loaded(**data.batch(range(8))).logits, expected)
        assert sparsity_of(loaded) == pytest.approx(0.75, abs=1e-3)


def test_the_best_model_comes_back_with_its_masks(make_model, make_data, tmp_path):
    data, model = make_data(), make_model()
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    run = trainer(model, data, tmp_path, PruningCallback(model, CONFIG), **options)
    run.train()
    best = type(model).from_pretrained(run.state.best_model_checkpoint)
    assert torch.equal(model.eval()(**data.batch(range(8))).logits, best(**data.batch(range(8))).logits)
    for name, layer in masked_layers(model).items():
        assert torch.equal(layer.weight != 0, masks_of(model)[name]), name


def test_damaged_statistics_are_refused(make_model, make_data, tmp_path):
    data, model = make_data(), make_model()
    trainer(model, data, tmp_path, PruningCallback(model, CONFIG), StopAt(4)).train()
    path = tmp_path / "checkpoint-4" / callback_module.STATISTICS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="PruningCallback: expected statistics as they were saved, got damaged ones"):
        trainer(model, data, tmp_path, PruningCallback(model, CONFIG)).train(resume_from_checkpoint=True)

import copy
import os
import signal

import pytest
import torch

from sparsenlp.prune import sparsity_of
from sparsenlp.train import CachedTeacher, FinetuneConfig, RecoveryConfig, accuracy, finetune, predict, recover

FINETUNING = FinetuneConfig(epochs=3, batch_size=8, learning_rate=3e-3, evaluate_every=4, bf16=False)
RECOVERY = RecoveryConfig(
    epochs=3,
    spliced=0.0,
    batch_size=8,
    update_every=2,
    learning_rate=1e-3,
    sparsity=0.75,
    evaluate_every=3,
    bf16=False,
    dropout=True,
)


def interrupt_at(step):
    def on_step(info):
        if info.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def inverted(data):
    """The better a model learns `data`, the worse it does on these."""
    other = copy.deepcopy(data)
    other.labels.sub_(1).neg_()
    return other


def assert_same(model, expected):
    tensors = model.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def state_after(make_model, data, step, config=FINETUNING):
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, config, on_step=interrupt_at(step))
    return model


def test_the_best_state_is_kept(make_model, make_data):
    model, data, validation = make_model(), make_data(), make_data(40, seed=1)
    log = finetune(model, data, FINETUNING, validation=validation)
    assert [e.step for e in log.evaluations] == [4, 8, 12, 16, 20, 24]
    assert log.best.accuracy == max(e.accuracy for e in log.evaluations)
    assert accuracy(predict(model, validation), validation.labels) == log.best.accuracy
    assert_same(model, state_after(make_model, data, log.best.step))


def test_validation_does_not_change_the_training(make_model, make_data):
    data = make_data()
    plain, watched = (
        finetune(make_model(), data, FINETUNING, validation=validation) for validation in (None, make_data(seed=1))
    )
    assert plain.losses == watched.losses
    assert (plain.evaluations, plain.best) == ([], None)


def test_training_stops_early(make_model, make_data, tmp_path):
    model, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    config = FinetuneConfig(**vars(FINETUNING) | {"patience": 2, "epochs": 20})
    log = finetune(model, data, config, path, validation=inverted(data))
    best = log.best.step
    assert log.steps == best + 2 * 4 < 160
    assert_same(model, state_after(make_model, data, best, config))
    again = make_model()
    repeated = finetune(again, data, config, path, validation=inverted(data))
    assert (repeated.steps, repeated.evaluations) == (0, log.evaluations), "a finished run is only loaded"
    assert_same(again, model)


@pytest.mark.parametrize("rewind", [False, True])
@pytest.mark.parametrize("step", [2, 14, 16, 23])
def test_a_stopped_run_resumes_to_the_same_result(make_model, make_data, tmp_path, step, rewind):
    dense, data, validation, path = make_model(), make_data(), make_data(40, seed=1), tmp_path / "state.safetensors"
    config = RecoveryConfig(**vars(RECOVERY) | {"rewind": rewind, "patience": 3})
    whole, resumed = copy.deepcopy(dense), copy.deepcopy(dense)
    expected = recover(whole, dense, data, config, validation=validation)
    arguments = {"state_path": path, "validation": validation}
    with pytest.raises(KeyboardInterrupt):
        recover(copy.deepcopy(dense), dense, data, config, **arguments, on_step=interrupt_at(step))
    log = recover(resumed, dense, data, config, **arguments)
    assert (log.losses, log.evaluations, log.best) == (expected.losses, expected.evaluations, expected.best)
    assert_same(resumed, whole)


def test_only_states_with_all_their_zeros_count(make_model, make_data):
    dense, data = make_model(), make_data()
    finetune(dense, data, FINETUNING)
    model = copy.deepcopy(dense)
    log = recover(model, dense, data, RECOVERY, validation=inverted(data))
    assert [e.step for e in log.evaluations] == [15, 18, 21, 24]
    assert sparsity_of(model) == pytest.approx(0.75, abs=1e-3)


class FailingTeacher:
    """Gives NaN in one step, the first being 1."""

    def __init__(self, model, data, step):
        self.teacher, self.calls, self.step = CachedTeacher(model, data), 0, step

    def outputs(self, indices):
        logits, states = self.teacher.outputs(indices)
        self.calls += 1
        return (logits * torch.nan if self.calls == self.step + 1 else logits), states  # one call checks the shapes


def test_a_loss_that_is_not_finite_leaves_the_state_before(make_model, make_data, tmp_path):
    dense, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    before, failed, resumed, whole = (copy.deepcopy(dense) for _ in range(4))
    with pytest.raises(KeyboardInterrupt):
        recover(before, CachedTeacher(dense, data), data, RECOVERY, on_step=interrupt_at(8))
    message = rf"expected a finite loss, got nan at step 9 of 24; the model is as after step 8, saved in {path}$"
    with pytest.raises(FloatingPointError, match=message):
        recover(failed, FailingTeacher(dense, data, 9), data, RECOVERY, state_path=path)
    assert_same(failed, before)  # step 9 had tightened the masks
    assert recover(resumed, CachedTeacher(dense, data), data, RECOVERY, state_path=path).steps == 16
    recover(whole, CachedTeacher(dense, data), data, RECOVERY)
    assert_same(resumed, whole)


def test_a_gradient_that_is_not_finite_leaves_the_state_before(make_model, make_data):
    model, data = make_model(), make_data()

    def explode(info):
        if info.step == 6:
            model.classifier.bias.register_hook(lambda gradient: gradient * torch.inf)

    message = r"finetune: expected a finite gradient, got (inf|nan) at step 7 of 24; the model is as after step 6$"
    with pytest.raises(FloatingPointError, match=message):
        finetune(model, data, FINETUNING, on_step=explode)
    assert_same(model, state_after(make_model, data, 6))


@pytest.mark.parametrize("kept", [False, True])
def test_weights_spoilt_from_outside(make_model, make_data, kept):
    model, data = make_model(), make_data()

    def poison(info):
        if info.step == 10:
            model.classifier.bias.data.fill_(torch.nan)

    said = (
        "the model is the best one, of step (4|8)" if kept else "weights are not finite and no earlier state was kept"
    )
    with pytest.raises(FloatingPointError, match=f"got nan at step 11 of 24; .*{said}$"):
        finetune(model, data, FINETUNING, on_step=poison, validation=make_data(seed=1) if kept else None)
    assert all(bool(p.isfinite().all()) for p in model.parameters()) == kept


def test_the_learning_rate_is_rewound(make_model, make_data, monkeypatch):
    from sparsenlp.train import loop

    rates = []

    def spy(step, total, config):
        rates.append(plain(step, total, config))
        return rates[-1]

    plain = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", spy)
    model = make_model()
    config = RecoveryConfig(**vars(RECOVERY) | {"rewind": True, "warmup_fraction": 0.2, "ramp_fraction": 0.5})
    recover(copy.deepcopy(model), model, make_data(), config)
    assert len(rates) == 24
    assert rates[:12] == rates[12:] == [plain(step, 12, config) for step in range(12)]


def test_a_validation_of_other_classes_is_refused(make_model, make_data):
    model, validation = make_model(), make_data(8)
    validation.labels[0] = 2
    for call in (
        lambda: finetune(model, make_data(), FINETUNING, validation=validation),
        lambda: recover(model, make_model(), make_data(), RECOVERY, validation=validation),
    ):
        with pytest.raises(ValueError, match="below the model's 2 classes, got 2"):
            call()


def test_a_state_with_another_validation_is_refused(make_model, make_data, tmp_path):
    path, data = tmp_path / "state.safetensors", make_data(16)
    finetune(make_model(), data, FINETUNING, path, validation=make_data(8, seed=1))
    with pytest.raises(ValueError, match="training state: expected a run with this config, data and model"):
        finetune(make_model(), data, FINETUNING, path, validation=make_data(8, seed=2))


@pytest.mark.parametrize(("field", "value"), [("evaluate_every", 0), ("patience", 0)])
def test_impossible_configs_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        FinetuneConfig(**{field: value})

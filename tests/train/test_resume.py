import copy
import json
import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open

from sparsenlp.interrupt import Terminated
from sparsenlp.prune import finalize_
from sparsenlp.train import FinetuneConfig, RecoveryConfig, finetune, recover
from sparsenlp.train import loop as loop_module
from sparsenlp.train import state as state_module

CONFIG = RecoveryConfig(
    epochs=3, spliced=0.0, batch_size=8, update_every=2, learning_rate=1e-3, sparsity=0.75, dropout=True
)


def interrupt_at(step, number=signal.SIGINT):
    def on_step(info):
        if info.step == step:
            os.kill(os.getpid(), number)

    return on_step


def assert_same(model, expected):
    tensors = model.state_dict()
    assert list(tensors) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("step", [3, 9, 17, 24], ids=["early", "in the ramp", "masks frozen", "last step"])
def test_a_stopped_recovery_resumes_to_the_same_result(make_model, make_data, tmp_path, step):
    dense, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    whole = copy.deepcopy(dense)
    expected = recover(whole, dense, data, CONFIG)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of 24; the same call resumes from"):
        recover(copy.deepcopy(dense), dense, data, CONFIG, state_path=path, on_step=interrupt_at(step))
    resumed = copy.deepcopy(dense)
    log = recover(resumed, dense, data, CONFIG, state_path=path)
    assert log.steps == 24 - step
    assert log.losses == expected.losses
    assert_same(resumed, whole)
    again = copy.deepcopy(dense)
    assert recover(again, dense, data, CONFIG, state_path=path).steps == 0, "a finished run is only loaded"
    assert_same(again, whole)


def test_a_killed_finetuning_resumes_from_the_last_save(make_model, make_data, tmp_path):
    data, path, config = make_data(), tmp_path / "deep" / "state.safetensors", FinetuneConfig(epochs=2, batch_size=8)
    whole = make_model()
    finetune(whole, data, config)

    def die(info):
        if info.step == 12:
            raise MemoryError

    with pytest.raises(MemoryError):
        finetune(make_model(), data, config, state_path=path, save_every=5, on_step=die)
    resumed = make_model()
    assert finetune(resumed, data, config, state_path=path).steps == 6
    assert_same(resumed, whole)
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_ctrl_c_without_a_state_file_still_stops_between_steps(make_model, make_data):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"finetune: stopped after step 2 of 24$"):
        finetune(make_model(), make_data(), FinetuneConfig(batch_size=8), on_step=interrupt_at(2))
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_stops_as_ctrl_c_does(make_model, make_data, tmp_path):
    path, data, config = tmp_path / "state.safetensors", make_data(), FinetuneConfig(epochs=2, batch_size=8)
    whole = make_model()
    finetune(whole, data, config)
    with pytest.raises(Terminated, match=r"finetune: stopped after step 5 of 16; the same call resumes from"):
        finetune(make_model(), data, config, state_path=path, on_step=interrupt_at(5, signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = make_model()
    assert finetune(resumed, data, config, state_path=path).steps == 11
    assert_same(resumed, whole)


def test_a_programs_own_handler_of_sigterm_stays(make_model, make_data):
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        log = finetune(make_model(), make_data(), FinetuneConfig(epochs=1), on_step=interrupt_at(1, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (log.steps, seen) == (2, [1])


def test_the_state_is_written_by_time(make_model, make_data, tmp_path, monkeypatch):
    """A step takes 25 seconds here; when writing takes long itself, it is done less often."""
    now, write, written = [0.0], state_module.write_state, []

    def step(info):
        now[0] += 25

    def slow(path, identity, state):
        written.append(state.step)
        now[0] += 4 if len(written) > 2 else 0
        write(path, identity, state)

    monkeypatch.setattr(loop_module, "write_state", slow)
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now[0])
    path, data = tmp_path / "state.safetensors", make_data()
    config = FinetuneConfig(epochs=2, batch_size=8)
    finetune(make_model(), data, config, state_path=path, on_step=step)
    assert written == [3, 6, 9, 13, 16]
    written.clear()
    finetune(make_model(), data, config, state_path=tmp_path / "other", on_step=step, save_seconds=101)
    assert written == [5, 10, 15, 16]
    with pytest.raises(ValueError, match="save_seconds: expected at least 0, got -1"):
        finetune(make_model(), data, config, state_path=path, save_seconds=-1)


def test_a_second_ctrl_c_stops_at_once(make_model, make_data, tmp_path):
    def twice(info):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(make_model(), make_data(), FinetuneConfig(), state_path=path, on_step=twice)
    assert not path.exists()


def test_training_in_another_thread(make_model, make_data):
    logs = []
    thread = threading.Thread(
        target=lambda: logs.append(finetune(make_model(), make_data(8), FinetuneConfig(epochs=1)))
    )
    thread.start()
    thread.join()
    assert logs[0].steps == 1


@pytest.mark.parametrize("change", ["config", "data", "model", "filter"])
def test_a_state_of_another_run_is_refused(make_model, make_data, tmp_path, change):
    dense, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recover(copy.deepcopy(dense), dense, data, CONFIG, state_path=path, on_step=interrupt_at(4))
    saved = path.read_bytes()
    config, filter_fn = CONFIG, None
    if change == "config":
        config = RecoveryConfig(epochs=3, batch_size=8)
    elif change == "data":
        data = make_data(seed=1)
    elif change == "model":
        dense = make_model(intermediate_size=128)
    else:
        filter_fn = lambda module, name: name.endswith("query")  # noqa: E731
    model = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="training state: expected a run with this config, data and model"):
        recover(model, dense, data, config, filter_fn, state_path=path)
    assert_same(model, dense)
    assert path.read_bytes() == saved


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_state(make_model, make_data, tmp_path):
    dense, data, path = make_model(), make_data(), tmp_path / "state.safetensors"
    model = copy.deepcopy(dense)

    def poison(info):
        if info.step == 6:
            with torch.no_grad():
                model.classifier.bias.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="recover: expected a finite loss, got nan at step 7 of 24"):
        recover(model, dense, data, CONFIG, state_path=path, save_every=5, on_step=poison)
    resumed = copy.deepcopy(dense)
    assert recover(resumed, dense, data, CONFIG, state_path=path).steps == 19


def test_a_full_disk_keeps_the_earlier_state(make_model, make_data, tmp_path, monkeypatch):
    path, data = tmp_path / "state.safetensors", make_data()
    config = FinetuneConfig(epochs=2, batch_size=8)
    writes = []

    def failing(tensors, target, metadata):
        writes.append(target)
        if len(writes) == 2:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        state_module_save(tensors, target, metadata)

    state_module_save = state_module.save_file
    monkeypatch.setattr(state_module, "save_file", failing)
    with pytest.raises(OSError, match=r"training state: cannot write .*No space left on device"):
        finetune(make_model(), data, config, state_path=path, save_every=5)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert finetune(make_model(), data, config, state_path=path).steps == 11


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not safetensors", lambda b: b""])
def test_a_damaged_state_is_refused(make_model, make_data, tmp_path, damage):
    path, data = tmp_path / "state.safetensors", make_data(8)
    finetune(make_model(), data, FinetuneConfig(epochs=1), state_path=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"expected a whole safetensors file, got .*; remove the file to start anew"):
        finetune(make_model(), data, FinetuneConfig(epochs=1), state_path=path)


def tampered(path, **changes):
    """Rewrite a state file with other tensors, and a checksum that fits them: as somebody who means it would."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsenlp"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    header["step"] = changes.pop("step", header["step"])
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    state_module.write_state(path, header["identity"], state_module.SavedState(header["step"], tensors))


def test_a_changed_byte_is_found(make_model, make_data, tmp_path):
    path, data = tmp_path / "state.safetensors", make_data(8)
    finetune(make_model(), data, FinetuneConfig(epochs=1), state_path=path)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 3000, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        model = make_model()
        with pytest.raises(
            ValueError, match=r"expected the tensors that were written to .*state\.safetensors, got other"
        ):
            finetune(model, data, FinetuneConfig(epochs=1), state_path=path)
        assert_same(model, make_model())


WEIGHT = "model.classifier.weight"


@pytest.fixture(scope="module")
def stopped(make_model, make_data, tmp_path_factory):
    """(content of the state file of a run that was stopped, what it trained with)."""
    path, arguments = tmp_path_factory.mktemp("stopped") / "state", (make_model(), make_data(), CONFIG)
    options = {"state_path": path, "validation": arguments[1], "on_step": interrupt_at(8)}
    with pytest.raises(KeyboardInterrupt):
        recover(make_model(), *arguments, **options)
    return path.read_bytes(), arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WEIGHT: None}, rf"expected {WEIGHT} \(2, 32\) of torch.float32, got none"),
        ({WEIGHT: torch.zeros(1, 32)}, rf"expected {WEIGHT} \(2, 32\) of torch.float32, got \(1, 32\)"),
        ({WEIGHT: torch.zeros(2, 32).half()}, rf"expected {WEIGHT} .*, got \(2, 32\) of torch.float16"),
        ({"model.other": torch.zeros(1)}, r"expected model.other none, got \(1,\)"),
        ({"optimizer.0.exp_avg": torch.zeros(1)}, r"expected 0.exp_avg \(32,\) of torch.float32, got \(1,\)"),
        ({"optimizer.0.step": None}, r"expected 0.step \(\) of torch.float32, got none"),
        ({"optimizer.9999.step": torch.tensor(1.0)}, "expected 9999.step none, got"),
        ({"optimizer.x": torch.tensor(1.0)}, "expected x none, got"),
        (
            {"random.cpu": torch.zeros(5, dtype=torch.uint8)},
            r"expected random.cpu \(5056,\) of torch.uint8, got \(5,\)",
        ),
        ({"losses": torch.zeros(7, dtype=torch.float64)}, r"expected losses \(8,\) of torch.float64, got \(7,\)"),
        ({"step": 9}, r"expected losses \(9,\) of torch.float64, got \(8,\)"),
        ({"step": 2**31}, "expected a header with version, identity, step, crc32"),
        ({"task.start": None}, r"expected start \(13,\) of torch.float64, got none"),
        ({"task.rounded": torch.tensor(2.0)}, r"expected rounded \(\) of torch.bool, got \(\) of torch.float32"),
        ({"validation.evaluations": torch.zeros(3)}, "expected evaluations of a step, an accuracy and a loss"),
        ({"validation.best.model.other": torch.zeros(3)}, "expected model.bert.embeddings.LayerNorm.bias"),
        ({"system": torch.zeros(3)}, r"expected system none, got \(3,\)"),
    ],
)
def test_a_state_is_not_trusted_for_its_checksum(stopped, make_model, tmp_path, changes, message):
    path, (saved, arguments) = tmp_path / "state.safetensors", stopped
    path.write_bytes(saved)
    tampered(path, **changes)
    model = make_model()
    with pytest.raises(ValueError, match=f"training state: {message}"):
        recover(model, *arguments, state_path=path, validation=arguments[1])
    assert_same(finalize_(model), make_model())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_state_that_is_a_pipe_is_refused(make_model, make_data, tmp_path):
    os.mkfifo(tmp_path / "state")
    with pytest.raises(ValueError, match="state: expected a regular file, got a pipe"):
        finetune(make_model(), make_data(8), FinetuneConfig(epochs=1), state_path=tmp_path / "state")


def test_a_state_of_another_format_is_refused(make_model, make_data, tmp_path, monkeypatch):
    path, data = tmp_path / "state.safetensors", make_data(8)
    finetune(make_model(), data, FinetuneConfig(epochs=1), state_path=path)
    monkeypatch.setattr(state_module, "FORMAT_VERSION", 3)
    with pytest.raises(ValueError, match=r"expected format 3 in .*, got 2; remove the file to start anew"):
        finetune(make_model(), data, FinetuneConfig(epochs=1), state_path=path)


def test_save_every_must_be_positive(make_model, make_data, tmp_path):
    with pytest.raises(ValueError, match="save_every: expected at least 1, got 0"):
        finetune(make_model(), make_data(8), state_path=tmp_path / "s", save_every=0)


def test_total_steps_counts_the_last_short_batch(make_data):
    assert loop_module.total_steps(make_data(20), FinetuneConfig(epochs=2, batch_size=8)) == 6

"""A process that is killed in the middle of a run that uses everything, and the call that goes on after it."""

import copy
import os
import signal

import pytest
import torch

from sparsenlp.train import RecoveryConfig, recover
from sparsenlp.train import state as state_module

CONFIG = RecoveryConfig(
    epochs=3,
    spliced=0.0,
    batch_size=8,
    update_every=2,
    learning_rate=1e-3,
    sparsity=0.75,
    dropout=True,
    rewind=True,
    relation_weight=1.0,
    int8_fraction=0.25,
    evaluate_every=2,
)


@pytest.fixture(scope="module")
def dense(make_model):
    return make_model()


@pytest.fixture(scope="module")
def whole(dense, make_data):
    """(log, model) of an uninterrupted run."""
    model = copy.deepcopy(dense)
    return recover(model, dense, make_data(), CONFIG, validation=make_data(16, seed=1)), model


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(dense, data, validation, path, step, writing):
    """A process whose run is killed after `step`, or as it replaces the state of an earlier step by that of `step`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        on_step = None
        if writing:
            replace, wanted = os.replace, step // 4
            saves = iter(range(1, wanted + 1))
            state_module.os.replace = lambda *paths: die() if next(saves) == wanted else replace(*paths)
        else:
            on_step = lambda info: die() if info.step == step else None  # noqa: E731
        recover(
            copy.deepcopy(dense), dense, data, CONFIG, None, path, 4, quiet=True, on_step=on_step, validation=validation
        )
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(
    ("step", "writing", "resumed_from"),
    [(2, False, 0), (7, False, 4), (14, False, 12), (19, False, 16), (23, False, 20), (12, True, 8), (24, True, 20)],
)
def test_a_killed_run_resumes_to_the_same_result(dense, whole, make_data, tmp_path, step, writing, resumed_from):
    data, validation, path = make_data(), make_data(16, seed=1), tmp_path / "state.safetensors"
    status = run_and_die(dense, data, validation, path, step, writing)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    model = copy.deepcopy(dense)
    log = recover(model, dense, data, CONFIG, None, path, 4, validation=validation)
    expected, other = whole
    assert log.steps == 24 - resumed_from
    assert (log.losses, log.evaluations, log.best) == (expected.losses, expected.evaluations, expected.best)
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

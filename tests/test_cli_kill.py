"""`train` and `prune` killed at many moments, then run again: the same result, and never half an output directory.

A moment is an event that Python reports of the file system, or a training step, so that each run dies at its own place
and the test needs no luck. The processes are forks of this one, as tests/train/test_kill.py does it.
"""

import itertools
import json
import os
import signal
import sys

import pytest
import torch
from test_cli import Unmeasured, invoke, settings, succeed  # noqa: F401  # the fixture is used by all tests here
from tiny_bert import write_table

from sparsenlp import convert
from sparsenlp.interrupt import Terminated
from sparsenlp.train import loop

pytest.importorskip("transformers", reason="the models are models of transformers")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
TINY = ("--model", "textcnn", "--option", "embedding_size=16", "--option", "filters=16")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
WHOLE = {"config.json", "model.safetensors", "tokenizer.json", "training_texts.json"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{verb: (the command without its output directory, weights and number of events of an undisturbed run)}."""
    directory, patch = tmp_path_factory.mktemp("kill"), pytest.MonkeyPatch()
    patch.setattr(convert, "SparsifyConfig", Unmeasured)
    data = ("--data", write_table(directory / "train.csv", 48), "--batch-size", "8")
    train = ("train", *TINY, *data, "--epochs", "2")
    succeed(*at(train, directory / "dense"))
    prune = ("prune", directory / "dense", *data, "--epochs", "2", "--sparsity", "0.5")
    succeed(*at(prune, directory / "sparse"))
    found = {}
    for verb, command, name in (("train", train, "dense"), ("prune", prune, "sparse")):
        counted = directory / f"{verb}-counted"
        assert os.WEXITSTATUS(run_and_die(command, counted, signal.SIGKILL, ("event", None))) == 0
        events = int(counted.with_suffix(".events").read_text())
        found[verb] = (command, (directory / name / "model.safetensors").read_bytes(), events)
    patch.undo()
    return found


def at(command, output):
    """`train OUTPUT ...`, `prune MODEL OUTPUT ...`."""
    place = 1 if command[0] == "train" else 2
    return (*command[:place], output, *command[place:])


def run_and_die(command, output, number, moment):
    """The status of a process that sends itself a signal at the event or step of that number.

    One that is never to do so writes the number of its events beside `output`.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        seen, pid = itertools.count(), os.getpid()

        def event(name, arguments):
            told = name in EVENTS and str(output) in str(arguments[0]) and (name != "open" or arguments[1] != "r")
            if os.getpid() == pid and told and next(seen) == moment[1]:
                os.kill(pid, number)

        def step(self):
            if len(self.losses) == moment[1]:
                os.kill(pid, number)
            return True  # the state is written after every step

        loop._Run.is_due = property(step if moment[0] == "step" else lambda self: True)
        if moment[0] == "event":
            sys.addaudithook(event)
        code = invoke(*at(command, output)).exit_code
        if moment == ("event", None):
            output.with_suffix(".events").write_text(str(next(seen)))
        os._exit(code)
    except Terminated:
        os._exit(143)
    finally:
        os._exit(1)


def left(output):
    """Files of a directory; those of a run that waits apart."""
    return {path.name for path in output.iterdir() if path.name != "work"} if output.exists() else set()


@pytest.mark.parametrize("verb", ["train", "prune"])
@pytest.mark.parametrize("moment", [("step", 3), *(("event", n) for n in (0, 9, -7, -5, -3, -1))], ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_killed_goes_on_to_the_same_result(commands, tmp_path, verb, moment, number):
    command, weights, events = commands[verb]
    output = tmp_path / "out"
    if moment[0] == "event":
        moment = ("event", moment[1] % events)
    status = run_and_die(command, output, number, moment)
    if number == signal.SIGKILL:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == number
    else:
        assert os.WEXITSTATUS(status) == 143
    found = left(output)
    assert not found or found >= WHOLE, "nothing, or everything"
    if found:
        assert (output / "model.safetensors").read_bytes() == weights
    succeed(*at(command, output))
    assert (output / "model.safetensors").read_bytes() == weights
    assert left(output) >= WHOLE
    assert not (output / "work").exists()
    assert not [path for path in tmp_path.iterdir() if path != output], "no staging folder stays"
    if verb == "prune":
        assert json.loads((output / "sparsenlp.json").read_text())["quality"].keys() == {"dense", "sparse"}

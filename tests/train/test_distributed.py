import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsenlp.train import FinetuneConfig, RecoveryConfig, finetune, recover
from sparsenlp.train.distributed import Processes, current_processes

RECOVERY = RecoveryConfig(
    epochs=2, batch_size=8, update_every=2, learning_rate=1e-3, sparsity=0.75, spliced=0.5, bf16=False
)
LIVE = RecoveryConfig(**vars(RECOVERY) | {"cache_gib": 0.0, "relation_weight": 1.0})
FINETUNING = FinetuneConfig(epochs=2, batch_size=8, dropout=False, bf16=False)
WITH_DROPOUT = FinetuneConfig(epochs=2, batch_size=8, bf16=False)


def job(config, data, **options):
    return {"config": config, "data": data, "options": options}


@pytest.fixture(scope="module")
def dense(make_model):
    return make_model()


@pytest.fixture(scope="module")
def data(make_data):
    return make_data(65)  # the last batch of an epoch has one example, fewer than there are processes


@pytest.fixture(scope="module")
def results(dense, data, tmp_path_factory):
    """What each of two processes ended with, by job."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    directory = tmp_path_factory.mktemp("two")
    state = {"state_path": directory / "state.safetensors", "save_every": 5}
    jobs = {
        "recover": job(RECOVERY, data, spoil=True),
        "recover live": job(LIVE, data),
        "finetune": job(FINETUNING, data),
        "dropout": job(WITH_DROPOUT, data),
        "killed": job(WITH_DROPOUT, data, **state, stop=13),
        "resumed": job(WITH_DROPOUT, data, **state),
    }
    dense.save_pretrained(directory / "dense")
    torch.save(jobs, directory / "jobs.pt")
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    run = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", worker, directory],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(directory / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["recover", "recover live", "finetune", "dropout", "resumed"])
def test_both_processes_end_with_the_same_model(results, name):
    first, second = (result[name] for result in results)
    assert first["losses"] == second["losses"]
    assert first["state"].keys() == second["state"].keys()
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][key]), key


@pytest.mark.parametrize(("name", "config"), [("recover", RECOVERY), ("recover live", LIVE)])
def test_two_processes_prune_as_one(results, dense, data, name, config):
    model = copy.deepcopy(dense)
    assert_close(results[0][name], model, recover(model, dense, data, config))


def test_two_processes_finetune_as_one(results, dense, data):
    model = copy.deepcopy(dense)
    assert_close(results[0]["finetune"], model, finetune(model, data, FINETUNING))


def assert_close(result, model, log):
    torch.testing.assert_close(result["losses"], log.losses, rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.bool:
            assert torch.equal(result["state"][name], tensor), name
        else:
            torch.testing.assert_close(result["state"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_resume_to_the_same_result(results):
    killed, whole = results[0]["resumed"], results[0]["dropout"]
    assert killed["steps"] == len(whole["losses"]) - 10
    assert killed["losses"] == whole["losses"]
    for name, tensor in whole["state"].items():
        assert torch.equal(killed["state"][name], tensor), name


def test_processes_that_saw_other_gradients_prune_alike(results):
    first, second = (result["statistics"] for result in results)
    kept = sum(int(mask.sum()) for mask in first.values())
    assert kept == pytest.approx(0.5 * sum(mask.numel() for mask in first.values()), rel=1e-3)
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


def test_dropout_differs_between_processes():
    draws = []
    with torch.random.fork_rng([]):
        for rank, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
            Processes(rank, 2).seed(0, step)
            draws.append(torch.rand(1).item())
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_a_batch_is_divided_without_rest():
    batch = [5, 3, 8, 1, 9]
    processes = [Processes(rank, 3) for rank in range(3)]
    assert sorted(i for p in processes for i in p.shard(batch)) == sorted(batch)
    assert sum(p.weight(batch) for p in processes) == pytest.approx(1)
    assert [(p.shard(batch[:2]), p.weight(batch[:2])) for p in processes] == [([5, 3], 1 / 3)] * 3


def test_torchrun_without_a_process_group_is_refused(monkeypatch, make_model, make_data):
    assert current_processes() == Processes(0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="distributed: expected a process group"):
        finetune(make_model(), make_data(8), FINETUNING)

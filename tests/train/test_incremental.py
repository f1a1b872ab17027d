import copy

import pytest
import torch

from sparsenlp.prune import finalize_, masked_layers, sparsity_of
from sparsenlp.train import FinetuneConfig, IncrementalConfig, RecoveryConfig, finetune, prune_incrementally
from sparsenlp.train import incremental as module

QUICK = {"batch_size": 8, "epochs": 2, "spliced": 0.0, "update_every": 1}


def config(**options):
    phases = {
        "growing": RecoveryConfig(**QUICK, learning_rate=2e-4, ramp_fraction=0.8),
        "recovering": RecoveryConfig(**QUICK, learning_rate=2e-3),
    }
    return IncrementalConfig(**({"sparsities": (0.5, 0.75, 0.9)} | phases | options))


@pytest.fixture(scope="module")
def dense(make_model, make_data):
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    finetune(model, make_data(), FinetuneConfig(epochs=4, batch_size=8, learning_rate=3e-3))
    return model


@pytest.fixture
def model(dense):
    return copy.deepcopy(dense)


def scripted(values):
    """A metric that gives these values in turn."""
    remaining = iter(values)
    return lambda model: next(remaining)


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in masked_layers(model).items()}


def test_rounds_reach_their_sparsities(model, dense, make_data):
    seen = []
    log = prune_incrementally(model, dense, make_data(), sparsity_of, config(), quiet=True, on_round=seen.append)
    assert [round(r.sparsity, 2) for r in log.rounds] == [0.5, 0.75, 0.9]
    assert [r.metric for r in log.rounds] == [r.sparsity for r in log.rounds]
    assert seen == list(log.rounds)
    assert log.dense == 0.0
    assert log.reason == "all sparsities reached"
    assert log.last_kept is log.rounds[-1]
    assert sparsity_of(finalize_(model)) == pytest.approx(0.9, abs=1e-3)


def test_a_round_below_the_floor_is_undone(model, dense, make_data):
    states = []

    def watch(done):
        states.append(weights(model))

    metric = scripted([0.9, 0.88, 0.7])
    log = prune_incrementally(model, dense, make_data(), metric, config(least_metric=0.8), quiet=True, on_round=watch)
    assert [r.kept for r in log.rounds] == [True, False]
    assert log.last_kept is log.rounds[0]
    assert log.reason == "0.7000 at 75.0% zeros is below 0.8000"
    assert sparsity_of(model) == pytest.approx(0.5, abs=1e-3)
    for name, weight in weights(model).items():
        assert torch.equal(weight, states[0][name])


def test_the_first_round_can_be_undone_too(model, dense, make_data):
    log = prune_incrementally(model, dense, make_data(), scripted([0.9, 0.1]), config(least_metric=0.5), quiet=True)
    assert log.last_kept is None
    finalize_(model)
    for name, parameter in dense.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)


def test_pruned_range_grows_from_where_it_was(model, dense, make_data):
    """The second round's ramp begins at the first one's sparsity, so no step is spent on what is there already."""
    sparsities = []
    recover = module.recover

    def watched(*args, **kwargs):
        return recover(*args, **kwargs, on_step=lambda info: sparsities.append(sparsity_of(model)))

    module.recover = watched
    try:
        prune_incrementally(model, dense, make_data(), scripted([1.0] * 3), config(sparsities=(0.5, 0.9)), quiet=True)
    finally:
        module.recover = recover
    second = sparsities[len(sparsities) // 2 :]
    assert second == sorted(second)
    assert second[2] > 0.5


@pytest.mark.parametrize(
    ("options", "values", "reason", "rounds"),
    [
        ({"patience": 1}, [0.9, 0.9], "no better metric in 1 rounds", 1),
        ({"seconds": 1e-9}, [0.9], "out of time after", 0),
    ],
)
def test_it_stops_early(model, dense, make_data, options, values, reason, rounds):
    log = prune_incrementally(model, dense, make_data(), scripted(values), config(**options), quiet=True)
    assert log.reason.startswith(reason)
    assert len(log.rounds) == rounds


def test_a_failing_metric_leaves_the_last_good_state(model, dense, make_data):
    calls = []

    def metric(model):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return 1.0

    with pytest.raises(RuntimeError, match="broken"):
        prune_incrementally(model, dense, make_data(), metric, config(), quiet=True)
    assert sparsity_of(model) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("floor", [None, 0.8], ids=["all kept", "the last undone"])
@pytest.mark.parametrize("stop", [2, 3], ids=["in the second round", "in the third"])
def test_an_interrupted_run_goes_on_after_the_last_round(dense, make_data, tmp_path, floor, stop):
    values, path, data = [0.9, 0.88, 0.85, 0.7], tmp_path / "rounds.safetensors", make_data()
    settings = config(least_metric=floor, patience=3)
    whole, first, again = (copy.deepcopy(dense) for _ in range(3))
    expected = prune_incrementally(whole, dense, data, scripted(values), settings, quiet=True)

    remaining = iter(values[:stop])

    def interrupted(model):
        value = next(remaining, None)
        if value is None:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        prune_incrementally(first, dense, data, interrupted, settings, quiet=True, state_path=path)
    shown = []
    log = prune_incrementally(
        again, dense, data, scripted(values[stop:]), settings, quiet=True, on_round=shown.append, state_path=path
    )
    assert [(r.metric, r.sparsity, r.kept) for r in log.rounds] == [
        (r.metric, r.sparsity, r.kept) for r in expected.rounds
    ]
    assert (log.dense, log.reason) == (expected.dense, expected.reason)
    assert shown == list(log.rounds[stop - 1 :])
    assert [r.seconds for r in log.rounds] == sorted(r.seconds for r in log.rounds)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    finished = prune_incrementally(copy.deepcopy(dense), dense, data, scripted([]), settings, state_path=path)
    assert finished.rounds == log.rounds


def test_a_state_of_other_rounds_is_refused(model, dense, make_data, tmp_path):
    path, data = tmp_path / "rounds.safetensors", make_data()
    prune_incrementally(model, dense, data, scripted([1.0] * 2), config(sparsities=(0.5,)), quiet=True, state_path=path)
    other = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="training state: expected a run with this config"):
        prune_incrementally(other, dense, data, scripted([1.0]), config(), quiet=True, state_path=path)
    assert not masked_layers(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": ()}, "sparsities: expected fractions"),
        ({"sparsities": (0.9, 0.5)}, "that rise"),
        ({"sparsities": (0.5, 1.0)}, "sparsities: expected"),
        ({"seconds": 0}, "seconds: expected a positive number"),
        ({"patience": 0}, "patience: expected at least 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)

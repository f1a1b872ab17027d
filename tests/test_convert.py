import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from sparsenlp import SparseLinear, SparsifyConfig, densify_, sparsify_
from sparsenlp.convert import candidate_densities
from sparsenlp.measure import Timing

BY_PATTERN = SparsifyConfig(measure="off")
MEASURED = SparsifyConfig(blocks=((8, 1), (4, 1)), measure="time")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)])
        self.head = nn.Linear(32, 3, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


@torch.no_grad()
def prune_blocks(linear, block=(8, 1), density=0.2):
    """Zero all but exactly `density` of the blocks."""
    n, k = block
    rows, cols = linear.weight.shape[0] // n, linear.weight.shape[1] // k
    keep = torch.zeros(rows * cols)
    keep[torch.randperm(rows * cols)[: round(density * rows * cols)]] = 1
    linear.weight.mul_(keep.view(rows, cols).repeat_interleave(n, 0).repeat_interleave(k, 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Encoder()
    for layer in model.layers:
        prune_blocks(layer[0])
        prune_blocks(layer[2])
    return model


@pytest.fixture
def ids():
    return torch.arange(12).view(2, 6)


@pytest.fixture
def fake_times(monkeypatch):
    """Replace the clock: {name of a run: seconds}, others 1.0; records the runs."""
    calls = []

    def install(times):
        def interleave(runs, seconds, warm):
            calls.append(sorted(runs))
            return {name: Timing.of([times.get(name, 1.0)] * 3) for name in runs}

        monkeypatch.setattr("sparsenlp.choose.interleave", interleave)
        return calls

    return install


def blocks_of(model):
    return {name: m.block for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def test_converts_what_is_sparse_and_computes_the_same(model, ids):
    expected = model(ids)
    plan = sparsify_(model, BY_PATTERN)
    names = ("layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2")
    assert blocks_of(model) == dict.fromkeys(names, (8, 1))
    assert plan.converted == names
    torch.testing.assert_close(model(ids), expected)
    head = plan.rows[-1]
    assert (head.name, head.chosen, head.reason) == ("head", "dense", "fewer than 30% zeros")


def test_only_the_given_instance_changes(model):
    other = copy.deepcopy(model)
    sparsify_(model, BY_PATTERN)
    assert not blocks_of(other)
    assert type(other.layers[0][0]) is nn.Linear


def test_training_mode_gradients_and_bias_carry_over(model):
    first, second = model.layers[0][0], model.layers[1][0]
    first.weight.requires_grad_(False)
    second.eval()
    bias = first.bias
    sparsify_(model, BY_PATTERN)
    assert not model.layers[0][0].values.requires_grad
    assert model.layers[1][0].values.requires_grad
    assert model.layers[0][0].bias is bias
    assert model.layers[0][0].training
    assert not model.layers[1][0].training


@pytest.mark.parametrize("block", [(16, 1), (8, 1), (4, 1), (4, 4), (8, 8)])
def test_pattern_is_detected(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    prune_blocks(model[0], block, 0.125)
    stored = candidate_densities(model[0].weight, SparsifyConfig())
    assert stored[block] == 0.125
    assert min(stored.values()) == 0.125
    plan = sparsify_(model, BY_PATTERN)
    assert model[0].weight.density == plan.rows[0].stored_density == 0.125


def test_candidates_of_unstructured_zeros():
    torch.manual_seed(0)
    weight = torch.rand(64, 64) * (torch.rand(64, 64) < 0.1)
    (block,) = candidate_densities(weight, SparsifyConfig())
    assert block == (1, 1)
    stored = candidate_densities(weight, SparsifyConfig(blocks=((16, 1), (8, 1), (4, 1))))
    assert list(stored) == [(8, 1), (4, 1)]
    assert stored[4, 1] < 0.4 < stored[8, 1] < 0.7


def test_shapes_that_do_not_divide_are_no_candidates():
    assert list(candidate_densities(torch.zeros(12, 6), SparsifyConfig(blocks=((8, 1), (4, 1), (4, 4))))) == [(4, 1)]


def test_all_zero_layer(model, ids):
    nn.init.zeros_(model.layers[0][0].weight.requires_grad_(False))
    expected = model(ids)
    sparsify_(model, BY_PATTERN)
    assert model.layers[0][0].weight.nnz_blocks == 0
    torch.testing.assert_close(model(ids), expected)


def test_a_layer_whose_zeros_are_yet_to_be_trained_stays_dense(model):
    nn.init.zeros_(model.layers[0][0].weight)
    plan = sparsify_(model, BY_PATTERN)
    assert type(model.layers[0][0]) is nn.Linear
    (row,) = [row for row in plan.rows if row.name == "layers.0.0"]
    assert row.reason == "all zero and yet to be trained; requires_grad_(False) if it was pruned"
    with pytest.raises(ValueError, match="expected a layer with at least 30% zeros, got at most"):
        sparsify_(nn.Sequential(nn.Linear(8, 8), zeroed(nn.Linear(8, 8))), BY_PATTERN)


def test_a_layer_that_masks_leave_nothing_of_becomes_sparse(model, ids):
    prune.custom_from_mask(model.layers[0][0], "weight", torch.zeros_like(model.layers[0][0].weight))
    expected = model(ids)
    assert "layers.0.0" in sparsify_(model, BY_PATTERN).converted
    torch.testing.assert_close(model(ids), expected)


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


def test_layers_that_cannot_be_taken_apart_have_a_row(model):
    model.lstm = nn.LSTM(16, 16)
    prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.9)
    plan = sparsify_(model, BY_PATTERN)
    (row,) = plan.composites
    assert (row.name, row.kind, row.block) == ("lstm", "LSTM", None)
    assert row.sparsity == pytest.approx(0.45, abs=0.01)
    assert row.reason.startswith("weight_hh_l0 carries a mask of torch.nn.utils.prune")


@pytest.mark.parametrize("fuse", [False, True])
def test_densify_is_the_way_back(model, ids, fuse):
    expected = model(ids)
    names = model.state_dict().keys()
    sparsify_(model, replace(BY_PATTERN, fuse=fuse))
    assert blocks_of(model)
    assert densify_(model) is model
    assert not blocks_of(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model(ids), expected)


def test_densify_refuses_what_would_compute_something_else(model):
    model.extra = SparseLinear.from_dense(nn.Linear(16, 16), (8, 1), activation="relu")
    with pytest.raises(ValueError, match="densify_: expected extra without an activation of its own, got relu"):
        densify_(model)
    with pytest.raises(ValueError, match="densify_: expected a model that contains layers, got a single SparseLinear"):
        densify_(model.extra)


def test_filter_sees_module_and_name(model):
    plan = sparsify_(model, BY_PATTERN, lambda module, name: name.startswith("layers.1") and module.in_features == 32)
    assert [row.name for row in plan.rows] == ["layers.1.0"]
    assert list(blocks_of(model)) == ["layers.1.0"]


def test_measurement_decides_for_sparse(model, fake_times):
    fake_times({"dense": 2.0, "8x1": 1.0, "4x1": 1.5})
    plan = sparsify_(model, MEASURED)
    assert set(blocks_of(model).values()) == {(8, 1)}
    assert plan.rows[0].speedup == pytest.approx(2.0)
    assert plan.rows[0].reason == "2.00x faster"


def test_measurement_decides_for_dense(model, fake_times):
    fake_times({"dense": 1.0, "8x1": 0.97})
    plan = sparsify_(model, MEASURED)
    assert not plan.converted
    assert not blocks_of(model)
    assert plan.rows[0].reason == "best sparse (8x1) only 1.03x"


def test_token_counts_weigh_the_same(model, monkeypatch):
    rounds = iter([(1.0, 0.1), (1.0, 8.0)])

    def interleave(runs, seconds, warm):
        dense, sparse = next(rounds)
        return {name: Timing.of([dense if name == "dense" else sparse]) for name in runs}

    monkeypatch.setattr("sparsenlp.choose.interleave", interleave)
    plan = sparsify_(model, SparsifyConfig(token_counts=(1, 128), measure="time"), lambda _, name: name == "layers.0.0")
    assert plan.rows[0].speedup == pytest.approx((10 / 8) ** 0.5)
    assert plan.rows[0].dense.keys() == {1, 128}
    assert plan.converted


def test_a_gain_within_the_noise_stays_dense(model, monkeypatch):
    """Faster by the medians, but slower in four rounds of ten."""

    def interleave(runs, seconds, warm):
        times = {"dense": [1.0] * 10, "8x1": [0.5] * 6 + [1.5] * 4}
        return {name: Timing.of(times.get(name, [2.0] * 10)) for name in runs}

    monkeypatch.setattr("sparsenlp.choose.interleave", interleave)
    plan = sparsify_(model, SparsifyConfig(token_counts=(4,), measure="time"))
    assert not plan.converted
    assert plan.rows[0].reason == "best sparse (8x1) 2.00x, but not beyond the noise"


def test_alike_layers_share_a_measurement(model, fake_times):
    calls = fake_times({"dense": 2.0})
    plan = sparsify_(model, MEASURED)
    assert plan.measurements == len(calls) == 2
    assert plan.rows[0].dense == plan.rows[2].dense


def test_layers_of_other_density_are_measured_apart(model, fake_times):
    prune_blocks(model.layers[1][0], density=0.5)
    calls = fake_times({"dense": 2.0})
    assert sparsify_(model, MEASURED).measurements == len(calls) == 3


def test_real_measurement(model, ids):
    expected = model(ids)
    plan = sparsify_(model, SparsifyConfig(token_counts=(4,), measure="time", seconds=0.01, threads=1))
    torch.testing.assert_close(model(ids), expected)
    for row in plan.rows[:4]:
        assert row.dense[4].median > 0
        assert row.block is None or row.speedup >= 1.05
    assert plan.threads == 1


def test_wrong_result_is_never_installed(model, monkeypatch):
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: forward(self, x) + 0.01)
    with pytest.raises(RuntimeError, match=r"expected layers\.0\.0 as 8x1 to match dense"):
        sparsify_(model, MEASURED)
    assert not blocks_of(model)


def test_nan_result_is_never_installed(model, monkeypatch):
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: x.new_full((len(x), self.out_features), torch.nan))
    with pytest.raises(RuntimeError, match="to match dense"):
        sparsify_(model, MEASURED)


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_parametrized_mask_is_burned_in(ids):
    torch.manual_seed(0)
    model = Encoder()
    mask = (torch.rand(8, 32) < 0.2).float().repeat_interleave(8, 0)
    parametrize.register_parametrization(model.layers[0][0], "weight", Mask(mask))
    expected = model(ids)
    assert sparsify_(model, BY_PATTERN).converted == ("layers.0.0",)
    assert model.layers[0][0].values.requires_grad
    torch.testing.assert_close(model(ids), expected)


def test_torch_prune_mask_is_read_as_it_is_now(ids):
    torch.manual_seed(0)
    model = Encoder()
    mask = (torch.rand(8, 32) < 0.2).float().repeat_interleave(8, 0)
    prune.custom_from_mask(model.layers[0][0], "weight", mask)
    with torch.no_grad():
        model.layers[0][0].weight_orig.mul_(2)
    expected = model(ids)
    assert sparsify_(model, BY_PATTERN).converted == ("layers.0.0",)
    torch.testing.assert_close(model(ids), expected)


def test_shared_linear_stays_shared(model, ids):
    model.layers[1][0] = model.layers[0][0]
    expected = model(ids)
    sparsify_(model, BY_PATTERN)
    assert isinstance(model.layers[0][0], SparseLinear)
    assert model.layers[1][0] is model.layers[0][0]
    torch.testing.assert_close(model(ids), expected)


def test_weight_shared_with_an_embedding_stays_dense(model):
    model.head = nn.Linear(32, 20, bias=False)
    prune_blocks(model.head, (4, 1))
    model.embed.weight = model.head.weight
    plan = sparsify_(model, BY_PATTERN)
    assert plan.rows[-1].reason == "weight is shared with another module"
    assert model.embed.weight is model.head.weight


def test_layer_with_hooks_stays_dense(model):
    model.layers[0][0].register_forward_hook(lambda *_: None)
    plan = sparsify_(model, BY_PATTERN)
    assert plan.rows[0].reason == "has forward hooks, which would be lost"
    assert type(model.layers[0][0]) is nn.Linear


def test_layers_whose_owner_reads_the_weight_stay_dense():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Linear(32, 32), block).eval()
    for linear in (model[0], block.linear1, block.linear2, block.self_attn.out_proj):
        prune_blocks(linear)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        assert sparsify_(model, BY_PATTERN).converted == ("0",)
        torch.testing.assert_close(model(x), expected)


def test_plan_is_a_table_and_json(model, fake_times):
    fake_times({"dense": 0.002, "8x1": 0.0005})
    plan = sparsify_(model, MEASURED)
    lines = str(plan).splitlines()
    assert " ".join(lines[0].split()) == "layer shape dtype zeros chosen dense ms @128 sparse ms @128 why"
    assert " ".join(lines[1].split()) == "layers.0.0 64x32 float32 80.1% 8x1 2.000 0.500 4.00x faster"
    assert lines[6] == "4 of 5 layers are sparse now"
    assert "2 measurements" in lines[7]
    assert f"torch {torch.__version__}" in lines[-1]
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["rows"][0]["sparse_seconds"]["8x1"]["128"]["median"] == 0.0005
    assert data["rows"][4]["chosen"] == "dense"


def test_plan_without_measuring_has_no_time_columns(model):
    lines = str(sparsify_(model, BY_PATTERN)).splitlines()
    assert " ".join(lines[0].split()) == "layer shape dtype zeros chosen why"
    assert lines[1].endswith("by pattern, not measured")


@pytest.mark.parametrize(
    ("make", "filter_fn", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), None, "expected a model with nn.Linear layers, got none in Sequential"),
        (lambda: nn.Linear(8, 8), None, "got a single nn.Linear; wrap it"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), lambda *_: False, "expected filter_fn to accept a layer, got none of"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), None, r"at least 30% zeros, got at most 0.0% \(0\); prune first"),
    ],
)
def test_documented_errors(make, filter_fn, message):
    with pytest.raises(ValueError, match=message):
        sparsify_(make(), BY_PATTERN, filter_fn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_counts": ()}, "expected token_counts"),
        ({"token_counts": (0,)}, "expected token_counts of at least 1"),
        ({"min_sparsity": 1.0}, r"expected min_sparsity in \[0, 1\)"),
        ({"blocks": ((0, 1),)}, "expected blocks with sides"),
        ({"min_speedup": 0.0}, "expected min_speedup > 0"),
        ({"measure": "guess"}, "expected measure as one of model, time, off, got 'guess'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**options)


def test_an_error_leaves_the_model_as_it_was(model, ids):
    expected = model(ids)
    seen = []

    def fail_late(module, name):
        seen.append(name)
        if len(seen) == 4:
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        sparsify_(model, BY_PATTERN, fail_late)
    assert not blocks_of(model)
    assert torch.equal(model(ids), expected)

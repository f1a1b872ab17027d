"""Models with recurrent layers, from dense over masked to sparse, saved and loaded."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_rnn import VOCABULARY, TinyRnn, tiny_rnn
from torch import nn

from sparsenlp import SparseConv1d, SparseGRU, SparseLSTM, SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.benchmark import dense_twin, dynamic_int8
from sparsenlp.checkpoint import CheckpointError, seal
from sparsenlp.compare import compare
from sparsenlp.data import TokenizedDataset
from sparsenlp.prune import (
    Block,
    LayerTarget,
    block_obs_,
    finalize_,
    harden_,
    layer_sparsity,
    masked_layers,
    movement_,
    prunable,
    prune_,
    prune_layers_,
    sparsegpt_,
    sparsity_of,
    wanda_,
)
from sparsenlp.report import report
from sparsenlp.train import RecoveryConfig, recover

BY_PATTERN = SparsifyConfig(measure="off")
IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def run(model):
    with torch.no_grad():
        return model(IDS, MASK).logits


def few_texts(count=16):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    labels = [int(sum(row) > len(row) * VOCABULARY / 2) for row in ids]
    return TokenizedDataset({"input_ids": ids}, torch.tensor(labels), {"input_ids": 0})


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_from_dense_to_a_loaded_sparse_model(tmp_path, criterion):
    dense = tiny_rnn(cell="LSTM" if criterion == "taylor" else "GRU")
    model = copy.deepcopy(dense)
    config = RecoveryConfig(
        epochs=2,
        batch_size=8,
        update_every=1,
        criterion=criterion,
        sparsity=0.75,
        spliced=0.0,
        hidden_weight=0.0,
        bf16=False,
    )
    log = recover(model, dense, few_texts(), config, lambda module, name: name.startswith("rnn."))
    assert all(loss == loss for loss in log.losses)
    assert len(masked_layers(model)) == 8
    finalize_(model)
    assert type(model.rnn) is type(dense.rnn)
    assert sparsity_of(model) == pytest.approx(0.75, abs=0.01)
    moved = compare(dense, model, {"input_ids": IDS, "attention_mask": MASK})
    assert {change.layer.name for change in moved.layers} > {"rnn.ih_l0", "rnn.hh_l1_reverse"}
    sparse = copy.deepcopy(model)
    assert sparsify_(sparse, BY_PATTERN).converted == ("rnn",)
    save_pretrained(sparse, tmp_path / "sparse")
    loaded = from_pretrained(tmp_path / "sparse", model_class=TinyRnn)
    assert isinstance(loaded.rnn, SparseLSTM | SparseGRU)
    assert torch.equal(run(loaded), run(sparse))
    torch.testing.assert_close(run(loaded), run(model))
    assert torch.equal(run(dense_twin(loaded)), run(model))
    assert type(dense_twin(loaded).rnn) is type(dense.rnn)
    assert run(dynamic_int8(model)).isfinite().all()
    layers = {layer.name: layer for layer in report(loaded).layers}
    assert layers["rnn.hh_l0"].stored_bytes < 0.5 * layers["rnn.hh_l0"].dense_bytes
    save_pretrained(model, tmp_path / "dense")
    assert torch.equal(run(from_pretrained(tmp_path / "dense", model_class=TinyRnn)), run(model))


def test_int8_weights_survive_the_checkpoint(tmp_path):
    model = tiny_rnn()
    prune_(model, Block(8, 1), 0.75)
    finalize_(model)
    sparsify_(model, BY_PATTERN)
    model.rnn = model.rnn.quantize()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, model_class=TinyRnn)
    assert loaded.rnn.hh_l0.values.dtype == torch.int8
    assert torch.equal(run(loaded), run(model))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(8, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.gru(x)[0])


@pytest.fixture
def plain(tmp_path):
    """(sparse model, directory of its checkpoint)."""
    torch.manual_seed(0)
    model = Plain()
    prune_(model, Block(8, 1), 0.5)
    sparsify_(finalize_(model), BY_PATTERN)
    return model, save_pretrained(model, tmp_path / "plain")


def test_a_plain_module_loads_into_its_skeleton(plain):
    model, directory = plain
    skeleton, x = Plain(), torch.randn(3, 2, 8)
    assert torch.equal(from_pretrained(directory, skeleton)(x), model(x))
    assert isinstance(skeleton.gru, SparseGRU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda modules, _: modules.pop("gru.hh_l0"), "expected all matrices of gru or none, got none for gru.hh_l0"),
        (lambda modules, _: modules["gru.hh_l0"].update(activation="relu"), "expected gru.hh_l0 of dtype float32 with"),
        (lambda modules, _: modules["gru.hh_l0"].update(shape=[48, 8]), "gru.hh_l0 of shape (48, 16), got (48, 8)"),
        (
            lambda modules, _: modules.update({"gru.xx_l0": modules["gru.hh_l0"]}),
            "only layers of the model",
        ),
        (lambda _, tensors: tensors["gru.hh_l0.col_indices"].fill_(16), "gru.hh_l0"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused_and_the_skeleton_stays(plain, change, message):
    _, directory = plain
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    change(config["quantization_config"]["modules"], tensors)
    config["quantization_config"]["crc32"] = seal(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    skeleton = Plain()
    before = list(skeleton.modules())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        from_pretrained(directory, skeleton)
    assert list(skeleton.modules()) == before


def test_masks_hold_through_training_and_gradients_are_those_of_the_masked_weight():
    model = tiny_rnn()
    prune_(model, Block(8, 1), 0.5)
    weight = model.rnn.hh_l0.parametrizations.weight.original
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(IDS, MASK, labels=torch.tensor([0, 1])).loss.backward()
    kept = model.rnn.hh_l0.weight != 0
    assert torch.equal(weight.grad != 0, kept)
    optimizer.step()
    finalize_(model)
    assert model.rnn.weight_hh_l0 is weight
    assert torch.equal(weight != 0, kept)
    assert not torch.equal(weight[kept], before[kept])


def test_solvers_and_other_pruners_reach_the_matrices():
    batches = [{"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])}] * 3
    hh = "rnn.hh_l0"
    model = tiny_rnn()
    block_obs_(model, batches, Block(8, 1), 0.5)
    assert layer_sparsity(model)[hh] == pytest.approx(0.5)
    model = tiny_rnn()
    movement_(model, Block(8, 1), 0.5)
    assert layer_sparsity(finalize_(harden_(model)))[hh] == pytest.approx(0.5)
    model = tiny_rnn()
    assert prune_layers_(model, {hh: LayerTarget(Block(8, 1), 0.5)}) == {hh: pytest.approx(0.5)}
    assert [*masked_layers(model)] == [hh]


@pytest.mark.parametrize("solver", [sparsegpt_, wanda_])
def test_layerwise_solvers_see_what_recurrent_layers_multiply(solver):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)])

        def forward(self, x):
            for layer in self.layers:
                x, _ = layer(x)
            return x

    torch.manual_seed(0)
    model = Stack()
    sparsities = solver(model, [torch.randn(4, 6, 8)], Block(4, 1), 0.5)
    assert sparsities == {name: pytest.approx(0.5) for name in prunable(model)}


def test_refusals_leave_torchs_layers():
    model = tiny_rnn()
    before = list(model.modules())
    batch = [{"input_ids": IDS, "attention_mask": MASK}]
    for call, message in (
        (lambda: prune_(model, Block(7, 1), 0.5), "rnn.ih_l0"),
        (lambda: prune_(model, Block(8, 1), 0.5, "wanda"), "input_square"),
        (lambda: sparsegpt_(model, batch, Block(8, 1), 0.5), "expected an nn.ModuleList of blocks"),
        (
            lambda: recover(model, tiny_rnn(num_labels=3), few_texts(), RecoveryConfig(hidden_weight=0.0)),
            "teacher: expected logits",
        ),
    ):
        with pytest.raises((ValueError, KeyError), match=re.escape(message)):
            call()
        assert list(model.modules()) == before


def test_a_convolution_goes_the_same_way(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv1d(8, 16, 3, padding="same"), nn.Linear(16, 2)

        def forward(self, x):
            return self.out(self.conv(x).relu().amax(-1))

    torch.manual_seed(0)
    model, x = Network(), torch.randn(2, 8, 9)
    assert prune_(model, Block(8, 1), 0.75, filter_fn=lambda module, name: name.startswith("conv")) == {
        "conv.filters": pytest.approx(0.75)
    }
    model(x).sum().backward()
    grad = model.conv.filters.parametrizations.weight.original.grad
    assert grad.any()
    assert not grad[model.conv.filters.weight == 0].any()
    finalize_(model)
    expected = model(x)
    assert type(model.conv) is nn.Conv1d
    assert sparsity_of(model, lambda module, name: name == "conv.filters") == pytest.approx(0.75)
    plan = sparsify_(model, SparsifyConfig(blocks=((8, 1),), measure="time", token_counts=(2, 9), seconds=0.0))
    assert set(plan.composites[0].times) == {"dense", "8x1"}
    assert plan.composites[0].cosines["8x1"] > 0.99999
    if not plan.composites[0].block:
        sparsify_(model, BY_PATTERN)
    assert isinstance(model.conv, SparseConv1d)
    torch.testing.assert_close(model(x), expected)
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path, Network())(x), model(x))
    twin = dense_twin(model)
    assert type(twin.conv) is nn.Conv1d
    torch.testing.assert_close(twin(x), expected)


def test_a_model_that_is_still_split_is_not_saved(tmp_path):
    model = tiny_rnn()
    prune_(model, Block(8, 1), 0.5)
    with pytest.raises(ValueError, match=r"expected masks burned in \(finalize_\), got rnn split for pruning"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

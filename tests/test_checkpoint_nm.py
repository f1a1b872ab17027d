"""Checkpoints of models with NMLinear layers: what the other layers' tests of test_checkpoint.py do not reach."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import Mlp, rewrite_config, rewrite_tensors
from torch import nn

from sparsenlp import CheckpointError, NMLinear, from_pretrained, save_pretrained
from sparsenlp.ops.nm_linear import pack


def nm_layer(linear: nn.Linear, pattern: tuple[int, int] = (2, 4), activation: str = "none") -> NMLinear:
    """The largest n of each m neighbours, exactly."""
    n, m = pattern
    groups = linear.weight.detach().unflatten(1, (-1, m))
    kept = torch.zeros_like(groups).scatter_(2, groups.abs().topk(n, dim=2).indices, 1.0)
    with torch.no_grad():
        linear.weight.copy_((groups * kept).flatten(1))
    return NMLinear.from_dense(linear, pattern, activation)


def nm_model(int8: bool = False) -> Mlp:
    torch.manual_seed(0)
    model = Mlp()
    first, second = nm_layer(model.first, activation="relu"), nm_layer(model.second, (4, 8))
    model.first, model.second = (first.quantize(), second.quantize(0.05)) if int8 else (first, second)
    return model


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("int8", [False, True])
def test_round_trip(int8, tmp_path, x):
    model = nm_model(int8)
    loaded = from_pretrained(save_pretrained(model, tmp_path / "nm"), Mlp())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert (loaded.first.pattern, loaded.second.pattern) == ((2, 4), (4, 8))
    assert (loaded.first.activation, loaded.second.input_scale) == ("relu", 0.05 if int8 else None)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name in ("first", "second"):
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.packed, pack(layer.indices, layer.pattern))
        assert layer.values.dtype == (torch.int8 if int8 else torch.float32)


def test_a_pattern_without_native_kernels(tmp_path, x):
    model = Mlp()
    model.first = nm_layer(model.first, (1, 8))
    loaded = from_pretrained(save_pretrained(model, tmp_path / "nm"), Mlp())
    assert loaded.first.packed is None
    assert torch.equal(loaded(x), model(x))


def swap_first_pair(tensors: dict[str, torch.Tensor]) -> None:
    tensors["first.indices"][0, :2] = tensors["first.indices"][0, :2].flip(0)


TENSOR_FAULTS = {
    "position beyond the group": (lambda t: t["first.indices"].__setitem__((0, 1), 4), r"first: .*indices in \[0, 4\)"),
    "positions out of order": (swap_first_pair, "first: .*expected indices to increase"),
    "a wider type": (lambda t: t.update({"first.indices": t["first.indices"].int()}), "first: expected indices of"),
    "a column too few": (lambda t: t.update({"first.values": t["first.values"][:, 1:].clone()}), "first: expected val"),
    "indices missing": (lambda t: t.pop("second.indices"), "expected a tensor second.indices, got none"),
    "another value": (lambda t: t["first.values"].mul_(2), "first: expected crc32"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tampered_tensors(fault, tmp_path):
    change, message = TENSOR_FAULTS[fault]
    saved = save_pretrained(nm_model(), tmp_path / "nm")
    rewrite_tensors(saved, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(saved, Mlp())


CONFIG_FAULTS = {
    "more than there are": (lambda e: e.update(pattern=[5, 4]), "first: expected a valid pattern"),
    "none": (lambda e: e.update(pattern=[0, 4]), "first: expected a valid pattern"),
    "text": (lambda e: e.update(pattern="2:4"), "first: expected a valid pattern"),
    "another": (lambda e: e.update(pattern=[1, 4]), "first: expected values of"),
    "of blocks too": (lambda e: e.update(block=[8, 1]), "first: expected the fields"),
    "another shape": (lambda e: e.update(shape=[32, 18]), r"expected first of shape \(32, 16\), got \(32, 18\)"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_tampered_config(fault, tmp_path):
    change, message = CONFIG_FAULTS[fault]
    saved = save_pretrained(nm_model(), tmp_path / "nm")
    rewrite_config(saved, lambda config: change(config["modules"]["first"]))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(saved, Mlp())


def test_a_recurrent_layer_has_blocks(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(8, 8)

    from sparsenlp.layers.composite import split_composites_

    model = Recurrent()
    split_composites_(model, {"rnn"})
    model.rnn.ih_l0, model.rnn.hh_l0 = nm_layer(model.rnn.ih_l0), nm_layer(model.rnn.hh_l0)
    saved = save_pretrained(model, tmp_path / "nm")
    with pytest.raises(CheckpointError, match=r"expected rnn\.ih_l0 in blocks, got a pattern"):
        from_pretrained(saved, Recurrent())


def test_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    layer = model.encoder.layer[0]
    layer.intermediate.dense = nm_layer(layer.intermediate.dense)
    layer.output.dense = nm_layer(layer.output.dense).quantize()
    saved = save_pretrained(model, tmp_path / "bert")
    assert load_file(saved / "model.safetensors")["encoder.layer.0.intermediate.dense.indices"].dtype == torch.uint8
    loaded = from_pretrained(saved)
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected, got = model(tokens).last_hidden_state, loaded(tokens).last_hidden_state
    assert torch.equal(got, expected)
    assert isinstance(loaded.encoder.layer[0].output.dense, NMLinear)
    rewrite_tensors(saved, lambda t: t["encoder.layer.0.output.dense.indices"].__setitem__((0, 1), 7))
    with pytest.raises(CheckpointError, match=r"indices in \[0, 4\)"):
        from_pretrained(saved)

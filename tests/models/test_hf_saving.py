"""What is saved is what is loaded: models inside of others, copies, states, dense ones, and loaders without us."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsenlp import CheckpointError, SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.models.decoders import conv1d_to_linear_
from sparsenlp.models.encoders import unfuse_encoders_
from sparsenlp.prune import Block, finalize_, prune_

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.arange(12).view(2, 6)


class Classifier(nn.Module):
    """As people wrap their encoders."""

    def __init__(self):
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**SIZES))
        self.head = nn.Linear(32, 8)

    def forward(self, ids):
        return self.head(self.bert(ids).pooler_output)


def sparsified(model, fuse=False):
    prune_(model, Block(8, 1), 0.8)
    sparsify_(finalize_(model), SparsifyConfig(measure="off", fuse=fuse))
    return model.eval()


def bert(task="BertModel", **options):
    torch.manual_seed(0)
    return getattr(transformers, task)(transformers.BertConfig(**SIZES, **options)).eval()


def hidden(model):
    with torch.no_grad():
        return model(IDS)[0]


def described(directory):
    return json.loads((directory / "config.json").read_text()).get("quantization_config", {})


def densify(model):
    """As people do it by hand."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseLinear):
                setattr(parent, name, child.to_dense())
    return model


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_inside_of_another_module(copied, fuse, tmp_path):
    torch.manual_seed(0)
    model = COPIES[copied](sparsified(Classifier(), fuse))
    model.bert.save_pretrained(tmp_path / "inner")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "inner")
    assert torch.equal(hidden(loaded), hidden(model.bert))
    assert ("fused_encoders" in described(tmp_path / "inner")) is fuse
    save_pretrained(model, tmp_path / "outer")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "outer", Classifier()).eval()(IDS), model(IDS))


def test_the_base_of_a_model_with_a_head_and_that_again(tmp_path):
    model = sparsified(bert("BertForSequenceClassification"))
    for number in range(2):
        model.save_pretrained(tmp_path / f"outer{number}")
        model.bert.save_pretrained(tmp_path / f"inner{number}")
        outer, inner = (from_pretrained(tmp_path / f"{kind}{number}") for kind in ("outer", "inner"))
        assert torch.equal(hidden(outer), hidden(model))
        assert torch.equal(hidden(inner), hidden(model.bert))
        model.bert.encoder.layer[0].output.dense.values.data.mul_(2)
    assert model.bert.config is model.config
    assert not hasattr(model.config, "quantization_config")
    outer.bert.save_pretrained(tmp_path / "of a loaded one")
    assert torch.equal(hidden(from_pretrained(tmp_path / "of a loaded one")), hidden(outer.bert))


def test_parts_of_a_model_of_two_models(tmp_path):
    parts = transformers.BertConfig(**SIZES), transformers.BertConfig(**SIZES)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    torch.manual_seed(0)
    model = sparsified(transformers.EncoderDecoderModel(config))
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(hidden(from_pretrained(tmp_path / "encoder")), hidden(model.encoder))
    loaded = from_pretrained(tmp_path / "both")
    with torch.no_grad():
        got, wanted = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (loaded, model))
    assert torch.equal(got, wanted)


def test_a_state_to_save_is_what_is_saved(tmp_path):
    model = sparsified(bert())
    state = {name: 2 * t if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "twice", state_dict=state)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "twice")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    model.save_pretrained(tmp_path / "once")
    assert torch.equal(hidden(from_pretrained(tmp_path / "once")), hidden(model))


def test_a_state_with_other_blocks_and_our_own_file_can_be_saved(tmp_path):
    model, other = sparsified(bert()), bert()
    prune_(other, Block(8, 1), 0.5)
    sparsify_(finalize_(other), SparsifyConfig(measure="off", fuse=False, blocks=((8, 1),)))
    model.save_pretrained(tmp_path / "other", state_dict=other.state_dict())
    assert torch.equal(hidden(from_pretrained(tmp_path / "other")), hidden(other))
    model.save_pretrained(tmp_path / "file", state_dict=load_file(tmp_path / "other/model.safetensors"))
    assert torch.equal(hidden(from_pretrained(tmp_path / "file")), hidden(other))


DENSE = "encoder.layer.0.output.dense"
STATES = {
    "column": lambda s: s[f"{DENSE}.col_indices"].fill_(99),
    "missing": lambda s: s.pop(f"{DENSE}.crow_indices"),
    "dtypes": lambda s: s.update({f"{DENSE}.values": s[f"{DENSE}.values"].half()}),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_state_that_describes_no_layer_is_not_saved(fault, tmp_path):
    model = sparsified(bert())
    state = copy.deepcopy(model.state_dict())
    STATES[fault](state)
    with pytest.raises(ValueError, match=f"save_pretrained: .*{DENSE}"):
        model.save_pretrained(tmp_path / "model", state_dict=state)
    assert not (tmp_path / "model/model.safetensors").exists()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(hidden(from_pretrained(tmp_path / "model")), hidden(model))


@pytest.mark.parametrize("source", ["config.json", "a loaded model", "a saved model"])
def test_a_dense_model_of_a_sparse_configuration_stays_dense(source, tmp_path):
    sparse = sparsified(bert("BertForSequenceClassification"))
    sparse.save_pretrained(tmp_path / "sparse")
    config = {
        "config.json": lambda: transformers.AutoConfig.from_pretrained(tmp_path / "sparse"),
        "a loaded model": lambda: from_pretrained(tmp_path / "sparse").config,
        "a saved model": lambda: sparse.config,
    }[source]()
    dense = transformers.BertModel(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    told = [w for w in caught if "all weights are dense" in str(w.message)]
    assert len(told) == (source == "config.json")
    assert torch.equal(hidden(loaded), hidden(dense))
    loaded.save_pretrained(tmp_path / "again")
    assert not described(tmp_path / "again")
    assert "fusion_config" not in (tmp_path / "again/config.json").read_text()


def test_some_dense_and_some_sparse_weights_are_refused(tmp_path):
    sparsified(bert()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    for part in ("values", "crow_indices", "col_indices"):
        del tensors[f"{DENSE}.{part}"]
    save_file(tensors | {f"{DENSE}.weight": torch.ones(32, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"expected a tensor {DENSE}"):
        transformers.AutoModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("saves", [0, 1])
@pytest.mark.parametrize("way", ["dequantize", "by hand"])
def test_a_model_that_is_dense_again_gets_an_ordinary_directory(saves, way, tmp_path):
    model = sparsified(bert())
    expected = hidden(model)
    for _ in range(saves):
        model.save_pretrained(tmp_path / "sparse")
    model.dequantize() if way == "dequantize" else densify(model)
    model.save_pretrained(tmp_path / "dense")
    assert not described(tmp_path / "dense")
    torch.testing.assert_close(hidden(transformers.BertModel.from_pretrained(tmp_path / "dense")), expected)


def test_an_unfused_model_is_not_fused_when_loaded(tmp_path):
    model = sparsified(bert(), fuse=True)
    unfuse_encoders_(model)
    model.save_pretrained(tmp_path / "model")
    assert "fused_encoders" not in described(tmp_path / "model")
    densify(model)
    model.save_pretrained(tmp_path / "model")
    assert not described(tmp_path / "model")


def test_a_model_in_half_precision_comes_back(tmp_path):
    model = sparsified(bert()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for options in ({}, {"device_map": "cpu"}):
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "model", **options)
        assert loaded.encoder.layer[0].output.dense.values.dtype == torch.bfloat16
        assert torch.equal(hidden(loaded), hidden(model))


def test_names_are_those_of_the_modules(tmp_path):
    model = sparsified(bert())
    with pytest.warns(UserWarning, match="save_original_format is ignored"):
        model.save_pretrained(tmp_path / "model", save_original_format=True)
    assert torch.equal(hidden(from_pretrained(tmp_path / "model")), hidden(model))


DOORS = {
    "auto": "transformers.AutoModelForSequenceClassification.from_pretrained(d)",
    "auto, other sizes": "transformers.AutoModel.from_pretrained(d, ignore_mismatched_sizes=True)",
    "class": "transformers.BertForSequenceClassification.from_pretrained(d)",
    "base class": "transformers.BertModel.from_pretrained(d)",
    "own config": "transformers.BertModel.from_pretrained(d, config=transformers.BertConfig(**sizes))",
    "config first": "transformers.AutoModel.from_pretrained(d, config=transformers.AutoConfig.from_pretrained(d))",
    "pipeline": "transformers.pipeline('text-classification', model=d, tokenizer=object())",
    "state": "transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).load_state_dict("
    "safetensors.torch.load_file(d + '/model.safetensors'), strict=False)",
}


def test_no_door_without_us_gives_random_weights(tmp_path):
    sparsified(bert("BertForSequenceClassification")).save_pretrained(tmp_path / "model")
    script = f"""if True:
        import sys, transformers, safetensors.torch
        d, sizes = sys.argv[1], {SIZES!r}
        for name, door in {DOORS!r}.items():
            try:
                eval(door)
                print(name, "NO ERROR")
            except (ValueError, RuntimeError) as error:
                print(name, error)
        assert "sparsenlp" not in sys.modules
    """
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], check=True, capture_output=True, text=True
    ).stdout
    assert "NO ERROR" not in output
    assert output.count("`import sparsenlp` before from_pretrained") >= len(DOORS) - 2, output


@pytest.mark.parametrize("loaded", [False, True])
def test_gpt2_that_is_dense_again_keeps_the_layout_of_its_family(loaded, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = sparsified(conv1d_to_linear_(transformers.GPT2LMHeadModel(config)))
    if loaded:
        model.save_pretrained(tmp_path / "sparse")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    expected = hidden(model)
    assert isinstance(model.transformer.h[0].attn.c_proj, SparseLinear)
    model.dequantize()
    torch.testing.assert_close(hidden(model), expected)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(hidden(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.parametrize("part", ["encoder", "encoder.layer"])
def test_a_part_cannot_make_the_model_around_it_load_at_random(part, tmp_path):
    model = bert()
    prune_(model, Block(8, 1), 0.8)
    with pytest.warns(UserWarning, match="part of a transformers model"):
        sparsify_(finalize_(model).get_submodule(part), SparsifyConfig(measure="off", fuse=False))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for number, each in enumerate((model, copied)):
        each.save_pretrained(tmp_path / f"own{number}")
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.AutoModel.from_pretrained(tmp_path / f"own{number}")
        torch.testing.assert_close(
            hidden(from_pretrained(save_pretrained(each, tmp_path / f"ours{number}"))), hidden(model)
        )
    model.load_state_dict(copied.state_dict())

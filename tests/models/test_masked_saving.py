"""Models with masks on: what transformers' own save_pretrained writes is what runs, and ours refuses."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import prune as torch_prune

import sparsenlp
from sparsenlp.models.decoders import conv1d_to_linear_
from sparsenlp.models.own import own_class
from sparsenlp.prune import Block, finalize_, movement_, prune_
from sparsenlp.train.int8 import start_rounding

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

IDS = torch.arange(5, 14)[None]
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 99}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 32}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def gpt2():
    return conv1d_to_linear_(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)))


def birnn():
    cls = own_class("BiRnnForSequenceClassification")
    return cls(cls.config_class(vocab_size=99))


def make(kind, prune=True):
    torch.manual_seed(0)
    model = kind().eval()
    if prune:
        prune_(model, Block(8, 1), 0.5)
    return model


def output(model):
    with torch.no_grad():
        return model(IDS).logits


def rounded(model):
    start_rounding([m for m in model.modules() if hasattr(m, "parametrizations") and isinstance(m, torch.nn.Linear)])
    return model


def of_movement(model):
    finalize_(model)
    movement_(model, Block(4, 1), 0.8)
    return model


def of_part(model):
    finalize_(model)
    prune_(model.base_model, Block(4, 1), 0.7)
    return model


VARIANTS = {"masks": lambda model: model, "a copy": copy.deepcopy, "int8": rounded, "movement": of_movement}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*((bert, variant) for variant in VARIANTS), (gpt2, "masks"), (birnn, "masks"), (birnn, "int8")],
)
def test_what_transformers_saves_with_masks_on_is_what_runs(kind, variant, tmp_path):
    model = VARIANTS[variant](make(kind))
    expected, names = output(model), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == names
    assert torch.equal(output(model), expected)
    for load in (type(model).from_pretrained, sparsenlp.from_pretrained):
        torch.testing.assert_close(output(load(tmp_path).eval()), expected)


def test_a_model_whose_part_was_pruned(tmp_path):
    model = of_part(make(bert))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded.eval()), output(model))


def test_saving_twice_with_more_pruned_in_between(tmp_path):
    model = make(bert)
    model.save_pretrained(tmp_path)
    prune_(model, Block(8, 1), 0.8)
    model.save_pretrained(tmp_path)
    loaded = sparsenlp.from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded), output(model))
    prune_(loaded, Block(8, 1), 0.8)
    torch.testing.assert_close(output(loaded), output(model))


def test_a_fresh_process_without_this_package_loads_it(tmp_path):
    model = make(bert)
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, transformers; assert 'sparsenlp' not in sys.modules\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(torch.arange(5, 14)[None]).logits.flatten().tolist())"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    got = torch.tensor([float(number) for number in printed.strip(" []\n").split(",")])
    torch.testing.assert_close(got, output(model).flatten())


def torch_masked(model):
    finalize_(model)
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.LSTM | torch.nn.Linear))
    torch_prune.l1_unstructured(layer, next(name for name in layer._parameters if name.startswith("weight")), 0.5)
    return model


def check_refused(model, directory):
    with pytest.raises(ValueError, match=r"save_pretrained: expected masks burned in \(finalize_\)"):
        sparsenlp.save_pretrained(model, directory)
    assert not directory.exists()
    expected = output(model)
    sparsenlp.save_pretrained(finalize_(model), directory)
    torch.testing.assert_close(output(sparsenlp.from_pretrained(directory)), expected)


@pytest.mark.parametrize("variant", [VARIANTS["masks"], of_movement, torch_masked])
@pytest.mark.parametrize("kind", [bert, birnn])
def test_ours_refuses_masks_of_every_kind(kind, variant, tmp_path):
    check_refused(variant(make(kind)), tmp_path / "out")


@pytest.mark.parametrize("pruner", ["ours", "torch"])
def test_ours_refuses_masks_beside_sparse_layers(pruner, tmp_path):
    model = make(bert, prune=False)
    prune_(model, Block(8, 1), 0.9, filter_fn=lambda module, name: "layer.0.output" in name)
    sparsenlp.sparsify_(finalize_(model), sparsenlp.SparsifyConfig(measure="off", fuse=False))
    if pruner == "ours":
        prune_(model, Block(4, 1), 0.5)
    else:
        torch_prune.l1_unstructured(model.bert.pooler.dense, "weight", 0.5)
    with pytest.raises(ValueError, match=r"save_pretrained: expected masks burned in"):
        model.save_pretrained(tmp_path / "transformers")
    check_refused(model, tmp_path / "out")

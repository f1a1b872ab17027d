import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsenlp import CheckpointError, SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.checkpoint import seal
from sparsenlp.tensor_files import checksum, memory_of

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.arange(12).view(2, 6)


@torch.no_grad()
def sparsified(model):
    torch.manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name:
            rows, cols = module.weight.shape
            module.weight.mul_((torch.rand(rows // 8, cols) < 0.2).repeat_interleave(8, 0))
    sparsify_(model, SparsifyConfig(measure="off", fuse=False))
    return model.eval()


def sparse_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return sparsified(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)))


@pytest.fixture(scope="module")
def logits(bert):
    with torch.no_grad():
        return bert(IDS).logits


@pytest.fixture
def saved(bert, tmp_path):
    return save_pretrained(bert, tmp_path / "bert")


def rewrite_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def rewrite_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def auto(directory, **kwargs):
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, **kwargs)


@pytest.mark.parametrize("load", [auto, from_pretrained])
def test_round_trip(bert, saved, logits, load):
    loaded = load(saved)
    assert type(loaded) is type(bert)
    assert not loaded.training
    assert sparse_names(loaded) == sparse_names(bert)
    assert len(sparse_names(loaded)) == 12
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits)
    for name, tensor in bert.state_dict().items():
        got = loaded.state_dict()[name]
        assert torch.equal(got, tensor), name
        assert got.dtype == tensor.dtype
    layer = loaded.bert.encoder.layer[0].output.dense
    assert layer.values.stride() == bert.bert.encoder.layer[0].output.dense.values.stride()


def test_own_save_pretrained_gives_the_same_files(bert, saved, tmp_path):
    bert.save_pretrained(tmp_path / "own")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "own" / name).read_bytes() == (saved / name).read_bytes()


def test_saving_again_after_loading_and_training(saved, tmp_path):
    loaded = auto(saved).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    loaded.eval()
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(auto(tmp_path / "again")(IDS).logits, loaded(IDS).logits)


SCRIPTS = {
    "sparsenlp first": "import sparsenlp; from transformers import AutoModelForSequenceClassification as Auto",
    "transformers first": "from transformers import AutoModelForSequenceClassification as Auto; import sparsenlp",
}


@pytest.mark.parametrize("order", SCRIPTS)
def test_fresh_process_in_either_order_of_imports(saved, logits, tmp_path, order):
    save_file({"logits": logits, "ids": IDS}, tmp_path / "expected.safetensors")
    script = f"""if True:
        import sys, torch
        from safetensors.torch import load_file
        {SCRIPTS[order]}
        expected = load_file(sys.argv[2])
        model = Auto.from_pretrained(sys.argv[1])
        assert sum(isinstance(m, sparsenlp.SparseLinear) for m in model.modules()) == 12
        with torch.no_grad():
            assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    """
    arguments = [str(saved), str(tmp_path / "expected.safetensors")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)


def test_import_is_light_and_works_without_transformers():
    script = """if True:
        import sys
        sys.modules["transformers"] = None  # as if it were not installed
        import torch, sparsenlp
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        torch.nn.init.zeros_(model[0].weight[:4])
        sparsenlp.sparsify_(model, sparsenlp.SparsifyConfig(measure="off", fuse=False))
        assert [name for name in sys.modules if name.startswith("transformers")] == ["transformers"]
    """
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_base_model_from_a_checkpoint_with_a_head_and_back(bert, saved, tmp_path):
    base = transformers.AutoModel.from_pretrained(saved)
    assert {f"bert.{name}" for name in sparse_names(base)} == sparse_names(bert)
    base.save_pretrained(tmp_path / "base")
    headed = auto(tmp_path / "base", num_labels=3)
    assert sparse_names(headed) == sparse_names(bert)
    save_pretrained(headed, tmp_path / "headed")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "headed")(IDS).logits, headed.eval()(IDS).logits)


def test_model_that_came_from_a_base_checkpoint(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    model = sparsified(auto(tmp_path / "base"))
    for directory in (tmp_path / "a", tmp_path / "b"):
        model.save_pretrained(directory) if directory.name == "a" else save_pretrained(model, directory)
        with torch.no_grad():
            assert torch.equal(from_pretrained(directory)(IDS).logits, model(IDS).logits)


def test_tied_decoder(tmp_path):
    torch.manual_seed(0)
    model = sparsified(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)))
    loaded = from_pretrained(save_pretrained(model, tmp_path / "mlm"))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_dtype_argument(saved):
    loaded = auto(saved, dtype=torch.bfloat16)
    layer = loaded.bert.encoder.layer[0].output.dense
    assert layer.values.dtype == torch.bfloat16
    assert layer.col_indices.dtype == torch.int32
    assert loaded(IDS).logits.dtype == torch.bfloat16


def test_loaded_model_is_an_ordinary_one(saved, logits):
    loaded = auto(saved)
    assert loaded.half().float().double().dtype == torch.float64
    dense = auto(saved)
    dense.dequantize()
    assert not sparse_names(dense)
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, logits)


def test_models_that_share_a_config_stay_apart(tmp_path):
    config = transformers.BertConfig(**SIZES)
    dense = transformers.BertForSequenceClassification(config)
    sparse = sparsified(transformers.BertForSequenceClassification(config))
    sparse.save_pretrained(tmp_path / "sparse")
    dense.save_pretrained(tmp_path / "dense")
    assert not hasattr(config, "quantization_config")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    assert sparse.bert.config is sparse.config


def test_deepcopy_still_saves(bert, tmp_path, logits):
    with torch.no_grad():
        assert torch.equal(from_pretrained(save_pretrained(copy.deepcopy(bert), tmp_path / "c"))(IDS).logits, logits)


def test_tokenizer_is_saved_along(bert, tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "vocab.txt").write_text("a")

    directory = save_pretrained(bert, tmp_path / "m", Tokenizer())
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}


def test_failed_save_leaves_no_trace(bert, saved, tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(bert, saved, Tokenizer())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


FIRST = "bert.encoder.layer.0.output.dense"
NORM = "encoder.layer.0.output.LayerNorm.weight"
FAULTS = {
    "version": ("config", lambda c: c["quantization_config"].update(format_version=9), "format_version 2, got 9"),
    "field": ("config", lambda c: c["quantization_config"].update(x=1), "expected no other fields"),
    "name": ("config", lambda c: c["quantization_config"]["modules"].update({"../x": {}}), "expected a module name"),
    "columns": ("tensors", lambda t: t[f"{FIRST}.col_indices"].fill_(99), r"col_indices in \[0, 64\)"),
    "value": ("tensors", lambda t: t[f"{FIRST}.values"].mul_(2), "expected crc32"),
    "missing": ("tensors", lambda t: t.pop(f"{FIRST}.crow_indices"), r"crow_indices, got none"),
    "shape": ("config", lambda c: c.update(intermediate_size=128), r"expected bert\.encoder.* of shape \(128, 32\)"),
}


@pytest.mark.parametrize("load", [auto, from_pretrained])
@pytest.mark.parametrize("fault", FAULTS)
def test_tampered_files(saved, fault, load):
    where, change, message = FAULTS[fault]
    (rewrite_config if where == "config" else rewrite_tensors)(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_from_pretrained_is_strict_about_dense_tensors(saved):
    rewrite_tensors(saved, lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(CheckpointError, match=r"expected a tensor classifier\.weight, got none"):
        from_pretrained(saved)


def test_from_pretrained_is_strict_about_dense_shapes(saved):
    rewrite_tensors(saved, lambda tensors: tensors.update({"classifier.weight": torch.ones(7, 32)}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight: expected crc32"):
        from_pretrained(saved)


def test_from_pretrained_is_strict_about_layers_the_model_lacks(saved):
    rewrite_config(saved, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"got unexpected_keys bert\.encoder\.layer\.1"):
        from_pretrained(saved)


def test_class_named_in_the_file_must_be_a_model_of_transformers(saved):
    rewrite_config(saved, lambda config: config.update(architectures=["Trainer"]))
    with pytest.raises(CheckpointError, match="expected a transformers model class"):
        from_pretrained(saved)
    assert sparse_names(from_pretrained(saved, model_class=transformers.BertForSequenceClassification))


@pytest.mark.parametrize("load", [auto, from_pretrained])
def test_garbage_and_pickles_are_refused(saved, load):
    raw = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        load(saved)
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises((CheckpointError, OSError), match="safetensors"):
        load(saved)


def test_state_dict_cannot_be_checked(saved):
    config = transformers.AutoConfig.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="expected checkpoint files to check"):
        transformers.BertForSequenceClassification.from_pretrained(None, config=config, state_dict={})


def test_dense_model_gets_an_ordinary_directory(tmp_path):
    """No quantization_config without a sparse layer: transformers alone must be able to load it."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    save_pretrained(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text(encoding="utf-8"))
    torch.testing.assert_close(from_pretrained(tmp_path / "dense")(IDS).logits, model(IDS).logits)


def test_all_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    save_pretrained(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), tmp_path / "dense")
    modes = {path.stat().st_mode for path in (tmp_path / "dense").iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_int8(bert, tmp_path, dtype):
    model = copy.deepcopy(bert)
    for layer in model.bert.encoder.layer:
        for part in (layer.intermediate, layer.output):
            part.dense = part.dense.quantize()
    loaded = auto(save_pretrained(model, tmp_path / "int8"), dtype=dtype)
    dense = loaded.bert.encoder.layer[0].intermediate.dense
    assert (dense.values.dtype, dense.scales.dtype, dense.bias.dtype) == (torch.int8, torch.float32, dtype)
    model.to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def reseal(directory, change):
    """A description that says something else, and whose checksum holds."""

    def edit(config):
        change(config["quantization_config"])
        config["quantization_config"]["crc32"] = seal(config["quantization_config"])

    rewrite_config(directory, edit)


def auto_base(directory):
    return transformers.AutoModel.from_pretrained(directory)


EVERY_DOOR = [auto, auto_base, from_pretrained]


@pytest.mark.parametrize("load", EVERY_DOOR)
@pytest.mark.parametrize("alias", ["encoder.layer.0.output.dense", f"bert.{FIRST}"])
def test_no_tensor_under_another_name(saved, load, alias):
    rewrite_tensors(saved, lambda t: t.update({f"{alias}.col_indices": t[f"{FIRST}.col_indices"] + 9999}))
    with pytest.raises(CheckpointError, match="expected only tensors of the model"):
        load(saved)


@pytest.mark.parametrize("load", EVERY_DOOR)
@pytest.mark.parametrize("name", [NORM, f"bert.bert.{NORM}"])
def test_no_described_tensor_for_the_same_target(saved, load, name):
    """The description may list both: still one part of the model has one tensor."""
    rewrite_tensors(saved, lambda t: t.update({name: t[f"bert.{NORM}"] * 2}))
    tensor = load_file(saved / "model.safetensors")[name]
    crc32 = checksum(tensor.dtype, tensor.shape, memory_of(tensor))
    reseal(saved, lambda d: d["tensors"].update({name: crc32}))
    if (load, name) == (auto_base, f"bert.bert.{NORM}"):  # this class has no place for it
        assert torch.equal(load(saved).state_dict()[NORM], torch.ones(32))
        return
    with pytest.raises(CheckpointError, match=r"expected one tensor for each part of the model|unexpected_keys"):
        load(saved)


def test_no_second_layer_for_the_same_target(saved):
    short = FIRST.removeprefix("bert.")
    rewrite_tensors(
        saved, lambda t: t.update({f"{short}{n.removeprefix(FIRST)}": t[n].clone() for n in [*t] if FIRST in n})
    )
    reseal(saved, lambda d: d["modules"].update({short: d["modules"][FIRST]}))
    for load in EVERY_DOOR:
        with pytest.raises(CheckpointError, match="expected one name for each part of the model"):
            load(saved)


DENSE = ["bert.embeddings.word_embeddings.weight", f"bert.{NORM}", "classifier.bias"]


@pytest.mark.parametrize("load", EVERY_DOOR)
@pytest.mark.parametrize("name", DENSE)
def test_every_tensor_has_a_checksum(saved, load, name):
    rewrite_tensors(saved, lambda t: t[name].view(-1)[0].add_(1))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: expected crc32"):
        load(saved)


@pytest.mark.parametrize("load", EVERY_DOOR)
def test_shards_are_checked_too(bert, tmp_path, load):
    bert.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert sparse_names(load(tmp_path / "shards"))
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        tensors = load_file(shard)
        if DENSE[0] in tensors:
            tensors[DENSE[0]][0, 0] += 1
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{DENSE[0]}: expected crc32"):
        load(tmp_path / "shards")


@pytest.mark.parametrize("load", EVERY_DOOR)
def test_the_description_has_a_checksum(saved, load):
    rewrite_config(saved, lambda c: c["quantization_config"]["modules"][FIRST].update(activation="relu"))
    with pytest.raises(CheckpointError, match="of the description"):
        load(saved)


@pytest.mark.parametrize("load", EVERY_DOOR)
def test_loaded_tensors_are_no_map_of_the_file(saved, load):
    loaded = load(saved)
    before = copy.deepcopy(loaded.state_dict())
    file = saved / "model.safetensors"
    with open(file, "r+b") as raw:
        raw.write(b"\xff" * file.stat().st_size)
    with open(file, "r+b") as raw:
        raw.truncate(10)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "memfd:sparsenlp" not in maps.read_text()
        assert str(saved) not in maps.read_text()


@pytest.mark.parametrize("load", [auto, from_pretrained])
def test_what_was_checked_is_what_runs(saved, logits, load, monkeypatch):
    """The file changes right after the check, before transformers reads it."""
    from sparsenlp.models.hf import SparseNlpQuantizer

    check = SparseNlpQuantizer._process_model_before_weight_loading

    def then_change(self, model, **kwargs):
        check(self, model, **kwargs)
        rewrite_tensors(saved, lambda tensors: [tensor.zero_() for tensor in tensors.values()])

    monkeypatch.setattr(SparseNlpQuantizer, "_process_model_before_weight_loading", then_change)
    with torch.no_grad():
        assert torch.equal(load(saved)(IDS).logits, logits)


CONFIG_FAULTS = {
    "no heads": {"num_attention_heads": 0},
    "text for a size": {"hidden_size": "wide"},
    "null vocabulary": {"vocab_size": None},
    "list for an activation": {"hidden_act": ["gelu"]},
    "huge vocabulary": {"vocab_size": 2**40},
    "very many layers": {"num_hidden_layers": 2**40},
    "two classes": {"architectures": ["BertModel", "BertModel"]},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_bad_configuration_is_the_checkpoint_s_fault(saved, fault):
    rewrite_config(saved, lambda config: config.update(CONFIG_FAULTS[fault]))
    with pytest.raises(CheckpointError, match=str(saved)):
        from_pretrained(saved)


def test_arguments_still_reach_the_configuration(saved):
    loaded = from_pretrained(saved, dtype=torch.bfloat16, output_hidden_states=True, attn_implementation="eager")
    assert (loaded.dtype, loaded.config.output_hidden_states) == (torch.bfloat16, True)
    assert loaded.config._attn_implementation == "eager"
    assert len(loaded(IDS).hidden_states) == 3

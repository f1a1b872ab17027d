import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from sparsenlp import (
    CheckpointError,
    SparseLinear,
    SparsifyConfig,
    checkpoint,
    from_pretrained,
    save_pretrained,
    sparsify_,
    tensor_files,
)
from sparsenlp.checkpoint import parse_description, seal

FUZZ = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.norm(self.second(torch.relu(self.first(x)))) * self.scale


def pruned_mlp():
    torch.manual_seed(0)
    model = Mlp()
    with torch.no_grad():
        for linear in (model.first, model.second):
            rows, cols = linear.weight.shape
            linear.weight.mul_((torch.rand(rows // 8, cols) < 0.3).repeat_interleave(8, 0))
    return model


@pytest.fixture(scope="module")
def model():
    model = pruned_mlp()
    sparsify_(model, SparsifyConfig(measure="off"))
    return model


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory):
    return save_pretrained(model, tmp_path_factory.mktemp("checkpoints") / "mlp")


@pytest.fixture
def saved(model, tmp_path):
    return save_pretrained(model, tmp_path / "mlp")


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def rewrite_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    description = config["quantization_config"]
    change(description)
    description["crc32"] = seal(description)
    path.write_text(json.dumps(config))


def rewrite_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip(model, saved, x):
    loaded = from_pretrained(saved, Mlp())
    assert torch.equal(loaded(x), model(x))
    assert loaded.first.block == (8, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.first.values.stride() == model.first.values.stride()


def test_round_trip_in_a_fresh_process(saved, model, x, tmp_path):
    save_file({"x": x, "y": model(x).detach()}, tmp_path / "xy.safetensors")
    script = """if True:
        import sys, torch
        from safetensors.torch import load_file
        sys.path.insert(0, sys.argv[3])
        from test_checkpoint import Mlp
        import sparsenlp
        xy = load_file(sys.argv[2])
        assert torch.equal(sparsenlp.from_pretrained(sys.argv[1], Mlp())(xy["x"]), xy["y"])
    """
    arguments = [str(saved), str(tmp_path / "xy.safetensors"), os.path.dirname(__file__)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)


@pytest.fixture
def int8_model():
    torch.manual_seed(0)
    model = Mlp()
    model.first = SparseLinear.from_dense(model.first, (8, 4)).quantize()
    model.second = SparseLinear.from_dense(model.second, (8, 4)).quantize(input_scale=0.05)
    return model


@pytest.fixture
def int8_saved(int8_model, tmp_path):
    return save_pretrained(int8_model, tmp_path / "int8")


def test_round_trip_of_int8(int8_model, int8_saved, x):
    loaded = from_pretrained(int8_saved, Mlp())
    assert loaded.first.values.dtype == torch.int8
    assert (loaded.first.input_scale, loaded.second.input_scale) == (None, 0.05)
    with torch.no_grad():
        assert torch.equal(loaded(x), int8_model(x))


INT8_FAULTS = {
    "not int8": (lambda c: c["modules"]["first"].update(int8=False), "first: expected a valid int8"),
    "scale of zero": (lambda c: c["modules"]["second"].update(input_scale=0.0), "second: expected a valid input_scale"),
    "scale as text": (lambda c: c["modules"]["second"].update(input_scale="1"), "second: expected a valid input_scale"),
    "half a description": (lambda c: c["modules"]["first"].pop("input_scale"), "first: expected the fields"),
}


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_tampered_config_of_int8(int8_saved, fault):
    change, message = INT8_FAULTS[fault]
    rewrite_config(int8_saved, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(int8_saved, Mlp())


INT8_TENSOR_FAULTS = {
    "zero scale": (lambda t: t["first.scales"].__setitem__(0, 0.0), "first: .*expected finite scales above 0"),
    "nan scale": (lambda t: t["first.scales"].__setitem__(0, torch.nan), "first: .*expected finite scales above 0"),
    "value of -128": (lambda t: t["first.values"].__setitem__((0, 0, 0), -128), r"first: .*in \[-127, 127\]"),
    "float values": (lambda t: t.update({"first.values": t["first.values"].float()}), "first: expected values of"),
    "scales missing": (lambda t: t.pop("first.scales"), "expected a tensor first.scales, got none"),
    "other scale": (lambda t: t["first.scales"].mul_(2), "first: expected crc32"),
}


@pytest.mark.parametrize("fault", INT8_TENSOR_FAULTS)
def test_tampered_tensors_of_int8(int8_saved, fault):
    change, message = INT8_TENSOR_FAULTS[fault]
    rewrite_tensors(int8_saved, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(int8_saved, Mlp())


def test_disk_holds_canonical_bsr(model, saved):
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("first.values"), model.first.values)
        assert file.get_tensor("first.col_indices").dtype == torch.int16
        assert file.get_tensor("first.crow_indices").dtype == torch.int32
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("sparsenlp", 2)
    assert config["modules"]["first"]["block"] == [8, 1]
    assert config["modules"]["second"]["bias"] is False


def test_wide_layers_keep_int32_columns(tmp_path):
    linear = nn.Linear(40000, 8, bias=False)
    with torch.no_grad():
        linear.weight[:, :39000] = 0
    model = nn.Sequential(SparseLinear.from_dense(linear, (8, 1)))
    directory = save_pretrained(model, tmp_path / "wide")
    assert load_file(directory / "model.safetensors")["0.col_indices"].dtype == torch.int32
    loaded = from_pretrained(directory, nn.Sequential(nn.Linear(40000, 8, bias=False)))
    assert torch.equal(loaded[0].col_indices, model[0].col_indices)


def test_pruned_layers_are_small_on_disk(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    with torch.no_grad():
        model[0].weight.mul_((torch.rand(64, 512) < 0.1).repeat_interleave(8, 0))
    sparsify_(model, SparsifyConfig(measure="off"))
    file = save_pretrained(model, tmp_path / "m") / "model.safetensors"
    assert file.stat().st_size < 512 * 512 * 4 / 8


def test_shared_and_tied_modules(tmp_path, x):
    class Tied(Mlp):
        def __init__(self):
            super().__init__()
            self.again = self.first
            self.head, self.tail = nn.Linear(16, 4), nn.Linear(16, 4)
            self.tail.weight = self.head.weight

    torch.manual_seed(0)
    model = Tied()
    with torch.no_grad():
        model.first.weight.mul_((torch.rand(4, 16) < 0.3).repeat_interleave(8, 0))
    sparsify_(model, SparsifyConfig(measure="off"))
    loaded = from_pretrained(save_pretrained(model, tmp_path / "tied"), Tied())
    assert loaded.again is loaded.first
    assert isinstance(loaded.first, SparseLinear)
    assert loaded.tail.weight is loaded.head.weight
    assert torch.equal(loaded.tail(x), model.tail(x))


def test_skeleton_keeps_mode_and_requires_grad(saved):
    skeleton = Mlp().eval().requires_grad_(False)
    loaded = from_pretrained(saved, skeleton)
    assert loaded is skeleton
    assert not loaded.first.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_overwriting_keeps_other_files(model, saved):
    (saved / "notes.txt").write_text("mine")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.first.values.mul_(2)
    save_pretrained(changed, saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert torch.equal(from_pretrained(saved, Mlp()).first.values, changed.first.values)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("function", ["sparsenlp.checkpoint.save_file", "os.fsync"])
def test_failed_save_leaves_no_trace(model, saved, tmp_path, monkeypatch, existing, function):
    target = saved if existing else tmp_path / "new"
    before = contents(saved)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, no_space)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, target)
    assert contents(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_file_that_cannot_grow(model, saved, tmp_path):
    import resource

    before = contents(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            save_pretrained(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_save_refuses_masks(tmp_path):
    masked = pruned_mlp()
    prune.l1_unstructured(masked.first, "weight", 0.5)
    with pytest.raises(ValueError, match=r"expected masks burned in .*got a mask on first"):
        save_pretrained(masked, tmp_path / "m")
    parametrized = pruned_mlp()
    parametrize.register_parametrization(parametrized.second, "weight", nn.Identity())
    with pytest.raises(ValueError, match="got a mask on second"):
        save_pretrained(parametrized, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_it_could_not_load(tmp_path, model):
    with pytest.raises(ValueError, match="expected a module name like encoder"):
        save_pretrained(nn.ModuleDict({"up/down": copy.deepcopy(model.first)}), tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a directory, got a file"):
        save_pretrained(model, tmp_path / "file")


def test_plain_checkpoint_needs_a_skeleton(saved):
    with pytest.raises(ValueError, match="expected model=<dense skeleton>"):
        from_pretrained(saved)
    with torch.device("meta"):
        skeleton = Mlp()
    with pytest.raises(ValueError, match=r"expected a skeleton with memory .*got \w+ on meta"):
        from_pretrained(saved, skeleton)


CONFIG_FAULTS = {
    "unknown version": (lambda c: c.update(format_version=3), "expected format_version 2, got 3$"),
    "version as bool": (lambda c: c.update(format_version=True), "expected format_version 2, got True"),
    "earlier version": (lambda c: c.update(format_version=1), "got 1; convert and save the model again"),
    "other method": (lambda c: c.update(quant_method="gptq"), "quant_method 'sparsenlp'"),
    "modules as list": (lambda c: c.update(modules=[]), "expected modules to be an object, got list"),
    "path as name": (lambda c: c["modules"].update({"../../etc/x": c["modules"].pop("first")}), "a module name like"),
    "unknown module": (lambda c: c["modules"].update(third=c["modules"]["first"]), "expected only layers of the model"),
    "field missing": (lambda c: c["modules"]["first"].pop("block"), "first: expected the fields"),
    "field added": (lambda c: c["modules"]["first"].update(x=1), "first: expected the fields"),
    "block of zero": (lambda c: c["modules"]["first"].update(block=[0, 1]), "first: expected a valid block"),
    "block not dividing": (lambda c: c["modules"]["first"].update(block=[5, 1]), "first: expected values of"),
    "negative count": (lambda c: c["modules"]["first"].update(nnz_blocks=-1), "first: expected a valid nnz_blocks"),
    "huge count": (lambda c: c["modules"]["first"].update(nnz_blocks=2**40), "first: expected values of"),
    "other shape": (lambda c: c["modules"]["first"].update(shape=[32, 32]), "expected first of shape"),
    "no bias": (lambda c: c["modules"]["first"].update(bias=False), "expected first with bias=True, got False"),
    "code as activation": (lambda c: c["modules"]["first"].update(activation="os.system"), "a valid activation"),
    "unknown dtype": (lambda c: c["modules"]["first"].update(dtype="int8"), "first: expected a valid dtype"),
    "other dtype": (lambda c: c["modules"]["first"].update(dtype="float16"), "first: expected values of"),
    "checksum": (lambda c: c["modules"]["first"].update(crc32=1), "first: expected crc32 1, got"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_tampered_config(saved, fault):
    change, message = CONFIG_FAULTS[fault]
    rewrite_config(saved, change)
    skeleton = Mlp()
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(saved, skeleton)
    assert type(skeleton.first) is nn.Linear


TENSOR_FAULTS = {
    "column too high": (lambda t: t["first.col_indices"].__setitem__(-1, 16), r"first: .*col_indices in \[0, 16\)"),
    "column negative": (lambda t: t["first.col_indices"].__setitem__(0, -1), r"first: .*col_indices in \[0, 16\)"),
    "columns unsorted": (lambda t: t["first.col_indices"].copy_(t["first.col_indices"].flip(0)), "col_indices to incr"),
    "rows decreasing": (lambda t: t["first.crow_indices"].__setitem__(1, 10**6), "crow_indices never to decrease"),
    "rows not from zero": (lambda t: t["first.crow_indices"].__setitem__(0, 1), "crow_indices from 0"),
    "wide columns": (lambda t: t.update({"first.col_indices": t["first.col_indices"].long()}), "expected col_indices"),
    "float columns": (lambda t: t.update({"first.col_indices": t["first.col_indices"].float()}), "col_indices of"),
    "half values": (lambda t: t.update({"first.values": t["first.values"].half()}), "first: expected values of"),
    "fewer values": (lambda t: t.update({"first.values": t["first.values"][1:]}), "first: expected values of"),
    "changed value": (lambda t: t["first.values"].mul_(2), "first: expected crc32"),
    "sparse tensor missing": (lambda t: t.pop("second.crow_indices"), "a tensor second.crow_indices, got none"),
    "dense tensor missing": (lambda t: t.pop("norm.weight"), "a tensor norm.weight, got none"),
    "unknown tensor": (lambda t: t.update(evil=torch.ones(1)), "expected only tensors of the model, got .evil"),
    "dense shape": (lambda t: t.update({"norm.weight": torch.ones(4)}), "expected norm.weight of"),
    "dense dtype": (lambda t: t.update({"norm.weight": torch.ones(16).half()}), "expected norm.weight of"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tampered_tensors(saved, fault):
    change, message = TENSOR_FAULTS[fault]
    rewrite_tensors(saved, change)
    skeleton = Mlp()
    before = copy.deepcopy(skeleton.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(saved, skeleton)
    assert "model.safetensors" in str(caught.value)
    for name, tensor in skeleton.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_missing_files_and_wrong_kinds(saved, tmp_path):
    with pytest.raises(CheckpointError, match="expected a readable JSON file"):
        from_pretrained(tmp_path / "nowhere", Mlp())
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        from_pretrained(saved, Mlp())
    for text in ("[]", "{", '{"a": ' * 10000, "\x00"):
        (saved / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: expected a"):
            from_pretrained(saved, Mlp())


def load_bytes(pristine, tmp_path, data):
    """from_pretrained with other bytes in model.safetensors."""
    (tmp_path / "config.json").write_bytes((pristine / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data)
    return from_pretrained(tmp_path, Mlp())


def test_loaded_tensors_are_no_map_of_the_file(saved, x):
    loaded = from_pretrained(saved, Mlp())
    before = loaded(x)
    with open(saved / "model.safetensors", "r+b") as file:
        file.write(b"\x7f" * 2000)
        file.truncate(10)
    assert torch.equal(loaded(x), before)


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "scale"])
def test_every_tensor_has_a_checksum(saved, name):
    rewrite_tensors(saved, lambda tensors: tensors[name].add_(1))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}: expected crc32"):
        from_pretrained(saved, Mlp())


def test_the_description_has_a_checksum(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["modules"]["first"]["activation"] = "relu"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: expected crc32 .* of the description"):
        from_pretrained(saved, Mlp())


class Twice(Mlp):
    """One layer and one norm under two names each."""

    def __init__(self):
        super().__init__()
        self.again, self.scaled = self.first, self.norm


def test_one_name_for_each_layer(model, tmp_path):
    twice = Twice()
    twice.first = twice.again = model.first
    saved = save_pretrained(twice, tmp_path / "twice")
    rewrite_tensors(saved, lambda t: t.update({f"again{n[5:]}": t[n].clone() for n in [*t] if n.startswith("first.")}))
    rewrite_config(saved, lambda c: c["modules"].update(again=c["modules"]["first"]))
    with pytest.raises(CheckpointError, match="expected one name for each part of the model, got first and again"):
        from_pretrained(saved, Twice())


def test_one_name_for_each_tensor(model, tmp_path):
    twice = Twice()
    twice.first = twice.again = model.first
    saved = save_pretrained(twice, tmp_path / "twice")
    rewrite_tensors(saved, lambda tensors: tensors.update({"scaled.bias": tensors["norm.bias"].clone()}))
    rewrite_config(saved, lambda c: c["tensors"].update({"scaled.bias": c["tensors"]["norm.bias"]}))
    with pytest.raises(CheckpointError, match=r"got norm\.bias and scaled\.bias for one"):
        from_pretrained(saved, Twice())


def test_a_checkpoint_replaced_while_it_is_opened(model, saved, tmp_path, monkeypatch):
    """config.json is read from the old directory, and by the time of the weights file it is gone."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.values.mul_(2)
    read, calls = tensor_files.read_json, []

    def then_replace(path, folder):
        config = read(path, folder)
        if not calls:
            calls.append(path)
            save_pretrained(other, saved)
        return config

    monkeypatch.setattr(tensor_files, "read_json", then_replace)
    assert torch.equal(from_pretrained(saved, Mlp()).first.values, other.first.values)


def test_a_checkpoint_replaced_after_it_was_opened(model, saved, monkeypatch):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.values.mul_(2)
    fill = checkpoint._fill

    def replace_first(*arguments):
        save_pretrained(other, saved)
        return fill(*arguments)

    monkeypatch.setattr(checkpoint, "_fill", replace_first)
    assert torch.equal(from_pretrained(saved, Mlp()).first.values, model.first.values)


@FUZZ
@given(data=st.data())
def test_flipped_bit_is_caught_or_harmless(pristine, model, tmp_path, data):
    raw = bytearray((pristine / "model.safetensors").read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        loaded = load_bytes(pristine, tmp_path, bytes(raw))
    except CheckpointError:
        return
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@FUZZ
@given(data=st.data())
def test_truncated_file(pristine, tmp_path, data):
    raw = (pristine / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError):
        load_bytes(pristine, tmp_path, raw[: data.draw(st.integers(0, len(raw) - 1))])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("block", "shape", "nnz_blocks", "bias", "activation", "dtype", "crc32")


@FUZZ
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_other_field_value_is_refused(pristine, tmp_path, field, value):
    config = json.loads((pristine / "config.json").read_text())
    entry = config["quantization_config"]["modules"]["first"]
    if type(entry[field]) is type(value) and entry[field] == value:
        return
    entry[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((pristine / "model.safetensors").read_bytes())
    if field == "activation" and value in ("relu", "gelu"):
        return
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path, Mlp())


@FUZZ
@given(description=JSON)
def test_any_other_description_is_refused(description):
    with pytest.raises(CheckpointError):
        parse_description(description)

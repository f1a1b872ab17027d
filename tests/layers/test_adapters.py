import warnings

import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, densify_, from_pretrained, save_pretrained, sparsify_
from sparsenlp.layers.adapters import adapted_layers, adapter_modules
from sparsenlp.prune import Block, finalize_, prune_, sparsity_of

transformers = pytest.importorskip("transformers", reason="adapters sit on models of transformers")
peft = pytest.importorskip("peft", reason="adapters come from peft")

BY_PATTERN = SparsifyConfig(measure="off")
IDS = torch.arange(5, 14)[None]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
ATTENTION = ["query", "value"]
CALLED = {
    "lora": lambda: lora(),
    "lora on all": lambda: lora(target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=ATTENTION, total_step=10),
    "vera": lambda: peft.VeraConfig(target_modules=ATTENTION, r=8),
    "copies": lambda: lora(modules_to_save=["intermediate"]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, task_type=TASK),
}
READ = {
    "dora": lambda: lora(use_dora=True),
    "hra": lambda: peft.HRAConfig(target_modules=ATTENTION),
}
TASK = "FEATURE_EXTRACTION"


def lora(**options):
    return peft.LoraConfig(**({"r": 8, "target_modules": ATTENTION, "init_lora_weights": False} | options))


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SIZES)).eval()


def masked():
    model = bert()
    prune_(model, Block(8, 1), 0.7)
    return model


def pruned():
    return finalize_(masked())


def adapted(model, config=None):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config or lora()).eval()


def output(model):
    with torch.no_grad():
        return model(IDS)[0]


def gradients(model):
    model.zero_grad()
    model(IDS)[0].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def query(model):
    return next(module for name, module in model.named_modules() if name.endswith("layer.0.attention.self.query"))


@pytest.mark.parametrize("kind", CALLED)
def test_layers_beneath_an_adapter_become_sparse_and_the_adapter_stays(kind):
    model = adapted(pruned(), CALLED[kind]())
    expected, before = output(model), gradients(model)
    matrices = {module for module in adapter_modules(model) if isinstance(module, nn.Linear)}
    plan = sparsify_(model, BY_PATTERN)
    assert matrices <= set(model.modules())
    rows = [row for row in plan.rows if row.reason == "part of an adapter, which stays as it is"]
    assert len(rows) == len(matrices)
    beneath = [row for row in plan.rows if row.name.endswith("base_layer") and "pooler" not in row.name]
    assert len(beneath) >= len(adapted_layers(model)) - 1
    assert all(row.block for row in beneath)
    torch.testing.assert_close(output(model), expected)
    after = gradients(model)
    assert after.keys() == before.keys()
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name], msg=name)


@pytest.mark.parametrize("kind", READ)
def test_a_layer_whose_weight_the_adapter_reads_stays_dense(kind):
    model = adapted(pruned(), READ[kind]())
    expected = output(model)
    plan = sparsify_(model, BY_PATTERN)
    reasons = {row.reason for row in plan.rows if row.name.endswith("base_layer")}
    assert reasons == {"its weight is read by the adapter on it; merge that first"}
    assert plan.converted
    torch.testing.assert_close(output(model), expected)


def test_a_fresh_adapter_stays_trainable():
    model = adapted(pruned(), lora(init_lora_weights=True))
    sparsify_(model, BY_PATTERN)
    matrix = query(model).lora_B["default"]
    assert type(matrix) is nn.Linear
    assert not matrix.weight.any()
    assert gradients(model)[next(name for name, p in model.named_parameters() if p is matrix.weight)].any()


def test_only_an_adapter_with_zeros_is_nothing_to_convert():
    model = adapted(bert(), lora(init_lora_weights=True))
    with pytest.raises(ValueError, match=r"expected a layer with at least 30% zeros, got at most .* prune first"):
        sparsify_(model, BY_PATTERN)


def test_an_adapter_of_no_library_is_told_by_its_name():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(32, 32)
            self.lora_down, self.lora_up = nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x):
            return self.base(x) + self.lora_up(self.lora_down(x))

    model = nn.Sequential(Adapted())
    with pytest.warns(UserWarning, match=r"prune: left alone: 0.lora_down, 0.lora_up: part of an adapter"):
        assert list(prune_(model, Block(4, 1), 0.5)) == ["0.base"]
    sparsify_(model, BY_PATTERN)
    assert [type(layer) for layer in model[0].children()] == [SparseLinear, nn.Linear, nn.Linear]


def test_pruning_leaves_adapters_alone_and_says_so():
    model = adapted(bert())
    with pytest.warns(UserWarning, match="prune: left alone: .*lora_A.default, .*lora_B.default and 6 more: part of"):
        names = prune_(model, Block(8, 1), 0.5)
    assert len(names) == 12
    assert not any("lora" in name for name in names)
    assert sparsity_of(model) == pytest.approx(0.5, abs=0.01)


def test_adapters_are_pruned_where_a_filter_chooses_them():
    model = adapted(bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = prune_(model, Block(8, 1), 0.5, filter_fn=lambda module, name: "lora_B" in name)
    assert len(names) == 4


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": True}], ids=["lora", "dora", "new"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_masked_layers_is_refused_until_the_masks_are_burned_in(options, safe):
    model = adapted(masked(), lora(**options))
    expected = output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"masked weight: expected to be read only.* finalize_"):
            merge(safe_merge=safe)
        assert torch.equal(output(model), expected)
    merged = finalize_(model).merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_begins_by_changing_the_weight_is_refused_on_masks():
    with pytest.raises(RuntimeError, match="masked weight: expected to be read only"):
        adapted(masked(), lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_sparse_layers_is_refused_until_they_are_dense(safe):
    model = adapted(pruned())
    expected = output(model)
    sparsify_(model, BY_PATTERN)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            AttributeError, match=r"BlockSparse: expected a tensor .*; .* densify_ .*merging an adapter"
        ):
            merge(safe_merge=safe)
        torch.testing.assert_close(output(model), expected)
    merged = densify_(model).merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_adapter_is_taken_off(sparse):
    model = adapted(pruned() if sparse else masked())
    with model.disable_adapter():
        expected = output(model)
    if sparse:
        sparsify_(model, BY_PATTERN)
    model = model.unload()
    assert isinstance(query(model), SparseLinear if sparse else nn.Linear)
    torch.testing.assert_close(output(model), expected)


def test_peft_refuses_a_sparse_layer_and_takes_one_made_dense():
    model = pruned()
    sparsify_(model, BY_PATTERN)
    expected = output(model)
    with pytest.raises(ValueError, match=r"Target module SparseLinear.* is not supported"):
        adapted(model)
    model = adapted(densify_(model), lora(init_lora_weights=True))
    torch.testing.assert_close(output(model), expected)


def test_convolutions_with_adapters_stay_as_they_are():
    model = adapted(nn.Sequential(nn.Conv1d(16, 32, 3), nn.Flatten(), nn.Linear(64, 16)), lora(target_modules=["0"]))
    x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="left alone: base_model.model.0.base_layer: a Conv1d as it is here"):
        assert list(prune_(model, Block(8, 1), 0.5)) == ["base_model.model.2"]
    expected = finalize_(model)(x)
    plan = sparsify_(model, BY_PATTERN)
    assert plan.converted == ("base_model.model.2",)
    assert len(plan.composites) == 3
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_saved_alone_and_loads_on_the_same_model(tmp_path):
    model = adapted(pruned())
    expected = output(model)
    sparsify_(model, BY_PATTERN)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pruned(), tmp_path).eval()
    torch.testing.assert_close(output(again), expected)
    sparsify_(again, BY_PATTERN)
    torch.testing.assert_close(output(again), expected)


def test_a_model_with_its_adapter_loads_into_one_like_it(tmp_path):
    model = adapted(pruned())
    expected = output(model)
    sparsify_(model, BY_PATTERN)
    save_pretrained(model, tmp_path)
    skeleton = peft.get_peft_model(bert(), lora()).eval()
    torch.testing.assert_close(output(from_pretrained(tmp_path, model=skeleton)), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_transformers_model_with_an_adapter_is_not_saved_as_one(tmp_path, sparse):
    inner = adapted(pruned()).base_model.model
    own = pruned()
    own.add_adapter(lora())
    for model in (inner, own):
        if sparse:
            sparsify_(model, BY_PATTERN)
        with pytest.raises(ValueError, match="save_pretrained: expected a BertModel without adapters, got one"):
            save_pretrained(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    own.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from registry.tiny_configs import tiny_model
from structured_cases import (
    FAMILIES,
    FREE_HEADS,
    IDS,
    MASK,
    WITH_HEADS,
    assert_unchanged,
    model_of,
    output_of,
    silence,
    snapshot,
    transformers,
)
from tiny_encoders import TEXT, build, torch_encoder
from torch import nn

from sparsenlp import SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.checkpoint import seal
from sparsenlp.models.decoders import fuse_decoder_
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_
from sparsenlp.models.structure import layer_stack, structure_of
from sparsenlp.prune import (
    Block,
    GradientStatistics,
    Unstructured,
    finalize_,
    prunable,
    prune_,
    prune_structures_,
    remove_heads_,
    remove_layers_,
    remove_neurons_,
    structure_scores,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
ONLY_TEXT = [name for name in FAMILIES if name not in ("vit", "deit")]


def sizes(model):
    return [(parts.heads, parts.neurons) for parts in layer_stack(model).layers]


def reload_plain(model, directory):
    """By transformers alone; the checkpoint must hold nothing of ours."""
    model.save_pretrained(directory)
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "quantization_config" not in loaded.config.to_dict()
    return loaded.eval()


@pytest.mark.parametrize("family", WITH_HEADS)
def test_removing_silent_heads_changes_nothing(family):
    model = model_of(family)
    last = len(layer_stack(model).layers) - 1
    heads = {0: [0], last: [1]} if last else {0: [1]}
    silence(model, "heads", heads)
    expected, before = output_of(model), sizes(model)
    assert remove_heads_(model, heads) is model
    torch.testing.assert_close(output_of(model), expected, **TOLERANCE)
    assert sizes(model) == [(h - (i in heads), n) for i, (h, n) in enumerate(before)]


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_silent_neurons_changes_nothing(family):
    model = model_of(family)
    neurons = {0: [5, 0, 17]}
    silence(model, "neurons", neurons)
    expected, before = output_of(model), sizes(model)
    remove_neurons_(model, neurons)
    torch.testing.assert_close(output_of(model), expected, **TOLERANCE)
    assert sizes(model) == [(h, n - 3 * (i == 0)) for i, (h, n) in enumerate(before)]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert-relu"])
def test_removing_a_layer_equals_a_model_built_without_it(family):
    model = model_of(family)
    expected = copy.deepcopy(model)
    modules = layer_stack(expected).modules
    kept = [module for i, module in enumerate(modules) if i != 0]
    remove_layers_(model, [0])
    assert len(layer_stack(model).modules) == len(kept) == model.config.num_hidden_layers
    built = type(model)(model.config).eval()
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(output_of(built), output_of(model), **TOLERANCE)
    for ours, theirs in zip(layer_stack(model).modules, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_and_layers_reload_by_plain_transformers(family, tmp_path):
    model = model_of(family)
    count = len(layer_stack(model).layers)
    remove_neurons_(model, {layer: [layer, 7] for layer in range(count)})
    if count > 1:
        remove_layers_(model, [1])
    loaded = reload_plain(model, tmp_path)
    torch.testing.assert_close(output_of(loaded), output_of(model), **TOLERANCE)
    assert sizes(loaded) == sizes(model)


@pytest.mark.parametrize("family", sorted(FREE_HEADS))
def test_heads_reload_by_plain_transformers(family, tmp_path):
    model = model_of(family)
    remove_heads_(model, {layer: [layer % 2] for layer in range(len(layer_stack(model).layers))})
    loaded = reload_plain(model, tmp_path)
    torch.testing.assert_close(output_of(loaded), output_of(model), **TOLERANCE)
    assert sizes(loaded) == sizes(model)


@pytest.mark.parametrize("family", WITH_HEADS)
@pytest.mark.parametrize("save", ["ours", "transformers"])
def test_uneven_layers_reload_through_our_checkpoint(family, save, tmp_path):
    model = model_of(family)
    remove_heads_(model, {0: [1]})
    remove_neurons_(model, {0: [0, 1, 2]})
    expected = output_of(model)
    if save == "ours":
        save_pretrained(model, tmp_path)
        loaded = from_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded.eval()), expected, **TOLERANCE)
    assert sizes(loaded) == sizes(model)
    if len(sizes(model)) > 1 or family not in FREE_HEADS:
        assert structure_of(model)
        assert "quantization_config" in transformers.AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize("neurons", [{0: [0, 1]}, {0: [0, 1], 1: [0, 1]}], ids=["uneven", "even"])
def test_layers_inside_a_model_of_text_and_images(neurons, tmp_path):
    """What the configuration says of the layers stands in a part of it, which other models do not share."""
    model = tiny_model("LlavaForConditionalGeneration")
    other = type(model)(model.config)
    before = other.config.text_config.intermediate_size
    remove_neurons_(model, neurons)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, **TOLERANCE)
    assert other.config.text_config.intermediate_size == before
    assert structure_of(model) == ({} if len(neurons) == 2 else {"neurons": [before - 2, before]})


def test_our_checkpoint_is_saved_again_after_loading(tmp_path):
    model = remove_heads_(build(TEXT["bert"]), {1: [0]})
    model.save_pretrained(tmp_path / "a")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = transformers.AutoModel.from_pretrained(tmp_path / "b").eval()
    torch.testing.assert_close(output_of(again), output_of(model), **TOLERANCE)


def test_even_layers_need_our_checkpoint_no_more(tmp_path):
    model = remove_neurons_(build(TEXT["bert"]), {0: [0, 1]})
    model.save_pretrained(tmp_path / "uneven")
    assert structure_of(model) == {"neurons": [62, 64]}
    for uneven in (model, transformers.AutoModel.from_pretrained(tmp_path / "uneven").eval()):
        remove_neurons_(uneven, {1: [5, 6]})
        loaded = reload_plain(uneven, tmp_path / "even")
        assert loaded.config.intermediate_size == 62
        torch.testing.assert_close(output_of(loaded), output_of(uneven), **TOLERANCE)


def test_loading_without_this_package_fails(tmp_path):
    remove_heads_(build(TEXT["bert"]), {1: [0]}).save_pretrained(tmp_path)
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Unknown quantization type, got sparsenlp" in result.stderr


@pytest.mark.parametrize("fuse", [False, True])
def test_sparse_layers_of_uneven_width(fuse, tmp_path, needs_native):
    model = remove_heads_(build(TEXT["minilm"]), {1: [0, 2]})
    remove_neurons_(model, {0: list(range(64))})
    prune_(model, Block(8, 1), 0.7)
    finalize_(model)
    expected = output_of(model)
    sparsify_(model, SparsifyConfig(measure="off", fuse=fuse))
    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-4)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded), expected, rtol=1e-4, atol=1e-4)


def test_wider_checkpoints_than_the_configuration_are_refused(tmp_path):
    model = remove_heads_(build(TEXT["bert"]), {1: [0]})
    save_pretrained(model, tmp_path)
    config = (tmp_path / "config.json").read_text()
    for wrong, message in (
        ('"heads": [\n        9,', "expected at most"),
        ('"heads": [\n        -1,', "heads as a list of positive numbers"),
        ('"tails": [\n        2,', "expected structure with heads and neurons"),
    ):
        changed = json.loads(config.replace('"heads": [\n        2,', wrong))
        changed["quantization_config"]["crc32"] = seal(changed["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(changed, indent=2))
        assert wrong in (tmp_path / "config.json").read_text()
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)


def test_a_family_with_one_configuration_for_two_models_keeps_the_other():
    config = transformers.BertConfig(**TEXT["bert"][1])
    model, other = transformers.BertModel(config), transformers.BertModel(config)
    remove_layers_(model, [0])
    assert model.config.num_hidden_layers == model.encoder.config.num_hidden_layers == 1
    assert other.config.num_hidden_layers == config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_generation_with_a_cache_after_removal(family):
    model = model_of(family)
    remove_layers_(model, [1])
    remove_heads_(model, {0: [0], 1: [1]})
    ids = IDS[:1, :6]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("even", [True, False])
def test_fused_decoders_after_removal(even, needs_native):
    model = model_of("llama")
    remove_heads_(model, {layer: [0] for layer in range(3)} if even else {0: [0]})
    expected = output_of(model)
    if even:
        torch.testing.assert_close(output_of(fuse_decoder_(model)), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="expected"):
            fuse_decoder_(model)


def test_torch_encoders_lose_neurons_and_layers():
    encoder = nn.Sequential(torch_encoder(layers=3))
    x = torch.randn(2, 5, 32)
    silence(encoder, "neurons", {1: [3, 60]})
    expected = encoder(x)
    remove_neurons_(encoder, {1: [3, 60]})
    torch.testing.assert_close(encoder(x), expected, **TOLERANCE)
    kept = [encoder[0].layers[0], encoder[0].layers[2]]
    remove_layers_(encoder, [1])
    assert [*encoder[0].layers] == kept
    assert encoder[0].num_layers == 2
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention needs heads that fill its width"):
        remove_heads_(encoder, {0: [0]})


def test_dtype_and_gradients_stay():
    model = model_of("llama").to(torch.bfloat16)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()  # its graph stays alive
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    remove_neurons_(model, {0: [1]})
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.gate_proj.weight.grad.shape == (63, 32)


def elementwise(model):
    modules = dict(model.named_modules())
    return {n: m.weight.detach().abs() for n, m in modules.items() if isinstance(m, nn.Linear)}


def test_structure_scores_by_hand():
    model = model_of("llama")
    scores = elementwise(model)
    layer, name = model.model.layers[1], "model.layers.1"
    attention, mlp = layer.self_attn, layer.mlp
    heads = structure_scores(model, "heads", scores)[1]
    queries = slice(16, 32)  # two heads of eight rows that read the second head of keys
    by_hand = attention.q_proj.weight[queries].abs().sum() + attention.o_proj.weight[:, queries].abs().sum()
    by_hand += attention.k_proj.weight[8:].abs().sum() + attention.v_proj.weight[8:].abs().sum()
    torch.testing.assert_close(heads[1], by_hand.detach())
    weights = torch.cat([mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]]).detach().abs()
    for reduction, expected in (("l1", weights.sum()), ("l2", weights.norm()), ("mean", weights.mean())):
        neurons = structure_scores(model, "neurons", scores, reduction)
        assert neurons[1].shape == (64,)
        torch.testing.assert_close(neurons[1][7], expected)
    total = sum(s.sum() for n, s in scores.items() if n.startswith(name))
    torch.testing.assert_close(structure_scores(model, "layers", scores)[1], total[None])


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt2-linear", "vit", "distilbert"])
@pytest.mark.parametrize("kind", ["heads", "neurons", "layers"])
def test_pruning_removes_the_lowest(family, kind):
    model = model_of(family)
    count = len(layer_stack(model).layers)
    if kind == "layers":
        lowest = {count - 1: ()}
        with torch.no_grad():
            for parameter in layer_stack(model).modules[count - 1].parameters():
                parameter.mul_(0.1)
        fraction = 1 / count
    else:
        units = getattr(layer_stack(model).layers[0], kind)
        lowest = {layer: (layer % units,) for layer in range(count)}
        for layer, numbers in lowest.items():
            silence(model, kind, {layer: numbers})
        fraction = 1 / units
    expected = output_of(model)
    before = sum(p.numel() for p in model.parameters())
    removal = prune_structures_(model, kind, fraction)
    assert removal.removed == lowest
    assert removal.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert str(removal).startswith(f"removed {count if kind != 'layers' else 1} of ")
    if kind != "layers":
        torch.testing.assert_close(output_of(model), expected, **TOLERANCE)


def test_pruning_by_gradients():
    model = build(TEXT["bert"], "AutoModelForSequenceClassification")
    layers = prunable(model)
    statistics = GradientStatistics(layers)
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    statistics.update()
    parts = layer_stack(model).layers[1]
    products = [(w.weight * w.weight.grad).abs() for w in (parts.ffn_inputs[0], parts.ffn_output)]
    by_hand = (products[0].sum(dim=1) + products[1].sum(dim=0)).argsort(stable=True)[:16]
    removal = prune_structures_(model, "neurons", 0.25, criterion="taylor", statistics=statistics)
    assert removal.removed[1] == tuple(sorted(by_hand.tolist()))


def test_global_scope_ranks_all_and_keeps_one():
    model = build(TEXT["minilm"])
    with torch.no_grad():
        for parameter in model.encoder.layer[0].parameters():
            parameter.mul_(0.01)
    removal = prune_structures_(model, "heads", 0.5, scope="global")
    assert {layer: len(heads) for layer, heads in removal.removed.items()} == {0: 3, 1: 1}
    assert removal.count == 4
    assert removal.units == 8


def test_nothing_to_remove():
    model = build(TEXT["bert"])
    before = snapshot(model)
    assert prune_structures_(model, "neurons", 0.0).count == 0
    remove_neurons_(model, {0: []})
    remove_layers_(model, [])
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (remove_heads_, {0: [0, 1]}, "remove_heads_: expected to keep at least one of 2 heads of layer 0, got all"),
        (remove_heads_, {2: [0]}, "remove_heads_: expected layers from 0 to 1, got 2"),
        (remove_heads_, {-1: [0]}, "expected layers from 0 to 1, got -1"),
        (remove_heads_, {1: [2]}, "expected heads of layer 1 from 0 to 1, got 2"),
        (remove_heads_, {0: [1], 1: [1, 1]}, "expected each of the heads of layer 1 once, got 1 twice"),
        (remove_neurons_, {0: range(64)}, "expected to keep at least one of 64 neurons of layer 0"),
        (remove_neurons_, {0: [64]}, "expected neurons of layer 0 from 0 to 63, got 64"),
        (remove_neurons_, {0: [3, 3]}, "once, got 3 twice"),
        (remove_layers_, [0, 1], "remove_layers_: expected to keep at least one of 2 layers, got all"),
        (remove_layers_, [2], "expected layers from 0 to 1, got 2"),
        (remove_layers_, [1, 1], "expected each of the layers once, got 1 twice"),
    ],
)
def test_wrong_numbers_leave_the_model_untouched(function, argument, message):
    model = build(TEXT["bert"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        function(model, argument)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 1.0}, r"fraction: expected a fraction to remove in \[0, 1\), got 1.0"),
        ({"fraction": -0.5}, "got -0.5"),
        ({"fraction": float("nan")}, "got nan"),
        ({"kind": "tails"}, "kind: expected one of heads, neurons, layers, got tails"),
        ({"scope": "galactic"}, "scope: expected one of local, global, got galactic"),
        ({"criterion": "luck"}, "criterion: expected one of .*, got luck"),
        ({"reduction": "l3"}, "reduction: expected one of l1, l2, mean, got l3"),
        ({"criterion": "taylor"}, "statistics: expected taylor"),
    ],
)
def test_wrong_settings_leave_the_model_untouched(arguments, message):
    model = build(TEXT["bert"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune_structures_(model, **({"kind": "neurons", "fraction": 0.5} | arguments))
    assert_unchanged(model, before)


def masked(model):
    prune_(model, Unstructured(), 0.5)


def sparsified(model):
    prune_(model, Block(8, 1), 0.5)
    sparsify_(model, SparsifyConfig(measure="off", fuse=False))


def tied(model):
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    model.encoder.layer[1].attention.output.dense.weight = model.encoder.layer[0].attention.output.dense.weight


def repeated(model):
    model.encoder.layer[1] = model.encoder.layer[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (masked, r"expected masks burned in \(finalize_\), got a mask on encoder.layer.0"),
        (sparsified, "to be a dense nn.Linear, got SparseLinear"),
        (tied, "expected weights of its own in encoder.layer.[01].*, got weights shared"),
        (repeated, "expected weights of its own in encoder.layer.0.*, got weights shared"),
        (fuse_encoders_, "expected a model that is not fused; call unfuse_encoders_"),
    ],
)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_models_that_cannot_shrink(spoil, message, kind, needs_native):
    model = build(TEXT["bert"])
    spoil(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        (remove_heads_ if kind == "heads" else remove_neurons_)(model, {0: [0]})
    with pytest.raises(ValueError, match=message):
        prune_structures_(model, kind, 0.5)
    assert_unchanged(model, before)


def test_fused_layers_go_after_unfusing(needs_native):
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    with pytest.raises(ValueError, match="remove_layers_: expected a model that is not fused"):
        remove_layers_(model, [0])
    unfuse_encoders_(model)
    remove_layers_(model, [0])
    assert len(model.encoder.layer) == 1
    llama = fuse_decoder_(model_of("llama"))
    with pytest.raises(ValueError, match="remove_heads_: expected a model that is not fused"):
        remove_heads_(llama, {0: [0]})


def test_other_refusals():
    with pytest.raises(ValueError, match="MPNet shares a position bias by head"):
        remove_heads_(model_of("mpnet"), {0: [0]})
    with pytest.raises(ValueError, match="one stack of layers of a known family, got 0 in Sequential"):
        remove_heads_(nn.Sequential(nn.Linear(4, 4)), {0: [0]})
    model = model_of("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="attention that does not depend on the layer's number"):
        remove_layers_(model, [0])
    bert = build(TEXT["bert"])
    scores = elementwise(bert)
    with pytest.raises(ValueError, match=r"expected scores \(64, 32\) of encoder.layer.0.intermediate.dense, got none"):
        structure_scores(bert, "neurons", {})
    scores["encoder.layer.0.intermediate.dense"] = torch.ones(32, 64)
    with pytest.raises(ValueError, match=r"got \(32, 64\)"):
        structure_scores(bert, "neurons", scores)

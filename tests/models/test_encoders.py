from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.convert import replace_modules
from sparsenlp.layers import NMLinear, SparseEncoder
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

LENGTHS = (12, 5, 1, 9)
MASK = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
IDS = torch.randint(5, 50, (4, 12), generator=torch.Generator().manual_seed(0)) * MASK + (1 - MASK)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 20}
VISION = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VISION |= {"image_size": 16, "patch_size": 4}

TEXT = {
    "bert": ("BertConfig", SIZES),
    "bert-eager": ("BertConfig", SIZES | {"attn_implementation": "eager"}),
    "minilm": ("BertConfig", SIZES | {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 192}),
    "bert-relu": ("BertConfig", SIZES | {"hidden_act": "relu", "num_hidden_layers": 1}),
    "bert-gelu_new": ("BertConfig", SIZES | {"hidden_act": "gelu_new", "num_hidden_layers": 1}),
    "roberta": ("RobertaConfig", SIZES),
    "xlm-roberta": ("XLMRobertaConfig", SIZES),
    "camembert": ("CamembertConfig", SIZES),
    "electra": ("ElectraConfig", SIZES | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", DISTIL),
    "mpnet": ("MPNetConfig", SIZES),
}
IMAGE = {"vit": ("ViTConfig", VISION), "deit": ("DeiTConfig", VISION)}


def build(config, task="AutoModel", seed=0):
    """A random model in eval mode, with weights large enough for every part of a layer to matter."""
    name, sizes = config
    model = getattr(transformers, task).from_config(getattr(transformers, name)(**sizes))
    return randomize(model, seed).eval()


@torch.no_grad()
def randomize(model, seed=0):
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=1 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.1)
        if getattr(module, "bias", None) is not None and not isinstance(module, nn.Embedding):
            module.bias.normal_(std=0.3)
    return model


@torch.no_grad()
def sparse(model, block=(8, 1), skip="never", quantize=False):
    """With SparseLinear for three of four linear layers (all, if quantized), 30 % of whose blocks are not zero."""
    torch.manual_seed(1)
    linears = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer" in f".{n}" and skip not in n
    ]
    replacements = {}
    for i, linear in enumerate(linears):
        if i % 4 != 1 or quantize:
            keep = torch.rand(linear.out_features // block[0], linear.in_features // block[1]) < 0.3
            mask = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            layer = SparseLinear.from_dense(linear, block, mask)
            replacements[linear] = layer.quantize() if quantize else layer
    replace_modules(model, replacements)
    return model


def hidden(model, **inputs):
    with torch.no_grad():
        return model(**({"input_ids": IDS, "attention_mask": MASK} | inputs)).last_hidden_state


@pytest.fixture
def calls(monkeypatch):
    """The layers that ran fused."""
    import sparsenlp.layers.encoder as layers

    seen, call = [], layers.call

    def counted(*arguments):
        seen.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(layers, "call", counted)
    return seen


def assert_same_tokens(got, expected, tolerance=2e-5):
    """On real tokens; padding comes out as zeros."""
    real = MASK.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=tolerance, atol=tolerance)
    assert not got[~real].any()


@pytest.mark.parametrize("name", TEXT)
def test_family_matches_the_original(name, calls):
    model = sparse(build(TEXT[name]))
    expected, keys = hidden(model), list(model.state_dict())
    report = fuse_encoders_(model)
    assert report.fused == 1
    assert list(model.state_dict()) == keys
    assert_same_tokens(hidden(model), expected)
    assert len(calls) == model.config.num_hidden_layers


def test_zeros_of_a_dense_model(calls):
    """The definition: the dense model with its masked weights."""
    model = build(TEXT["bert"])
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layer." in name:
                module.weight[torch.rand(module.weight.shape) < 0.9] = 0
    expected = hidden(model)
    sparsify_(model, SparsifyConfig(measure="off", min_sparsity=0.1))
    fuse_encoders_(model)
    assert_same_tokens(hidden(model), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("name", IMAGE)
def test_image_models(name, calls):
    model = sparse(build(IMAGE[name]))
    with torch.no_grad():
        expected = model(PIXELS).last_hidden_state
        assert fuse_encoders_(model).fused == 1
        torch.testing.assert_close(model(PIXELS).last_hidden_state, expected, rtol=2e-5, atol=2e-5)
    assert len(calls) == 2
    assert len(model.layers) == 2
    assert type(model.layers[1]).__name__.endswith("Layer")


@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert"])
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_padding_elsewhere(name, padding, calls):
    mask = MASK.flip(1) if padding == "left" else torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1]] * 4)
    model = sparse(build(TEXT[name]))
    expected = hidden(model, attention_mask=mask)
    fuse_encoders_(model)
    got = hidden(model, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=2e-5, atol=2e-5)
    assert len(calls) == (0 if name == "mpnet" and padding == "holes" else 2)  # its bias goes by distance


def test_change_of_dtype_after_fusing_in_bfloat16(calls):
    model = sparse(build(TEXT["bert"])).to(torch.bfloat16)
    fuse_encoders_(model)
    hidden(model)
    hidden(model.float())
    assert [arguments[4] for arguments in calls] == ["bfloat16"] * 2 + ["float32"] * 2


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_empty_batch(name):
    model = build(TEXT[name])
    fuse_encoders_(model)
    x = torch.empty(0, 12, 32)
    with torch.no_grad():
        assert model.encoder(x)[0].shape == x.shape


def test_without_mask_and_with_embeddings(calls):
    model = sparse(build(TEXT["bert"]))
    expected = hidden(model, attention_mask=None)
    x = model.embeddings.word_embeddings(IDS)
    fuse_encoders_(model)
    torch.testing.assert_close(hidden(model, attention_mask=None), expected, rtol=2e-5, atol=2e-5)
    got = hidden(model, attention_mask=None, input_ids=None, inputs_embeds=x)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", None), ("bfloat16", "float32"), ("int8", None)])
def test_other_dtypes(dtype, precision, tile, calls):
    model = sparse(build(TEXT["minilm"]), (8, 4), quantize=dtype == "int8")
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    expected = hidden(copy.deepcopy(model).float() if dtype == "bfloat16" else model)
    fuse_encoders_(model, precision, tile)
    got = hidden(model)
    assert got.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert_same_tokens(got.float(), expected, 1e-1)
    real = MASK.bool()
    cosine = nn.functional.cosine_similarity(got[real].float(), expected[real], dim=1)
    assert cosine.min() > 0.999
    assert {arguments[4] for arguments in calls} == {precision or ("float32" if dtype == "int8" else "bfloat16")}


@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.9995), ("int8", 0.998)])
def test_less_precision_than_the_weights(precision, least, calls):
    model = sparse(build(TEXT["minilm"]), (8, 4))
    expected, state = hidden(model), {name: t.clone() for name, t in model.state_dict().items()}
    fuse_encoders_(model, precision)
    got, real = hidden(model), MASK.bool()
    cosine = nn.functional.cosine_similarity(got[real], expected[real], dim=1)
    assert least < cosine.min() < 1 - 1e-7
    assert {arguments[2][0][2].dtype for arguments in calls} == {getattr(torch, precision)}
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_dead_weight_is_left_out(calls):
    model = build(TEXT["mpnet"])
    attention = model.encoder.layer[0].attention.attn
    with torch.no_grad():
        attention.v.weight[:16] = 0  # the first head gives a constant
        model.encoder.layer[1].intermediate.dense.weight[8:40] = 0
    expected = hidden(model)
    fuse_encoders_(sparse(model))
    fused = model.encoder
    reference = copy.deepcopy(model)
    reference.encoder.enabled = False
    expected = hidden(reference)
    assert not calls
    torch.testing.assert_close(hidden(model)[MASK.bool()], expected[MASK.bool()], rtol=2e-5, atol=2e-5)
    assert len(calls) == len(fused.layer)
    first, second = fused.dead_weight
    assert first.heads[0] == 1
    assert second.neurons[0] >= 32
    assert calls[0][2][0][0].shape[0] - 1 < calls[1][2][0][0].shape[0] - 1  # fewer rows of queries


TASKS = [
    ("bert", "AutoModelForSequenceClassification", "logits"),
    ("roberta", "AutoModelForTokenClassification", "logits"),
    ("distilbert", "AutoModelForQuestionAnswering", "start_logits"),
    ("distilbert", "AutoModelForSequenceClassification", "logits"),
    ("electra", "AutoModelForSequenceClassification", "logits"),
    ("mpnet", "AutoModelForMaskedLM", "logits"),
    ("bert", "AutoModelForMaskedLM", "logits"),
]


@pytest.mark.parametrize(("name", "task", "output"), TASKS)
def test_task_heads(name, task, output, calls):
    model = sparse(build(TEXT[name], task))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        expected = model(**inputs)[output]
        fuse_encoders_(model)
        got = model(**inputs)[output]
        as_tuple = model(**inputs, return_dict=False)[0]
    real = ... if "Sequence" in task else MASK.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(as_tuple, got)
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert", "vit"])
@pytest.mark.parametrize("how", ["compile", "export"])
def test_compile_and_export(name, how):
    model = sparse(build((TEXT | IMAGE)[name]))
    inputs = {"pixel_values": PIXELS} if name == "vit" else {"input_ids": IDS, "attention_mask": MASK}
    fuse_encoders_(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    if how == "compile":
        with torch.no_grad():
            got = torch.compile(model, fullgraph=True)(**inputs).last_hidden_state
    else:
        program = torch.export.export(model, (), inputs)
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("sparsenlp.encoder_layer.default") == 2
        got = program.module()(**inputs).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_export_and_compile_with_any_length(name):
    model = sparse(build(TEXT[name]))
    fuse_encoders_(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=18)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims)).module()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows, length in ((4, 12), (2, 9), (3, 17)):
        ids = torch.randint(5, 50, (rows, length))
        mask = (torch.arange(length) < torch.tensor([length, 4, 2, 1])[:rows, None]).long()
        expected = hidden(model, input_ids=ids, attention_mask=mask)
        got = program(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(hidden(compiled, input_ids=ids, attention_mask=mask), expected, rtol=2e-5, atol=2e-5)


def test_compiled_model_sees_new_weights():
    model = build(TEXT["bert"]).to(torch.bfloat16)
    fuse_encoders_(model)
    compiled = torch.compile(model, fullgraph=True)
    before = hidden(compiled)
    with torch.no_grad():
        model.encoder.layer[0].attention.output.dense.bias.copy_(torch.randn(32))
    assert (hidden(compiled) - before).abs().max() > 0.1


def test_hidden_states_come_from_the_original_layers(calls):
    model = sparse(build(TEXT["bert-eager"]))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**inputs)
        fuse_encoders_(model)
        got = model(**inputs)
    assert not calls
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(
        (*got.hidden_states, *got.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert torch.equal(a, b)
    assert_same_tokens(hidden(model), expected.last_hidden_state)  # the hooks that collected are still there
    assert len(calls) == 2
    with torch.no_grad():
        compiled = torch.compile(model)(**inputs)
    torch.testing.assert_close(compiled.hidden_states[1], expected.hidden_states[1], rtol=1e-4, atol=1e-4)


def test_mpnet_hidden_states(calls):
    model = sparse(build(TEXT["mpnet"]))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs).hidden_states
        fuse_encoders_(model)
        got = model(**inputs).hidden_states
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not calls


def test_other_calls_run_the_original(calls):
    model = sparse(build(TEXT["bert"]))
    plain = copy.deepcopy(model)
    fuse_encoders_(model)
    causal = torch.ones(12, 12).tril().bool().expand(4, 1, 12, 12)
    bias = torch.randn(4, 2, 12, 12)
    for mask in (causal, bias):
        assert torch.equal(hidden(model, attention_mask=mask), hidden(plain, attention_mask=mask))
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model)
    seen = []
    handle = model.encoder.layer[0].intermediate.register_forward_hook(lambda *a: seen.append(a[0]))
    hidden(model)
    handle.remove()
    assert len(seen) == 1
    output = model.encoder.layer[1].output
    output.forward = lambda x, residual: seen.append(x) or residual
    hidden(model)
    del output.forward
    assert len(seen) == 2
    model.train()
    hidden(model)
    assert not calls
    model.eval()
    hidden(model)
    assert len(calls) == 2


def test_hooks_on_the_encoder_stay(calls):
    model, seen = build(TEXT["bert"]), []
    model.encoder.register_forward_hook(lambda *a: seen.append("before"))
    fuse_encoders_(model)
    model.encoder.register_forward_pre_hook(lambda *a: seen.append("after"))
    hidden(model)
    assert seen == ["after", "before"]
    assert len(calls) == 2
    model.train()
    hidden(model)
    assert seen == ["after", "before"] * 2


def test_float_masks_of_padding_are_fused(calls):
    model = sparse(build(TEXT["bert"]))
    mask = torch.where(MASK.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None, :].expand(4, 1, 12, 12)
    expected = hidden(model, attention_mask=mask)
    fuse_encoders_(model)
    assert_same_tokens(hidden(model, attention_mask=mask), expected)
    assert len(calls) == 2


def test_training_is_the_original(calls):
    def gradients(model):
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = sparse(build(TEXT["bert"]))
    expected = gradients(copy.deepcopy(model))
    fuse_encoders_(model)
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not calls


def test_frozen_models_are_fused_with_gradients_on(calls):
    model = sparse(build(TEXT["bert"])).requires_grad_(False)
    fuse_encoders_(model)
    model(IDS, attention_mask=MASK)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_of_weights_are_seen(dtype):
    """In place, by new data, by a new parameter, by a new module, by load_state_dict; shared or copied tensors."""
    model = sparse(build(TEXT["mpnet"])).to(dtype)
    fuse_encoders_(model)
    layer = model.encoder.layer[0]

    def swap_parameter():
        layer.output.LayerNorm.weight = nn.Parameter(layer.output.LayerNorm.weight.detach() * 2)

    def swap_module():
        layer.attention.attn.q = SparseLinear.from_dense(randomize(nn.Linear(32, 32, dtype=dtype), 3), (8, 1))

    def swap_data():
        layer.attention.attn.o.bias.data = torch.randn(32).to(dtype)

    def load_state_dict():
        state = model.state_dict()
        model.load_state_dict({name: t.flip(0) if name.endswith(".bias") else t for name, t in state.items()})

    changes = [
        lambda: layer.output.dense.bias.copy_(torch.randn(32)),
        lambda: layer.intermediate.dense.values.mul_(2),
        lambda: layer.intermediate.dense.bias.copy_(torch.randn(64)),
        lambda: layer.attention.LayerNorm.weight.mul_(torch.rand(32)),
        lambda: model.encoder.relative_attention_bias.weight.normal_(),
        swap_parameter,
        swap_module,
        swap_data,
        load_state_dict,
    ]
    before = hidden(model)
    for change in changes:
        with torch.no_grad():
            change()
        got = hidden(model)
        assert not torch.equal(got, before)
        fresh = copy.deepcopy(model)  # gathers anew
        assert torch.equal(hidden(fresh), got)
        before = got


def test_change_of_dtype_and_lora_like_replacements(calls):
    model = sparse(build(TEXT["bert"]))
    fuse_encoders_(model)
    hidden(model)
    for dtype, fused in ((torch.bfloat16, 2), (torch.float32, 2), (torch.float16, 0)):
        del calls[:]
        assert hidden(model.to(dtype)).dtype == dtype
        assert len(calls) == fused
    model.to(torch.bfloat16)

    class Wrapped(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model.encoder.layer[0].output.dense = Wrapped(64, 32, dtype=torch.bfloat16)
    hidden(model)
    assert not calls


def test_weights_are_not_copied_where_none_are_dead():
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    hidden(model)
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    for layer in model.encoder._gathered.layers:
        for tensors in layer[:7]:
            for tensor in tensors:
                assert tensor.data_ptr() in own or tensor.dtype == torch.int32  # indices of dense weights are new


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
    def test_transformers(self, name, tmp_path, calls):
        task = "AutoModel" if name == "vit" else "AutoModelForSequenceClassification"
        model = build((TEXT | IMAGE)[name], task)
        with torch.no_grad():
            for n, m in model.named_modules():
                if isinstance(m, nn.Linear) and ".layer" in f".{n}":
                    m.weight.mul_((torch.rand(m.out_features // 8, m.in_features) < 0.2).repeat_interleave(8, 0))
        sparsify_(model, SparsifyConfig(measure="off"))
        fuse_encoders_(model, tile=32)
        inputs = {"pixel_values": PIXELS} if name == "vit" else {"input_ids": IDS, "attention_mask": MASK}
        with torch.no_grad():
            expected = model(**inputs)[0]
            loaded = from_pretrained(save_pretrained(model, tmp_path / "ours"))
            assert torch.equal(loaded(**inputs)[0], expected)
            if name != "vit":  # which transformers writes under other names, the config does not know of
                model.save_pretrained(tmp_path / "theirs")
                loaded = type(model).from_pretrained(tmp_path / "theirs")
                assert torch.equal(loaded(**inputs)[0], expected)
            (fused,) = (m for m in loaded.modules() if isinstance(m, SparseEncoder))
            assert fused.tile == 32
            assert len(calls) == (4 if name == "vit" else 6)
            if name == "bert":  # without the head, names differ by a prefix
                base = transformers.BertModel.from_pretrained(tmp_path / "theirs")
                assert isinstance(base.encoder, SparseEncoder)
            unfuse_encoders_(loaded)
            assert type(loaded.config) is type(model.config)
            torch.testing.assert_close(loaded(**inputs)[0], expected, rtol=1e-4, atol=1e-4)

    def test_plain_module(self, tmp_path):
        def skeleton():
            return nn.Sequential(nn.Linear(8, 32), torch_encoder()).eval()

        model, x = skeleton(), torch.randn(2, 5, 8)
        with torch.no_grad():
            model[0].weight[8:] = 0
            sparsify_(model, SparsifyConfig(measure="off"), lambda module, name: name == "0")
            fuse_encoders_(model)
            expected = model(x)
            loaded = from_pretrained(save_pretrained(model, tmp_path), skeleton())
            assert isinstance(loaded[1], SparseEncoder)
            assert torch.equal(loaded(x), expected)

    def test_copies_and_pickles(self):
        model = sparse(build(TEXT["bert"]))
        fuse_encoders_(model)
        expected = hidden(model)
        copied = copy.deepcopy(model)
        assert torch.equal(hidden(copied), expected)
        with torch.no_grad():
            copied.encoder.layer[0].output.dense.bias.mul_(2)
        assert torch.equal(hidden(model), expected)
        assert not torch.equal(hidden(copied), expected)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        copied.load_state_dict(torch.load(file))
        assert torch.equal(hidden(copied), expected)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(hidden(torch.load(file, weights_only=False)), expected)


def test_unfuse():
    model = sparse(build(TEXT["bert"]))
    expected, encoder = hidden(model), model.encoder
    fuse_encoders_(model)
    assert unfuse_encoders_(model) == 1
    assert model.encoder is encoder
    assert torch.equal(hidden(model), expected)
    assert not model.embeddings._forward_pre_hooks
    assert fuse_encoders_(model).fused == 1


def torch_encoder(norm_first=False, batch_first=True, activation="gelu", layers=2, bias=True):
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, activation=activation, norm_first=norm_first, batch_first=batch_first, bias=bias
    )
    norm = nn.LayerNorm(32) if norm_first else None
    encoder = randomize(nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False))
    for copied in encoder.layers:
        nn.init.normal_(copied.self_attn.in_proj_weight, std=0.2)
    return encoder.eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_torch_encoder(norm_first, batch_first, zeros, calls):
    model = nn.ModuleDict({"encoder": torch_encoder(norm_first, batch_first, "relu" if norm_first else "gelu")})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                keep = torch.rand(parameter.shape[0] // 8, parameter.shape[1]) >= zeros
                parameter.mul_(keep.repeat_interleave(8, 0))
    x, padding = torch.randn(4, 12, 32), MASK == 0
    x = x if batch_first else x.transpose(0, 1).contiguous()
    with torch.no_grad():
        expected = model["encoder"](x, src_key_padding_mask=padding)
        unpadded = model["encoder"](x)
        assert fuse_encoders_(model).fused == 1
        got = model["encoder"](x, src_key_padding_mask=padding)
        additive = model["encoder"](x, src_key_padding_mask=torch.zeros(4, 12).masked_fill(padding, -math.inf))
        torch.testing.assert_close(model["encoder"](x), unpadded, rtol=2e-5, atol=2e-5)
        compiled = torch.compile(model["encoder"], fullgraph=True)(x, src_key_padding_mask=padding)
    assert torch.equal(additive, got)
    torch.testing.assert_close(compiled, got, rtol=2e-5, atol=2e-5)
    if not batch_first:
        got, expected = got.transpose(0, 1), expected.transpose(0, 1)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=2e-5, atol=2e-5)
    stored = [tensors[2].numel() for tensors in calls[0][2][:6]]
    dense = [32 * 32] * 4 + [64 * 32] * 2
    assert all(s == d if not zeros else s < 0.2 * d for s, d in zip(stored, dense, strict=True))


def test_torch_encoder_layer(calls):
    layer = torch_encoder(bias=False).layers[0]
    model = nn.Sequential(nn.Linear(32, 32), layer)
    x = torch.randn(2, 7, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    with torch.no_grad():
        expected, causal_expected = layer(x), layer(x, causal)
        fuse_encoders_(model)
        torch.testing.assert_close(model[1](x), expected, rtol=2e-5, atol=2e-5)
        assert len(calls) == 1
        assert torch.equal(model[1](x, causal), causal_expected)
        assert torch.equal(model[1](x[0]), layer(x[0]))  # without a batch
        layer.self_attn.in_proj_weight.mul_(2)  # a copy of it would be out of date
        torch.testing.assert_close(model[1](x), layer(x), rtol=2e-5, atol=2e-5)
    assert len(calls) == 2
    assert [name for name, _ in model.named_parameters()][2] == "1.self_attn.in_proj_weight"


def test_linears_inside_a_fused_torch_layer_stay():
    """Its original reads their weights itself."""
    model = nn.Sequential(nn.Linear(32, 32), torch_encoder().layers[0])
    fuse_encoders_(model)
    with torch.no_grad():
        for linear in (model[0], model[1].linear1):
            linear.weight[8:] = 0
        plan = sparsify_(model, SparsifyConfig(measure="off"))
        assert {row.name for row in plan.rows if row.block} == {"0"}
        model.train()
        assert model(torch.randn(2, 3, 32)).isfinite().all()


def test_sparse_linears_beside_a_torch_encoder():
    model = nn.Sequential(nn.Linear(8, 32), torch_encoder())
    fuse_encoders_(model)
    with torch.no_grad():
        model[0].weight[8:] = 0
        sparsify_(model, SparsifyConfig(measure="off"), lambda module, name: name == "0")
        assert model(torch.randn(2, 3, 8)).shape == (2, 3, 32)


def test_report():
    model = build(("DebertaV2Config", SIZES))
    report = fuse_encoders_(model)
    assert report.fused == 0
    assert "encoder" in str(report)
    assert "disentangled attention" in str(report)
    assert str(fuse_encoders_(nn.Sequential(nn.Linear(2, 2)))) == "no encoder of a known family"
    model = build(TEXT["bert"])
    assert "2 layers  fused" in str(fuse_encoders_(model))


def half(model):
    return model.half()


def swish(model):
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.SiLU()


def replaced_forward(model):
    layer = model.encoder.layer[0]
    layer.forward = layer.forward


def two_of_four(model):
    layer = model.encoder.layer[0].output
    with torch.no_grad():
        layer.dense.weight.view(-1, 4)[:, 2:] = 0
    layer.dense = NMLinear.from_dense(layer.dense)


def half_int8(model):
    layer = model.encoder.layer[0].output
    layer.dense = SparseLinear.from_dense(layer.dense, (8, 4)).quantize()


def static_scale(model):
    layer = model.encoder.layer[0].output
    layer.dense = SparseLinear.from_dense(layer.dense, (8, 4)).quantize(0.1)


def decoder(model):
    model.encoder.config.is_decoder = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (half, "expected weights of dtype float32, bfloat16 or int8, got torch.float16"),
        (swish, "expected one activation, of none, relu, gelu, gelu_tanh"),
        (replaced_forward, "the forward of a module in it was replaced"),
        (two_of_four, "2:4 weights have no fused kernel"),
        (half_int8, "expected fc2 of dtype torch.float32, got torch.int8"),
        (static_scale, "without activation and input_scale"),
        (decoder, "it is a decoder"),
    ],
)
def test_reasons(change, reason):
    model = build(TEXT["bert"])
    change(model)
    encoder = model.encoder
    report = fuse_encoders_(model)
    assert reason in report.rows[0].reason
    assert model.encoder is encoder


def meta(model):
    return model.to("meta")


def mixed(model):
    model.encoder.layer[1].to("meta")


def masked(model):
    nn.utils.prune.random_unstructured(model.encoder.layer[1].output.dense, "weight", 0.5)


def lora(model):
    class LoraLinear(nn.Linear):
        pass

    model.encoder.layer[1].output.dense = LoraLinear(64, 32)


def fused(model):
    fuse_encoders_(model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (meta, ValueError, "encoder: expected one device that holds data, got meta"),
        (mixed, ValueError, "encoder: expected one device that holds data, got cpu, meta"),
        (masked, ValueError, "expected masks burned in .* got a mask on layer.1.output.dense"),
        (lora, TypeError, "encoder: expected an nn.Linear or SparseLinear, got LoraLinear"),
        (fused, ValueError, "expected a model that is not fused, got a fused encoder at 'encoder'"),
    ],
)
def test_errors_leave_the_model_as_it_was(change, error, message):
    model = build(TEXT["bert"])
    change(model)
    both = nn.ModuleList([build(TEXT["roberta"]), model])  # the first alone would be fused
    encoders = [both[0].encoder, both[1].encoder]
    if change is fused:
        message = message.replace("'encoder'", "'1.encoder'")
    else:
        message = message.replace("encoder: ", "1.encoder: ")
    with pytest.raises(error, match=message):
        fuse_encoders_(both)
    assert [both[0].encoder, both[1].encoder] == encoders
    assert not both[0].embeddings._forward_pre_hooks


def test_errors_of_options():
    model = build(TEXT["bert"])
    with pytest.raises(ValueError, match="expected a precision among float32, bfloat16, int8, got 'int4'"):
        fuse_encoders_(model, "int4")
    with pytest.raises(ValueError, match="expected tiles of 16 or 32 tokens, got 8"):
        fuse_encoders_(model, tile=8)
    with pytest.raises(ValueError, match="expected a model that contains an encoder, got a BertEncoder"):
        fuse_encoders_(model.encoder)
    assert not any(isinstance(module, SparseEncoder) for module in model.modules())


@pytest.mark.parametrize("name", TEXT)
def test_sequences_longer_than_the_position_table(name):
    model = build(TEXT[name])
    limit = 18 if name in ("roberta", "xlm-roberta", "camembert", "mpnet") else 20
    fuse_encoders_(model)
    ids = torch.full((1, limit), 7)
    assert hidden(model, input_ids=ids, attention_mask=None).shape == (1, limit, model.config.hidden_size)
    too_long = torch.full((1, limit + 1), 7)
    with pytest.raises(ValueError, match=f"expected at most {limit} tokens in a row, got {limit + 1}"):
        hidden(model, input_ids=too_long, attention_mask=None)


def test_masks_that_make_no_sense():
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    empty = MASK.clone()
    empty[2] = 0
    with pytest.raises(ValueError, match="got only padding in row 2"):
        hidden(model, attention_mask=empty)
    x = torch.randn(4, 12, 32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention mask of shape \(4, 12\) or \(4, 1, 12, 12\)"):
        model.encoder(x, torch.ones(4, 12, 12))
    with torch.no_grad(), pytest.raises(ValueError, match=r"got \(4, 11\)"):
        model.encoder(x, torch.ones(4, 11))


def test_minilm(calls):
    """The real weights, on sentences."""
    from sparsenlp.data.demo import minilm_directory, rotten_tomatoes

    try:
        directory = minilm_directory()
        texts = rotten_tomatoes()[1].texts[:16]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        fuse_encoders_(model)
        got = model(**inputs).last_hidden_state
    assert len(calls) == 6
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_encoders import (
    IDS,
    IMAGE,
    MASK,
    PIXELS,
    TEXT,
    assert_same_tokens,
    build,
    hidden,
    sparse,
    torch_encoder,
    transformers,
)
from torch import nn

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.models.encoders import fuse_encoders_


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
    sparsify_(model, SparsifyConfig(measure="off", min_sparsity=0.1, fuse=False))
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


PADDING = {
    "left": MASK.flip(1),
    "holes": torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1]] * 4),
    "first": torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 12] * 2),
    "all": torch.cat([MASK[:2], torch.zeros_like(MASK[:1]), MASK.flip(1)[3:]]),
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("padding", PADDING)
def test_padding_elsewhere(name, padding, calls):
    """The first tokens, which heads read, are those of the original even where they are padding."""
    mask = PADDING[padding]
    model = sparse(build(TEXT[name]))
    expected = hidden(model, attention_mask=mask)
    fuse_encoders_(model)
    got = hidden(model, attention_mask=mask)
    read = mask.bool()
    read[:, 0] = mask.any(dim=1)
    torch.testing.assert_close(got[read], expected[read], rtol=2e-5, atol=2e-5)
    assert not got[~read].any()
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_heads_on_left_padding(name, calls):
    model = sparse(build(TEXT[name], "AutoModelForSequenceClassification"))
    inputs = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    with torch.no_grad():
        expected = model(**inputs).logits
        fuse_encoders_(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=2e-5, atol=2e-5)
        assert len(calls) == 2
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=2e-5, atol=2e-5)


PARTS = (torch.arange(12) // 5)[:, None] == torch.arange(12) // 5
OTHER_MASKS = {
    "block-diagonal": PARTS.expand(4, 1, 12, 12),
    "causal": torch.ones(12, 12).tril().bool().expand(4, 1, 12, 12),
    "by head": torch.stack([PARTS, torch.ones_like(PARTS)]).expand(4, 2, 12, 12),
    "added": torch.linspace(-2, 2, 12).expand(4, 1, 12, 12).contiguous(),
    "added parts": torch.where(PARTS, 0.0, torch.finfo(torch.float32).min).expand(4, 1, 12, 12),
    "of padding": MASK.bool()[:, None, None].expand(4, 1, 12, 12),
}


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *(("compile", kind) for kind in OTHER_MASKS),
        ("dynamic", "causal"),
        ("export", "added"),
        ("export", "of padding"),
    ],
)
def test_masks_of_four_dimensions_in_graphs(kind, how):
    """BERT is asked which mask it was given: the original layers take any."""
    model = sparse(build(TEXT["bert"]))
    inputs = {"input_ids": IDS, "attention_mask": OTHER_MASKS[kind]}
    expected = hidden(model, **inputs)
    fuse_encoders_(model)
    got = hidden(traced(model, inputs, how), **inputs)
    read = MASK.bool() if kind == "of padding" else torch.ones_like(MASK).bool()
    torch.testing.assert_close(got[read], expected[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "how", "kind"),
    [
        *(("distilbert", "compile", kind) for kind in ("block-diagonal", "by head", "added", "of padding")),
        *(("distilbert", how, "added parts") for how in ("dynamic", "export")),
        *(("mpnet", "compile", kind) for kind in ("causal", "of padding")),
    ],
)
def test_masks_of_four_dimensions_that_reach_an_encoder_in_graphs(name, how, kind):
    """What a graph was made for is read when it runs: right, or refused."""
    model = sparse(build(TEXT[name]))
    mask = OTHER_MASKS[kind]
    if mask.shape[1] == 2:
        mask = mask.repeat_interleave(model.config.num_attention_heads // 2, 1)
    if name == "mpnet" and mask.dtype == torch.bool:  # it only adds masks
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    inputs = {"input_ids": IDS, "attention_mask": mask}
    expected = hidden(model, **inputs)
    fuse_encoders_(model)
    graph = traced(model, inputs, how)
    if kind != "of padding":
        with pytest.raises(RuntimeError, match="expected a mask that hides the same padding"):
            hidden(graph, **inputs)
        return
    assert_same_tokens(hidden(graph, **inputs), expected)


def traced(model, inputs, how):
    if how == "export":
        return torch.export.export(model, (), inputs).module()
    return torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=how == "dynamic" or None)


def test_a_list_of_layers_reads_masks_in_graphs():
    model = sparse(build(IMAGE["vit"]))
    fuse_encoders_(model)
    x = torch.randn(2, 17, 32)
    parts = torch.ones(17, 17).tril().bool().expand(2, 1, 17, 17)

    def run(mask):
        for layer in model.layers:
            layer_output = layer(x, mask)
        return layer_output

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones_like(parts)), run(None), rtol=2e-5, atol=2e-5)
        with pytest.raises(RuntimeError, match="expected a mask that hides the same padding"):
            compiled(parts)


def test_added_padding_of_torch_encoders_in_graphs():
    model = nn.ModuleDict({"encoder": torch_encoder()})
    fuse_encoders_(model)
    x, padding = torch.randn(4, 12, 32), torch.zeros(4, 12).masked_fill(MASK == 0, -math.inf)
    compiled = torch.compile(model["encoder"], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model["encoder"](x, src_key_padding_mask=padding)
        torch.testing.assert_close(compiled(x, src_key_padding_mask=padding), expected)
        with pytest.raises(RuntimeError, match="expected a mask that hides the same padding"):
            compiled(x, src_key_padding_mask=padding.clamp(min=-3))


def test_sequences_of_padding_in_torch_encoders():
    model = nn.ModuleDict({"encoder": torch_encoder()})
    x, padding = torch.randn(3, 12, 32), MASK[:3] == 0
    padding[1] = True
    with torch.no_grad():
        expected = model["encoder"](x, src_key_padding_mask=padding)
        fuse_encoders_(model)
        got = model["encoder"](x, src_key_padding_mask=padding)
    assert not got[1].any()
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=2e-5, atol=2e-5)


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
    with torch.no_grad():
        model.encoder.layer[0].attention.attn.v.weight[:16] = 0  # the first head gives a constant
        model.encoder.layer[1].intermediate.dense.weight[8:40] = 0
    fuse_encoders_(sparse(model))
    fused = model.encoder
    fused.enabled = False
    expected = hidden(model)
    assert not calls
    fused.enabled = True
    torch.testing.assert_close(hidden(model)[MASK.bool()], expected[MASK.bool()], rtol=2e-5, atol=2e-5)
    assert len(calls) == len(fused.layer)
    first, second = fused.dead_weight
    assert first.heads[0] == 1
    assert second.neurons[0] >= 32
    assert calls[0][2][0][0].shape[0] < calls[1][2][0][0].shape[0]  # fewer rows of queries


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


def test_sparse_linears_beside_a_torch_encoder():
    model = nn.Sequential(nn.Linear(8, 32), torch_encoder())
    fuse_encoders_(model)
    with torch.no_grad():
        model[0].weight[8:] = 0
        sparsify_(model, SparsifyConfig(measure="off", fuse=False), lambda module, name: name == "0")
        assert model(torch.randn(2, 3, 8)).shape == (2, 3, 32)


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

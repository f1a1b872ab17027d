from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny_encoders import (
    IDS,
    IMAGE,
    MASK,
    PIXELS,
    SIZES,
    TEXT,
    assert_same_tokens,
    build,
    hidden,
    randomize,
    sparse,
    torch_encoder,
    transformers,
)
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.layers import NMLinear, SparseEncoder
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_


def test_change_of_dtype_after_fusing_in_bfloat16(calls):
    model = sparse(build(TEXT["bert"])).to(torch.bfloat16)
    fuse_encoders_(model)
    hidden(model)
    hidden(model.float())
    assert [arguments[4] for arguments in calls] == ["bfloat16"] * 2 + ["float32"] * 2


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
        torch.testing.assert_close(a, b)
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
    torch.testing.assert_close(got, expected)
    assert not calls


def test_other_calls_run_the_original(calls):
    model = sparse(build(TEXT["bert"]))
    plain = copy.deepcopy(model)
    fuse_encoders_(model)
    causal = torch.ones(12, 12).tril().bool().expand(4, 1, 12, 12)
    bias = torch.randn(4, 2, 12, 12)
    for mask in (causal, bias):
        torch.testing.assert_close(hidden(model, attention_mask=mask), hidden(plain, attention_mask=mask))
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


KINDS_OF_COPIES = {
    "dead weight": lambda: fused_text("bert", None),
    "rounded": lambda: fused_text("distilbert", "bfloat16"),
    "quantized": lambda: fused_text("mpnet", "int8"),
    "bfloat16": lambda: fused_text("roberta", None, torch.bfloat16),
    "compressed": lambda: fused_torch(),
}


def fused_text(name, precision, dtype=torch.float32):
    model = build(TEXT[name])
    with torch.no_grad():
        for n, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layer" in f".{n}":
                module.weight[: len(module.weight) // 2] = 0
    sparse(model, (8, 4)).to(dtype)
    fuse_encoders_(model, precision)
    return model, lambda: hidden(model)


def fused_torch():
    model = nn.ModuleDict({"encoder": torch_encoder()})
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[: len(parameter) // 8 * 6] = 0
    fuse_encoders_(model)
    return model, lambda: model["encoder"](x)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS_OF_COPIES)
def test_edits_through_data_are_seen(kind):
    """As optimizers and averages of weights make them, which no version counter tells of."""
    model, run = KINDS_OF_COPIES[kind]()
    (encoder,) = (m for m in model.modules() if isinstance(m, SparseEncoder))
    run()
    gathered = encoder._gathered
    assert gathered.copied
    for i in gathered.copied:
        tensor = gathered.kept[i]
        if tensor.is_floating_point():
            version = tensor._version
            tensor.data.add_(0.5)
            assert tensor._version == version
            assert not gathered.is_current()
            gathered.fingerprint = gathered.watch.fingerprint()  # as if it had been gathered from this one
    encoder._gathered = None
    before = run()
    for parameter in encoder.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1.5)
    got = run()
    encoder._gathered = None
    assert torch.equal(run(), got)
    assert not torch.equal(got, before)


@torch.no_grad()
def test_averaged_weights_are_seen():
    model, run = fused_text("bert", "bfloat16")
    average = {name: p.clone().normal_() for name, p in model.encoder.named_parameters()}
    run()
    for name, parameter in model.encoder.named_parameters():
        parameter.data.lerp_(average[name], 0.01)
    got = run()
    model.encoder._gathered = None
    assert torch.equal(got, run())


@torch.no_grad()
def test_scales_that_change_are_seen():
    model = sparse(build(TEXT["bert"]), (8, 4), quantize=True)
    fuse_encoders_(model)
    before = hidden(model)
    for module in model.encoder.modules():
        if isinstance(module, SparseLinear):
            module.scales.data.mul_(2)
    got = hidden(model)
    model.encoder._gathered = None
    assert torch.equal(got, hidden(model))
    assert not torch.equal(got, before)


@torch.no_grad()
def test_a_single_element_edited_through_data_is_seen_after_a_change_of_mode():
    model, run = fused_text("bert", "bfloat16")
    before = run()
    model.encoder.layer[0].attention.self.query.values.data[-1, 7, 3] += 5
    model.train().eval()
    assert not torch.equal(run(), before)


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
        sparsify_(model, SparsifyConfig(measure="off", fuse=False))
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
            sparsify_(model, SparsifyConfig(measure="off", fuse=False), lambda module, name: name == "0")
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


def test_linears_inside_a_fused_torch_layer_stay():
    """Its original reads their weights itself."""
    model = nn.Sequential(nn.Linear(32, 32), torch_encoder().layers[0])
    fuse_encoders_(model)
    with torch.no_grad():
        for linear in (model[0], model[1].linear1):
            linear.weight[8:] = 0
        plan = sparsify_(model, SparsifyConfig(measure="off", fuse=False))
        assert {row.name for row in plan.rows if row.block} == {"0"}
        model.train()
        assert model(torch.randn(2, 3, 32)).isfinite().all()


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


def test_masks_that_make_no_sense():
    model = build(TEXT["bert"])
    fuse_encoders_(model)
    x = torch.randn(4, 12, 32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention mask of shape \(4, 12\) or \(4, 1, 12, 12\)"):
        model.encoder(x, torch.ones(4, 12, 12))
    with torch.no_grad(), pytest.raises(ValueError, match=r"got \(4, 11\)"):
        model.encoder(x, torch.ones(4, 11))

"""Models of many families of transformers come back from their files whole, buffers that are not in a file included."""

import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear, SparsifyConfig, from_pretrained, save_pretrained, sparsify_

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
GPT_NEO = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
SEQ2SEQ = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
SEQ2SEQ |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
SEQ2SEQ |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
VISION = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
CLIP = {"text_config": SIZES, "vision_config": VISION | {"image_size": 16, "patch_size": 4}, "projection_dim": 16}
MODELS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "gpt-neo": ("GPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 8}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | {"num_key_value_heads": 2, "head_dim": 16}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", SIZES | {"pad_token_id": 0}),
    "funnel": ("FunnelModel", "FunnelConfig", {"vocab_size": 50, "d_model": 32, "n_head": 2, "block_sizes": [1, 1]}),
    "t5": ("T5Model", "T5Config", {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1}),
    "m2m100": ("M2M100Model", "M2M100Config", SEQ2SEQ),
    "clip": ("CLIPModel", "CLIPConfig", CLIP),
    "swin": ("SwinModel", "SwinConfig", {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1]}),
}


def build(model, config, sizes):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def composite():
    """Eyes of one family, and a decoder of another."""
    eyes = transformers.CLIPVisionConfig(**CLIP["vision_config"])
    config = transformers.LlavaConfig(
        vision_config=eyes, text_config=transformers.LlamaConfig(**SIZES), image_token_index=49
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def sparsified(model):
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features % 8 == 0:
            rows, columns = module.weight.shape
            module.weight.mul_((torch.rand(rows // 8, columns) < 0.2).repeat_interleave(8, 0))
    sparsify_(model, SparsifyConfig(measure="off"))
    return model


def poisoned(empty_like):
    """Memory that nobody fills afterwards holds a number that nobody wants."""

    def call(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        return tensor if tensor.is_meta else tensor.fill_(1 if tensor.dtype == torch.bool else 77)

    return call


@pytest.mark.parametrize("name", [*MODELS, "composite"])
def test_all_tensors_come_back(name, tmp_path, monkeypatch):
    model = sparsified(composite() if name == "composite" else build(*MODELS[name]))
    directory = save_pretrained(model, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        loaded = from_pretrained(directory)
    wanted, got = ({**dict(m.named_buffers()), **dict(m.named_parameters())} for m in (model, loaded))
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key
    kinds = [[type(module) for module in m.modules()] for m in (model, loaded)]
    assert kinds[0] == kinds[1]
    assert SparseLinear in kinds[0]


def test_logits_of_gpt_neo_come_back(tmp_path):
    model = sparsified(build(*MODELS["gpt-neo"]))
    loaded = from_pretrained(save_pretrained(model, tmp_path / "model"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_t5_in_half_precision_keeps_some_layers_in_float32(tmp_path):
    sizes = MODELS["t5"][2] | {"decoder_start_token_id": 0}
    model = sparsified(build("T5ForConditionalGeneration", "T5Config", sizes))
    directory = save_pretrained(model, tmp_path / "sparse")
    sparse, dense = (from_pretrained(directory, dtype=torch.float16) for _ in range(2))
    dense.dequantize(torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    dense = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    kept = sparse.encoder.block[0].layer[1].DenseReluDense
    assert (kept.wo.values.dtype, kept.wi.values.dtype) == (torch.float32, torch.float16)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        got, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (sparse, dense))
    torch.testing.assert_close(got, wanted, rtol=5e-3, atol=5e-3)
    sparse.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, got)


def test_mamba_asks_its_head_for_the_dtype():
    sizes = {"vocab_size": 56, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "tie_word_embeddings": False}
    model = build("MambaForCausalLM", "MambaConfig", sizes)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        model.lm_head.weight.mul_((torch.rand(7, 32) < 0.3).repeat_interleave(8, 0))
        expected = model(ids).logits
        sparsify_(model, SparsifyConfig(measure="off"), lambda module, name: name == "lm_head")
        assert isinstance(model.lm_head, SparseLinear)
        torch.testing.assert_close(model(ids).logits, expected)

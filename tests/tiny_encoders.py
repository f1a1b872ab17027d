"""Tiny random encoders of every family that can be fused, and inputs for them; for tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsenlp import SparseLinear
from sparsenlp.layers.composite import replace_modules

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


def assert_same_tokens(got, expected, tolerance=2e-5):
    """On real tokens; padding comes out as zeros."""
    real = MASK.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=tolerance, atol=tolerance)
    assert not got[~real].any()


def torch_encoder(norm_first=False, batch_first=True, activation="gelu", layers=2, bias=True):
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, activation=activation, norm_first=norm_first, batch_first=batch_first, bias=bias
    )
    norm = nn.LayerNorm(32) if norm_first else None
    encoder = randomize(nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False))
    for copied in encoder.layers:
        nn.init.normal_(copied.self_attn.in_proj_weight, std=0.2)
    return encoder.eval()

"""Tiny models of every family that can lose heads, neurons and layers, with calls that show what they compute."""

from __future__ import annotations

import torch
from tiny_encoders import IDS, IMAGE, MASK, PIXELS, SIZES, TEXT, build, transformers

from sparsenlp.models.decoders import conv1d_to_linear_
from sparsenlp.models.structure import COLUMNS, is_conv1d, layer_stack

LLAMA = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 20, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2}
DECODERS = {
    "llama": ("LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-linear": ("GPT2Config", GPT2 | {"n_inner": 48}),
}
FREE_HEADS = {"llama", "mistral", "qwen2", "vit", "deit"}
"""Families whose configuration can express fewer heads."""
FAMILIES = sorted({*TEXT, *IMAGE, *DECODERS} - {"bert-eager", "bert-gelu_new"})
WITH_HEADS = [name for name in FAMILIES if name != "mpnet"]


def model_of(family, seed=0):
    """A random model in eval mode, all its parts large enough to matter."""
    if family in DECODERS:
        model = build(DECODERS[family], "AutoModelForCausalLM", seed)
        with torch.no_grad():
            for module in model.modules():
                if is_conv1d(module):
                    module.weight.normal_(std=module.nx**-0.5)
        return conv1d_to_linear_(model) if family == "gpt2-linear" else model
    return build((TEXT | IMAGE)[family], seed=seed)


@torch.no_grad()
def output_of(model):
    if "vit" in model.config.model_type or "deit" in model.config.model_type:
        return model(pixel_values=PIXELS).last_hidden_state
    output = model(input_ids=IDS, attention_mask=MASK)
    return (output.logits if "logits" in output else output.last_hidden_state)[MASK.bool()]


@torch.no_grad()
def silence(model, kind, units):
    """Zero the columns through which these heads or neurons, {layer: units}, reach the residual stream.

    Their rows become a thousand times smaller, so that they also score lowest.
    """
    for layer, numbers in units.items():
        parts = layer_stack(model).layers[layer]
        slices = parts.head_slices if kind == "heads" else parts.neuron_slices
        for module, dim, lines in slices(torch.tensor(numbers)):
            weight = module.weight.t() if is_conv1d(module) else module.weight
            if dim == COLUMNS:
                weight[:, lines.flatten()] = 0
            else:
                weight[lines.flatten()] *= 1e-3


def snapshot(model):
    config = model.config.to_dict() if hasattr(model, "config") else None
    return config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    config, state = snapshot(model)
    assert config == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())


__all__ = ["IDS", "MASK", "transformers"]

"""Which encoders run as fused layers, and how to read them: one table of rules.

A family is a row of `FAMILIES`: the classes that hold its layers, and where in a layer the parts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.encoder import EncoderWeights, SparseProjection
from ..layers.encoder import SparseEncoder, read_dense, read_projection, read_vector
from ..reference.bsr_linear import ACTIVATIONS
from .encoder_calls import BertLikeEncoder, LayerList, ModuleEncoder, TorchEncoder, TorchEncoderLayer

BLOCK_SPARSE = "block_sparse"
"""What transformers calls the attention of `use_block_sparse_attention_`; no fused layer has it."""


@dataclass(frozen=True)
class Family:
    """How to find an encoder and to read its layers; paths are attributes below a layer, joined by dots.

    classes      qualified names of the classes that hold the layers
    encoder      how what is replaced is called: an instance of the class, or with `layer_list` the ModuleList of
                 that name in it
    projections  query, key, value, output, fc1, fc2
    norms        of attention, of the FFN; before them if `pre_norm`
    activation   the function between fc1 and fc2
    head_dim     rows of a head
    bias         method of the encoder that gives a position bias (B, heads, S, S) for x (B, S, H), or ""
    neurons      field of the configuration that counts the neurons between fc1 and fc2
    free_heads   the configuration may have any number of heads beside `head_dim`
    """

    name: str
    classes: tuple[str, ...]
    encoder: type[SparseEncoder]
    projections: tuple[str, ...]
    norms: tuple[str, str]
    activation: str
    head_dim: str
    pre_norm: bool = False
    layer_list: str = ""
    bias: str = ""
    neurons: str = "intermediate_size"
    free_heads: bool = False


_HF = "transformers.models"
_BERT_LIKE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)

FAMILIES = (
    Family(
        name="BERT",  # MiniLM too
        classes=(
            f"{_HF}.bert.modeling_bert.BertEncoder",
            f"{_HF}.roberta.modeling_roberta.RobertaEncoder",
            f"{_HF}.xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder",
            f"{_HF}.camembert.modeling_camembert.CamembertEncoder",
            f"{_HF}.electra.modeling_electra.ElectraEncoder",
        ),
        encoder=BertLikeEncoder,
        projections=_BERT_LIKE,
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        activation="intermediate.intermediate_act_fn",
        head_dim="attention.self.attention_head_size",
    ),
    Family(
        name="DistilBERT",
        classes=(f"{_HF}.distilbert.modeling_distilbert.Transformer",),
        encoder=ModuleEncoder,
        projections=(*(f"attention.{part}_lin" for part in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
        norms=("sa_layer_norm", "output_layer_norm"),
        activation="ffn.activation",
        head_dim="attention.attention_head_size",
        neurons="hidden_dim",
    ),
    Family(
        name="MPNet",
        classes=(f"{_HF}.mpnet.modeling_mpnet.MPNetEncoder",),
        encoder=ModuleEncoder,
        projections=(*(f"attention.attn.{part}" for part in "qkvo"), "intermediate.dense", "output.dense"),
        norms=("attention.LayerNorm", "output.LayerNorm"),
        activation="intermediate.intermediate_act_fn",
        head_dim="attention.attn.attention_head_size",
        bias="compute_position_bias",
    ),
    Family(
        name="ViT",
        classes=(f"{_HF}.vit.modeling_vit.ViTModel", f"{_HF}.deit.modeling_deit.DeiTModel"),
        layer_list="layers",
        encoder=LayerList,
        projections=(*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2"),
        norms=("layernorm_before", "layernorm_after"),
        activation="mlp.activation_fn",
        head_dim="attention.head_dim",
        pre_norm=True,
        free_heads=True,
    ),
)
TORCH = {nn.TransformerEncoder: TorchEncoder, nn.TransformerEncoderLayer: TorchEncoderLayer}
UNFUSED = {
    f"{_HF}.deberta.modeling_deberta.DebertaEncoder": "its disentangled attention has no fused kernel",
    f"{_HF}.deberta_v2.modeling_deberta_v2.DebertaV2Encoder": "its disentangled attention has no fused kernel",
}


@dataclass(frozen=True)
class FamilyReader:
    """Reads a layer by the paths of its family; a class, to be pickled."""

    family: Family
    activation: str

    def __call__(self, layer: nn.Module, compress: bool) -> EncoderWeights:
        parts = [read_projection(at(layer, path), compress) for path in self.family.projections]
        norms = [at(layer, path) for path in self.family.norms]
        return _weights(parts, norms, at(layer, self.family.head_dim), self.activation, self.family.pre_norm)


@dataclass(frozen=True)
class TorchReader:
    """Reads an nn.TransformerEncoderLayer, whose query, key and value are one weight."""

    activation: str

    def __call__(self, layer: Any, compress: bool) -> EncoderWeights:
        attention = layer.self_attn
        weights = [*attention.in_proj_weight.chunk(3), attention.out_proj.weight]
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        parts = [
            SparseProjection(read_dense(weight.detach(), compress), read_vector(bias, weight.shape[0], weight))
            for weight, bias in zip(weights, (*biases, attention.out_proj.bias), strict=True)
        ]
        parts += [read_projection(linear, compress) for linear in (layer.linear1, layer.linear2)]
        norms = [layer.norm1, layer.norm2]
        return _weights(parts, norms, attention.head_dim, self.activation, layer.norm_first)


@dataclass(frozen=True)
class PositionBias:
    """Calls the method of an encoder that gives a bias (B, heads, S, S) for x (B, S, H), and takes (heads, S, S)."""

    method: str

    def __call__(self, encoder: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return getattr(encoder, self.method)(x.new_empty(1, x.shape[1], 0))[0].float().contiguous()


def _weights(
    parts: list[SparseProjection], norms: list[Any], head_dim: int, activation: str, pre_norm: bool
) -> EncoderWeights:
    for norm in norms:
        if type(norm) is not nn.LayerNorm:
            raise TypeError(f"expected an nn.LayerNorm, got {type(norm).__name__}")
        if norm.weight is None or norm.eps != norms[0].eps:
            raise ValueError("norms without a weight, or with different eps")
    rows = tuple(range(0, parts[0].weight.shape[0] + 1, head_dim))
    hidden = norms[0].normalized_shape[0]
    norm1, norm2 = ((read_vector(n.weight, hidden, n.weight), read_vector(n.bias, hidden, n.weight)) for n in norms)
    query, key, value, output, fc1, fc2 = parts
    return EncoderWeights(
        query,
        key,
        value,
        output,
        fc1,
        fc2,
        norm1,
        norm2,
        query_rows=rows,
        value_rows=rows,
        scale=head_dim**-0.5,
        activation=activation,
        eps=norms[0].eps,
        pre_norm=pre_norm,
    )


def activation_name(function: Any) -> str | None:
    """Which of ACTIVATIONS a function or module without parameters is, by what it does; None if it is none."""
    if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = function(x)
    matches = (name for name, known in ACTIVATIONS.items() if torch.allclose(y, known(x), rtol=0, atol=1e-5))
    return next(matches, None)


def at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module

"""Which models' encoders run as fused layers: one table of rules, and the replacement.

A family is a row of `FAMILIES`: the classes that hold its layers, and where in a layer the parts are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.encoder import EncoderWeights, SparseProjection
from ..layers import NMLinear
from ..layers.encoder import SparseEncoder, read_dense, read_projection, read_vector
from ..ops.encoder_layer import PRECISIONS, TILES, check_weights
from ..reference.bsr_linear import ACTIVATIONS
from ..report import is_masked
from .encoder_calls import BertLikeEncoder, LayerList, ModuleEncoder, TorchEncoder, TorchEncoderLayer


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
    ),
)
TORCH = {nn.TransformerEncoder: TorchEncoder, nn.TransformerEncoderLayer: TorchEncoderLayer}
UNFUSED = {
    f"{_HF}.deberta.modeling_deberta.DebertaEncoder": "its disentangled attention has no fused kernel",
    f"{_HF}.deberta_v2.modeling_deberta_v2.DebertaV2Encoder": "its disentangled attention has no fused kernel",
}


@dataclass(frozen=True)
class EncoderRow:
    """What became of one encoder; fused if there is no reason against it."""

    name: str
    kind: str
    layers: int
    reason: str = ""


@dataclass(frozen=True)
class FusionReport:
    """One row per encoder found; `str(report)` is a table."""

    rows: tuple[EncoderRow, ...]

    @property
    def fused(self) -> int:
        return sum(not row.reason for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no encoder of a known family"
        lines = (f"{r.name:<32} {r.kind:<24} {r.layers:>3} layers  {r.reason or 'fused'}" for r in self.rows)
        return "\n".join(lines)


def fuse_encoders_(model: nn.Module, precision: str | None = None, tile: int = 16) -> FusionReport:
    """Run the encoders in `model` as fused layers for inference on the CPU, on this instance only.

    Each encoder of a family in `FAMILIES`, and torch's own, is replaced by a SparseEncoder with the same modules in
    it: names, saving, loading and training stay as they are. Linear layers may be sparse or not. Zeros in the
    dense weights of nn.TransformerEncoderLayer, which `sparsify_` leaves, are skipped by means of a copy.

    precision  of attention and activations: "float32", or "bfloat16" (with bfloat16 or int8 weights only);
               None takes "bfloat16" where the weights are bfloat16
    tile       tokens that a kernel works on at a time, 16 or 32
    returns    what was fused, and why others were not

    Everything is checked before the first replacement: on any error the model is as it was.
    Raises ValueError if the model is an encoder itself, is fused already, is on the meta device, has an
    encoder on several devices, with masks not burned in, or an unknown `precision` or `tile`; TypeError if a
    linear layer is of a class that is neither nn.Linear nor ours.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"fuse_encoders_: expected a precision among {', '.join(PRECISIONS)}, got {precision!r}")
    if tile not in TILES:
        raise ValueError(f"fuse_encoders_: expected tiles of 16 or 32 tokens, got {tile}")
    rows: list[EncoderRow] = []
    replacements: dict[nn.Module, SparseEncoder] = {}
    sites = _sites(model)
    for site in sites:
        reason = ""
        try:
            replacements[site.module] = _build(site, precision, tile)
        except _NotFused as obstacle:
            reason = str(obstacle)
        rows.append(EncoderRow(site.name, type(site.module).__name__, len(site.layers), reason))
    _replace(model, replacements)
    for site in sites:
        if site.module in replacements:
            replacements[site.module].length_guard = _guard_length(site.owner)
    return FusionReport(tuple(rows))


def unfuse_encoders_(model: nn.Module) -> int:
    """Put the original encoders back, with the parameters they have now; returns how many."""
    fused = [module for module in model.modules() if isinstance(module, SparseEncoder)]
    for encoder in fused:
        if encoder.length_guard is not None:
            encoder.length_guard.remove()
    _replace(model, {encoder: encoder.original for encoder in fused})
    return len(fused)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    from ..convert import replace_modules  # it imports this package

    replace_modules(model, dict(replacements))


class _NotFused(Exception):
    """Why an encoder stays as it is."""


@dataclass(frozen=True)
class _Site:
    """An encoder found in a model: the module to replace, and the one whose `embeddings` feed it."""

    name: str
    module: nn.Module
    layers: list[nn.Module]
    owner: nn.Module
    family: Family | None = None
    reason: str = ""


def _sites(model: nn.Module) -> list[_Site]:
    """The encoders in `model`; one inside of another is part of it."""
    owners = {id(child): parent for parent in model.modules() for child in parent.children()}
    sites: list[_Site] = []
    for name, module in model.named_modules():
        if isinstance(module, SparseEncoder):
            raise ValueError(f"fuse_encoders_: expected a model that is not fused, got a fused encoder at {name!r}")
        if any(name.startswith(f"{site.name}.") for site in sites):
            continue
        site = _site(name, module, owners.get(id(module), module))
        if site is None:
            continue
        if site.module is model:
            raise ValueError(
                f"fuse_encoders_: expected a model that contains an encoder, got a {type(model).__name__}; wrap it"
            )
        sites.append(site)
    return sites


def _site(name: str, module: nn.Module, owner: nn.Module) -> _Site | None:
    kind = type(module)
    if kind in TORCH:
        return _Site(name, module, [module] if kind is nn.TransformerEncoderLayer else [*module.layers], owner)  # type: ignore[misc]
    qualified = f"{kind.__module__}.{kind.__qualname__}"
    if qualified in UNFUSED:
        return _Site(name, module, [*module.layer], owner, reason=UNFUSED[qualified])  # type: ignore[misc]
    family = next((family for family in FAMILIES if qualified in family.classes), None)
    if family is None:
        return None
    if not family.layer_list:
        return _Site(name, module, [*module.layer], owner, family)  # type: ignore[misc]
    layers: Any = getattr(module, family.layer_list)
    return _Site(f"{name}.{family.layer_list}".lstrip("."), layers, [*layers], module, family)


def _build(site: _Site, precision: str | None, tile: int) -> SparseEncoder:
    """What takes the place of the encoder; raises _NotFused, or ValueError or TypeError for what is a mistake."""
    where = f"fuse_encoders_: {site.name}"
    devices = {tensor.device for tensor in (*site.module.parameters(), *site.module.buffers())}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(f"{where}: expected one device that holds data, got {', '.join(sorted(map(str, devices)))}")
    for name, module in site.module.named_modules():
        if is_masked(module):
            raise ValueError(f"{where}: expected masks burned in (finalize_), got a mask on {name}")
    _check_plain(site, devices)
    read = _reader(site)
    try:
        weights = [read(layer, False) for layer in site.layers]
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    except ValueError as error:
        raise _NotFused(str(error)) from None
    for layer in weights:
        try:
            check_weights(layer)
        except (TypeError, ValueError) as error:
            raise _NotFused(str(error).removeprefix("encoder_layer: ")) from None
    dtypes = {layer.query.weight.values.dtype for layer in weights}
    if len(dtypes) > 1:
        raise _NotFused(f"layers of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    dtype = dtypes.pop()
    if precision == "bfloat16" and dtype == torch.float32:
        raise ValueError(f"{where}: expected bfloat16 or int8 weights for precision 'bfloat16', got {dtype}")
    options: dict[str, Any] = {"precision": precision or ("bfloat16" if dtype == torch.bfloat16 else "float32")}
    if site.family is None:
        return TORCH[type(site.module)](site.module, read, compress=True, tile=tile, **options)
    bias = PositionBias(site.family.bias) if site.family.bias else None
    return site.family.encoder(site.module, read, bias, tile=tile, **options)


def _check_plain(site: _Site, devices: set[torch.device]) -> None:
    """Raise _NotFused for an encoder that is more than its family's layers."""
    if site.reason:
        raise _NotFused(site.reason)
    module: Any = site.module
    if devices and torch.device("cpu") not in devices:
        raise _NotFused(f"no fused kernel on {devices.pop().type}")
    if not site.layers:
        raise _NotFused("it has no layers")
    if module._forward_hooks or module._forward_pre_hooks:
        raise _NotFused("it has forward hooks, which would be lost")
    config = getattr(module, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _NotFused("it is a decoder")
    if site.family is None:
        for layer in site.layers:
            if type(layer) is not nn.TransformerEncoderLayer:
                raise _NotFused(f"a layer is a {type(layer).__name__}")
            attention: Any = layer.self_attn
            if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
                raise _NotFused("its attention has inputs of other sizes, or extra keys")
    elif any(isinstance(part, NMLinear) for part in module.modules()):
        raise _NotFused("2:4 weights have no fused kernel")


def _reader(site: _Site) -> FamilyReader | TorchReader:
    family = site.family
    functions = [_at(layer, family.activation if family else "activation") for layer in site.layers]
    names = {activation_name(function) for function in functions}
    if len(names) > 1 or None in names:
        raise _NotFused(f"expected one activation, of {', '.join(ACTIVATIONS)}, got {functions[0]}")
    activation = str(names.pop())
    return TorchReader(activation) if family is None else FamilyReader(family, activation)


@dataclass(frozen=True)
class FamilyReader:
    """Reads a layer by the paths of its family; a class, to be pickled."""

    family: Family
    activation: str

    def __call__(self, layer: nn.Module, compress: bool) -> EncoderWeights:
        parts = [read_projection(_at(layer, path), compress) for path in self.family.projections]
        norms = [_at(layer, path) for path in self.family.norms]
        return _weights(parts, norms, _at(layer, self.family.head_dim), self.activation, self.family.pre_norm)


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
            return getattr(encoder, self.method)(x[:1])[0].float().contiguous()


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


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _guard_length(owner: nn.Module) -> Any:
    """Let the embeddings that feed an encoder refuse sequences longer than their table of positions."""
    embeddings: Any = getattr(owner, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return embeddings.register_forward_pre_hook(LengthGuard(table.num_embeddings, table.padding_idx), with_kwargs=True)


@dataclass(frozen=True)
class LengthGuard:
    """A forward pre-hook: sequences of at most `positions` tokens; from padding_idx + 1 on, real tokens alone."""

    positions: int
    padding_idx: int | None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(("input_ids",), inputs, strict=False)), **named}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        first = 0 if self.padding_idx is None else self.padding_idx + 1
        limit = self.positions - first
        if tokens is None or given.get("position_ids") is not None or tokens.shape[1] <= limit:
            return
        length = tokens.shape[1]
        if first and tokens.dim() == 2:
            if torch.compiler.is_compiling():
                return
            length = int((tokens != self.padding_idx).sum(dim=1).max())
        if length > limit:
            raise ValueError(f"{type(module).__name__}: expected at most {limit} tokens in a row, got {length}")

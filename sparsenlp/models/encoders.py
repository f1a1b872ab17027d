"""fuse_encoders_: find the encoders in a model, and let fused layers run them where they are of a known family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers import FusedEmbeddings, NMLinear
from ..layers.composite import replace_modules
from ..layers.encoder import FUSED_PRECISIONS, SparseEncoder, as_precision
from ..ops.encoder_layer import TILES, check_weights
from ..reference.bsr_linear import ACTIVATIONS
from ..report import is_masked
from .base_forward import restore_forward_, shorten_forward_
from .embeddings import fuse_embeddings_
from .families import (
    BLOCK_SPARSE,
    FAMILIES,
    TORCH,
    UNFUSED,
    Family,
    FamilyReader,
    PositionBias,
    TorchReader,
    activation_name,
    at,
)

FusionOptions = dict[str, Any]
"""precision and tile, as arguments of fuse_encoders_."""


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


def fuse_encoders_(model: nn.Module, precision: str | None = None, tile: int | None = None) -> FusionReport:
    """Run the encoders in `model` as fused layers for inference on the CPU, on this instance only.

    Each encoder of a family in `FAMILIES`, and torch's own, is replaced by a SparseEncoder with the same modules in
    it: names, saving, loading and training stay as they are. Linear layers may be sparse or not. Zeros in the
    dense weights of nn.TransformerEncoderLayer, which `sparsify_` leaves, are skipped by means of a copy.

    precision  "float32"; "bfloat16", to which weights in float32 are rounded too; or "int8", to which weights in
               other dtypes are quantized (rounded weights are copies: the model keeps its own);
               None is "bfloat16" as long as the weights are bfloat16
    tile       tokens that a kernel works on at a time, 16 or 32; None takes what keeps all threads busy
    returns    what was fused, and why others were not

    Everything is checked before the first replacement: on any error the model is as it was.
    Raises ValueError if the model is an encoder itself, is fused already, is on the meta device, has an
    encoder on several devices, with masks not burned in, or an unknown `precision` or `tile`; TypeError if a
    linear layer is of a class that is neither nn.Linear nor ours.
    """
    if precision is not None and precision not in FUSED_PRECISIONS:
        raise ValueError(f"fuse_encoders_: expected a precision among {', '.join(FUSED_PRECISIONS)}, got {precision!r}")
    if tile not in (None, *TILES):
        raise ValueError(f"fuse_encoders_: expected tiles of 16 or 32 tokens, got {tile}")
    return _fuse(model, _sites(model), {}, {"precision": precision, "tile": tile})


@dataclass(frozen=True)
class FusionCandidate:
    """An encoder of a model, and what could take its place in each precision; nothing where `row` has a reason."""

    row: EncoderRow
    site: _Site
    encoders: dict[str | None, SparseEncoder]


def fusion_candidates(model: nn.Module, precisions: Sequence[str | None]) -> list[FusionCandidate]:
    """The encoders in `model`, each fused in each of the precisions but not put in; raises as `fuse_encoders_`."""
    options = [{"precision": precision, "tile": None} for precision in precisions]
    return [_candidate(site, options) for site in _sites(model)]


def put_in_(model: nn.Module, chosen: Sequence[tuple[FusionCandidate, SparseEncoder]]) -> None:
    """Let each fused encoder take the place of its original in `model`, and fuse embeddings as well."""
    if chosen:
        fuse_embeddings_(model)
    replace_modules(model, {candidate.site.module: encoder for candidate, encoder in chosen})
    for candidate, encoder in chosen:
        encoder.length_guard = _guard_length(candidate.site.owner)
        shorten_forward_(candidate.site.owner)


def _candidate(site: _Site, options: Sequence[FusionOptions]) -> FusionCandidate:
    reason = ""
    encoders: dict[str | None, SparseEncoder] = {}
    try:
        encoders = {option["precision"]: _build(site, **option) for option in options}
    except _NotFused as obstacle:
        reason = str(obstacle)
    return FusionCandidate(EncoderRow(site.name, type(site.module).__name__, len(site.layers), reason), site, encoders)


def _fuse(
    model: nn.Module, sites: list[_Site], options: Mapping[str, FusionOptions], default: FusionOptions
) -> FusionReport:
    candidates = [_candidate(site, [options.get(site.name, default)]) for site in sites]
    put_in_(model, [(candidate, encoder) for candidate in candidates for encoder in candidate.encoders.values()])
    return FusionReport(tuple(candidate.row for candidate in candidates))


def fused_options(model: nn.Module) -> dict[str, FusionOptions]:
    """{name: what to fuse it with} of the fused encoders in `model`, for a checkpoint."""
    encoders = {name: module for name, module in model.named_modules() if isinstance(module, SparseEncoder)}
    return {name: {"precision": encoder.precision, "tile": encoder.tile} for name, encoder in encoders.items()}


def fuse_again_(model: nn.Module, options: Mapping[str, FusionOptions]) -> FusionReport:
    """Fuse the encoders of these names in a model that was loaded, on the CPU alone; others stay as they are."""
    if not options or {p.device.type for p in model.parameters()} != {"cpu"} or fused_options(model):
        return FusionReport(())
    return _fuse(model, [site for site in _sites(model) if site.name in options], options, {})


def unfuse_encoders_(model: nn.Module) -> int:
    """Put the original encoders and embeddings back, with the parameters they have now; returns how many encoders."""
    fused = [module for module in model.modules() if isinstance(module, SparseEncoder)]
    for encoder in fused:
        if encoder.length_guard is not None:
            encoder.length_guard.remove()
    for module in model.modules():
        restore_forward_(module)
    replace_modules(model, {m: m.original for m in model.modules() if isinstance(m, SparseEncoder | FusedEmbeddings)})
    return len(fused)


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


def _build(site: _Site, precision: str | None, tile: int | None) -> SparseEncoder:
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
        weights = [as_precision(read(layer, False), precision) for layer in site.layers]
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
    if site.family is None:
        return TORCH[type(site.module)](site.module, read, precision=precision, tile=tile, compress=True)
    bias = PositionBias(site.family.bias) if site.family.bias else None
    return site.family.encoder(site.module, read, bias, precision, tile)


def _check_plain(site: _Site, devices: set[torch.device]) -> None:
    """Raise _NotFused for an encoder that is more than its family's layers."""
    if site.reason:
        raise _NotFused(site.reason)
    module: Any = site.module
    if devices and torch.device("cpu") not in devices:
        raise _NotFused(f"no fused kernel on {devices.pop().type}")
    if not site.layers:
        raise _NotFused("it has no layers")
    if any("forward" in vars(part) for part in module.modules()):
        raise _NotFused("the forward of a module in it was replaced")
    config = getattr(module, "config", None)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _NotFused("it is a decoder")
    configs = [getattr(part, "config", None) for part in module.modules()]
    if any(getattr(config, "_attn_implementation", None) == BLOCK_SPARSE for config in configs):
        raise _NotFused("its attention is block-sparse")
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
    functions = [at(layer, family.activation if family else "activation") for layer in site.layers]
    names = {activation_name(function) for function in functions}
    if len(names) > 1 or None in names:
        raise _NotFused(f"expected one activation, of {', '.join(ACTIVATIONS)}, got {functions[0]}")
    activation = str(names.pop())
    return TorchReader(activation) if family is None else FamilyReader(family, activation)


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

"""Encoders as a few fused ops: one layer with weights of its own, and whole encoders on the weights of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import repeat
from operator import contains, getitem
from typing import Any

import torch
from torch import Tensor, nn

from ..dead_weight import DeadWeight, remove_dead_weight
from ..formats import BlockSparse
from ..formats.block import INDEX_DTYPE
from ..formats.encoder import EncoderWeights, SparseProjection
from ..ops.encoder_layer import TILES, arguments, call, check_weights, encoder_pack, encoder_unpack
from ..ops.fingerprint import Watch
from .incoming import take_incoming
from .linear import SparseLinear

DENSE_ROWS = 8
"""Rows of the blocks that a dense weight is read as; they are as wide as the weight."""
PROJECTIONS = ("query", "key", "value", "output", "fc1", "fc2")
NORMS = ("norm1", "norm2")
FUSED_PRECISIONS = ("float32", "bfloat16", "int8")
USUAL_THREADS = 4
"""What a compiled graph, which cannot ask for their number, is made for."""
COMPRESS_BELOW = 0.7
"""Density in blocks from which on a dense weight is read as dense."""


class SparseEncoderLayer(nn.Module):
    """One layer with weights of its own, (B, S, H) -> (B, S, H), for inference.

    The state dict holds, below query, key, value, output, fc1 and fc2, the tensors of BSR and a float32 bias, and
    norm1 and norm2. `step` is the layer on a packed residual stream, for several in a row; see ops.encoder_layer.

    Raises TypeError or ValueError if the weights do not fit together.
    """

    def __init__(self, weights: EncoderWeights, precision: str = "float32", tile: int = 16) -> None:
        super().__init__()
        check_weights(weights)
        self.precision = precision
        self.tile = tile
        for name in PROJECTIONS:
            projection: SparseProjection = getattr(weights, name)
            projection.weight.validate()
            setattr(self, name, _Projection(projection))
        for name in NORMS:
            norm = nn.Module()
            for part, tensor in zip(("weight", "bias"), getattr(weights, name), strict=True):
                norm.register_buffer(part, tensor)
            setattr(self, name, norm)
        facts = ("query_rows", "value_rows", "scale", "activation", "eps", "pre_norm")
        self.facts: dict[str, Any] = {name: getattr(weights, name) for name in facts}

    @property
    def weights(self) -> EncoderWeights:
        """The weights as a format; they share the layer's tensors."""
        modules: dict[str, Any] = dict(self.named_children())
        tensors = {name: modules[name].projection for name in PROJECTIONS}
        tensors |= {name: (modules[name].weight, modules[name].bias) for name in NORMS}
        return EncoderWeights(**tensors, **self.facts)

    def step(self, stream: Tensor, spans: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """The next residual stream."""
        return call(stream, spans, arguments(self.weights), position_bias, self.precision)

    def forward(self, x: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None) -> Tensor:
        """x (B, S, H) float32 or bfloat16, mask (B, S) bool with True for real tokens.

        Padding comes out as zeros, all of a sequence that is nothing else; but the first token of another sequence is
        computed even if it is padding, as attending to the real ones, since heads read it.
        """
        stream, spans = encoder_pack(x, mask, self.tile)
        stream = self.step(stream, spans, position_bias)
        return encoder_unpack(stream, spans, x.shape[0], x.shape[1], x.dtype)


class _Projection(nn.Module):
    """The tensors of a SparseProjection as buffers."""

    content = SparseLinear.content
    index_dtype = SparseLinear.index_dtype
    check_content = SparseLinear.check_content

    def __init__(self, projection: SparseProjection) -> None:
        super().__init__()
        weight = projection.weight
        self.out_features, self.in_features = weight.shape
        for name in ("crow_indices", "col_indices", "values", "scales"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", projection.bias)
        self.register_load_state_dict_pre_hook(take_incoming)

    @property
    def projection(self) -> SparseProjection:
        b: Any = self._buffers
        shape = (self.out_features, self.in_features)
        return SparseProjection(
            BlockSparse(b["crow_indices"], b["col_indices"], b["values"], shape, b["scales"]), b["bias"]
        )


def read_projection(linear: nn.Module, compress: bool = False) -> SparseProjection:
    """A SparseLinear or nn.Linear as a fused layer reads it: on the same storage, with the bias in float32.

    compress   store a dense weight with enough zeros as a copy, without them; not traceable

    Raises TypeError for another module, ValueError for a SparseLinear with an activation or a constant input scale.
    """
    if type(linear) is SparseLinear:
        if linear.activation != "none" or linear.input_scale is not None:
            raise ValueError(f"expected a SparseLinear without activation and input_scale, got {linear}")
        w = linear.weight
        weight = BlockSparse(w.crow_indices, w.col_indices, w.values.detach(), w.shape, w.scales)
    elif type(linear) is nn.Linear:
        weight = read_dense(linear.weight.detach(), compress)
    else:
        raise TypeError(f"expected an nn.Linear or SparseLinear, got {type(linear).__name__}")
    return SparseProjection(weight, read_vector(linear.bias, weight.shape[0], weight.values))


def read_vector(vector: Tensor | None, size: int, like: Tensor) -> Tensor:
    """In float32; zeros for None."""
    if vector is None:
        return torch.zeros(size, device=like.device)
    return vector.detach().float()


def read_dense(weight: Tensor, compress: bool = False) -> BlockSparse:
    """A dense weight (N, K) as blocks that are all stored, on the same storage; or see `read_projection`."""
    rows, columns = weight.shape
    block = (DENSE_ROWS, 1 if weight.dtype == torch.float32 else 2)
    if compress and rows % block[0] == 0 and columns % block[1] == 0:
        sparse = BlockSparse.from_dense(weight, block)
        if sparse.density <= COMPRESS_BELOW:
            return sparse
    n = DENSE_ROWS if rows % DENSE_ROWS == 0 else 1
    if not columns:
        crow = torch.zeros(rows // n + 1, dtype=INDEX_DTYPE, device=weight.device)
        return BlockSparse(crow, crow[:0], weight.new_empty(0, n, 1), (rows, columns))
    crow = torch.arange(rows // n + 1, dtype=INDEX_DTYPE, device=weight.device)
    return BlockSparse(crow, torch.zeros_like(crow[1:]), weight.reshape(rows // n, n, columns), (rows, columns))


class SparseEncoder(nn.Module):
    """Stands in for a model's encoder: the same modules under the same names, run as fused layers where that can be.

    Fused are calls on a CPU for inference (eval mode; no gradients, autocast or forward hooks on what is inside)
    that ask for the last hidden state alone, with a mask that only hides padding; others run the original's forward.
    Layers skip padding, and give zeros there: everywhere in a sequence that is nothing else, and in others but for the
    first token, which heads read. Subclasses know how a kind of encoder is called.

    The encoder and the original share their modules and hooks, so state dict, saving, loading and training are the
    original's. Fused layers read the tensors where they are, copies apart (rounded weights, those without their dead
    weight or zeros, biases and norms of other dtypes than float32), and are gathered again after a tensor or module was
    replaced, a copied tensor changed, or the mode did (`train`, `eval`). An edit through `.data`, which no counter
    sees, is noticed by a few elements of each copied tensor; if it changes fewer than all, `model.train().eval()` makes
    the copies anew. A compiled graph keeps the copies that it was made with where weights are quantized or compressed:
    compile again after a change.

    original   the encoder, which no longer hangs in the model
    read       (layer, compress) -> its EncoderWeights; must be traceable unless `compress`
    bias       (original, x) -> position bias (heads, S, S) float32, or None
    precision  "float32"; "bfloat16": activations, and weights that are float32, are rounded to it; "int8": weights
               that are not int8 are quantized, and attention is in bfloat16. Rounded weights are copies. None:
               "bfloat16" as long as the weights are bfloat16
    tile       tokens that a kernel works on at a time, 16 or 32; None takes what keeps all threads busy
    enabled    False runs the original
    """

    original: nn.Module

    def __init__(
        self,
        original: nn.Module,
        read: Callable[[nn.Module, bool], EncoderWeights],
        bias: Callable[[nn.Module, Tensor], Tensor] | None = None,
        precision: str | None = None,
        tile: int | None = None,
        compress: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self.__dict__["original"] = original  # not a submodule: its tensors would have two names
        self.read = read
        self.bias = bias
        self.precision = precision
        self.tile = tile
        self.compress = compress
        self.enabled = True
        self.length_guard: Any = None
        self._gathered: _Gathered | None = None

    def layers_inside(self) -> list[nn.Module]:
        """The layers in order."""
        raise NotImplementedError

    def hooks_matter(self, hooks: Iterable[Callable]) -> bool:
        """Whether forward hooks on the modules inside have to see this call."""
        return True

    def gather(self, compress: bool = False) -> list[EncoderWeights]:
        """The weights of each layer."""
        return [self.read(layer, compress) for layer in self.layers_inside()]

    def fuses(self, x: Tensor) -> bool:
        """Whether a call on x (B, S, H) can be fused."""
        if (
            not self.enabled
            or self.training
            or not x.is_cpu
            or x.dim() != 3
            or x.is_nested
            or torch.is_autocast_enabled("cpu")
        ):
            return False
        if torch.is_grad_enabled() and not exporting() and (x.requires_grad or self._trains()):
            return False
        return self._readable() and not self._observed()

    def run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The fused layers on x (B, S, H), for which `fuses` was true; mask (B, S) bool, True for real tokens."""
        gathered = self._gathered
        traced = torch.compiler.is_compiling() and not self.compress and self.precision != "int8"
        if gathered is None or traced:  # what was gathered would be constants of the graph, and age
            layers = [arguments(as_precision(weights, self.precision)) for weights in self.gather()]
            biases: list[Any] = [None if self.bias is None else self.bias(self.original, x)] * len(layers)
        else:
            layers, biases = gathered.layers, gathered.position_biases(self, x)
        stream, spans = encoder_pack(x.detach(), mask, self.tile or _tile(x))  # torch.export traces with gradients on
        for layer, bias in zip(layers, biases, strict=True):
            stream = call(stream, spans, layer, bias, self._inner_precision(layer[0][2].dtype))
        return encoder_unpack(stream, spans, x.shape[0], x.shape[1], x.dtype)

    def _inner_precision(self, weights: torch.dtype) -> str:
        """Of attention and activations."""
        if self.precision is None:
            return "bfloat16" if weights == torch.bfloat16 else "float32"
        return "float32" if self.precision == "float32" else "bfloat16"

    @property
    def dead_weight(self) -> list[DeadWeight]:
        """What each fused layer leaves out; [] where the layers cannot be fused now."""
        return self._gathered.dead_weight if self._readable() and self._gathered is not None else []

    def train(self, mode: bool = True) -> SparseEncoder:
        if mode != self.training:
            self._gathered = None
        super().train(mode)
        self.original.training = mode
        return self

    def extra_repr(self) -> str:
        return f"fused {type(self.original).__name__}, precision={self.precision}"

    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _readable(self) -> bool:
        """Gather the layers again if they are out of date; False if one now holds what cannot be fused."""
        if torch.compiler.is_compiling():
            return True
        if self._gathered is None or not self._gathered.is_current():
            try:
                self._gathered = _Gathered(self)
            except (TypeError, ValueError):
                self._gathered = None
        return self._gathered is not None

    def _observed(self) -> bool:
        """Whether somebody watches or replaces the forward of a module inside."""
        if self._gathered is not None and not torch.compiler.is_compiling():
            dicts, namespaces = self._gathered.hooks, self._gathered.namespaces
        else:
            modules = [module for layer in self.layers_inside() for module in layer.modules()]
            dicts = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            namespaces = [m.__dict__ for m in modules]
        if any(map(contains, namespaces, repeat("forward"))):
            return True
        return any(dicts) and self.hooks_matter([hook for hooks in dicts for hook in hooks.values()])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gathered": None}


class _Gathered:
    """The arguments of all layers, and what they were gathered from.

    Making one raises TypeError or ValueError for layers that cannot be fused.
    """

    def __init__(self, encoder: SparseEncoder) -> None:
        with torch.no_grad():
            lean = [remove_dead_weight(weights) for weights in encoder.gather(encoder.compress)]
            gathered = [as_precision(weights, encoder.precision) for weights, _ in lean]
        for weights in gathered:
            check_weights(weights)
        self.layers = [arguments(weights, row_sums=True) for weights in gathered]
        self.dead_weight = [record for _, record in lean]
        modules = list(encoder.modules())
        self.hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.namespaces = [m.__dict__ for m in modules[1:]]
        used = [(m._modules, name, c) for m in modules for name, c in m._modules.items() if _has_parameters(c)]
        self.module_places, self.modules = _places(used), [child for *_, child in used]
        dicts = [d for m in modules for d in (m._parameters, m._buffers)]
        owned = [(d, name, t) for d in dicts for name, t in d.items() if t is not None]
        self.tensor_places = _places(owned)
        tensors = [t for *_, t in owned]
        self.kept = [t.detach() for t in tensors]  # so that no other tensor gets an address
        self.addresses = [t.data_ptr() for t in tensors]
        shared = {t.data_ptr() for layer in self.layers for tensors in layer[:7] for t in tensors}
        self.copied = [i for i, at in enumerate(self.addresses) if encoder.compress or at not in shared]
        self.versions = self._versions(tensors)
        self.watch = Watch([self.kept[i] for i in self.copied])
        self.fingerprint = self.watch.fingerprint()
        self.biases: tuple[int, list[Tensor]] | None = None

    def is_current(self) -> bool:
        """Whether all modules and tensors are the same, and nothing that was copied has changed."""
        try:  # once per forward: map is twice as fast as loops here
            if list(map(getitem, *self.module_places)) != self.modules:
                return False
            tensors: list[Any] = list(map(getitem, *self.tensor_places))
            if list(map(Tensor.data_ptr, tensors)) != self.addresses or self._versions(tensors) != self.versions:
                return False
        except (KeyError, TypeError):  # one is gone, or None
            return False
        return not self.copied or self.watch.fingerprint() == self.fingerprint

    def position_biases(self, encoder: SparseEncoder, x: Tensor) -> list[Any]:
        """For each layer, of the length of x (B, S, H); computed when the length changes."""
        if encoder.bias is None:
            return [None] * len(self.layers)
        biases = self.biases  # other threads may replace it
        if biases is None or biases[0] != x.shape[1]:
            bias = encoder.bias(encoder.original, x)
            heads = [list(record.kept_heads) for record in self.dead_weight]
            self.biases = biases = x.shape[1], [bias if len(kept) == len(bias) else bias[kept] for kept in heads]
        return biases[1]

    def _versions(self, tensors: list[Any]) -> list[int]:
        return [0 if tensors[i].is_inference() else tensors[i]._version for i in self.copied]


def as_precision(weights: EncoderWeights, precision: str | None) -> EncoderWeights:
    """The layer with weights as `precision` wants them, see SparseEncoder; not traceable for "int8"."""
    changed: dict[str, Any] = {}
    for name in PROJECTIONS:
        projection: SparseProjection = getattr(weights, name)
        w = projection.weight
        if precision == "bfloat16" and w.values.dtype == torch.float32:
            w = replace(w, values=w.values.to(torch.bfloat16))
        elif precision == "int8" and w.scales is None:
            w = replace(w, values=w.values.float()).quantize()
        if w is not projection.weight:
            changed[name] = SparseProjection(w, projection.bias)
    return replace(weights, **changed) if changed else weights


def _tile(x: Tensor) -> int:
    """16 where tiles of 32 tokens would leave threads idle, and for any length in an exported program."""
    if torch.compiler.is_exporting():
        return TILES[0]
    threads = USUAL_THREADS if torch.compiler.is_compiling() else torch.get_num_threads()
    return TILES[1] if x.shape[0] * x.shape[1] >= TILES[1] * threads else TILES[0]


def _places(entries: list[tuple[Any, str, Any]]) -> tuple[list[Any], list[str]]:
    """The dicts of (dict, key, value), and the keys."""
    return [owner for owner, *_ in entries], [name for _, name, _ in entries]


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def exporting() -> bool:
    """torch.export, which traces with gradients on and gives programs for inference."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()

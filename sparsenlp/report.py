"""What a model's linear layers weigh, and how far pruning moved them: data only, no drawing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .formats import BlockSparse
from .layers.composite import named_layers
from .layers.compressed_linear import CompressedLinear

Linear = nn.Linear | CompressedLinear


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    kind           "dense", "masked" (a parametrization or torch.nn.utils.prune), the blocks, "8x1", or N:M, "2:4"
    shape          (N, K) of the weight
    parameters     N * K + bias
    nonzeros       weights that are not zero; an explicit zero inside a stored block is a zero
    dense_bytes    weight and bias in dense form
    stored_bytes   what the layer holds: values, indices and bias if sparse, else as dense_bytes
    flops          2 * multiplied weights per token: the stored ones if sparse, else all
    dense_flops    2 * N * K
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    nonzeros: int
    dense_bytes: int
    stored_bytes: int
    flops: int
    dense_flops: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero, bias not counted."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.nonzeros / total if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity}


@dataclass(frozen=True)
class ModelReport:
    """The linear layers of a model and, as two numbers, everything else it holds (embeddings, norms, buffers)."""

    layers: tuple[LayerReport, ...]
    other_parameters: int
    other_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the weights of all linear layers."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 1.0 - sum(layer.nonzeros for layer in self.layers) / total if total else 0.0

    @property
    def parameters(self) -> int:
        """Of the model in dense form."""
        return self.other_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return self.other_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        return self.other_bytes + sum(layer.stored_bytes for layer in self.layers)

    @property
    def flops(self) -> int:
        """Per token, linear layers only."""
        return sum(layer.flops for layer in self.layers)

    @property
    def dense_flops(self) -> int:
        return sum(layer.dense_flops for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        names = ("sparsity", "parameters", "dense_bytes", "stored_bytes", "flops", "dense_flops")
        totals = {name: getattr(self, name) for name in names}
        return {**totals, "other_bytes": self.other_bytes, "layers": [layer.as_dict() for layer in self.layers]}


@dataclass(frozen=True)
class Similarity:
    """Cosine between the linear weights of two models: by layer, and of all layers as one vector."""

    layers: dict[str, float]
    overall: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(model: nn.Module) -> ModelReport:
    """Count zeros, parameters, bytes and FLOPs of a dense, masked or sparsified model; a shared layer counts once."""
    layers = dict(linear_layers(model))
    inside = {id(t) for layer in layers.values() for t in (*layer.parameters(), *layer.buffers())}
    others = [t for t in model.parameters() if id(t) not in inside]
    buffers = [t for t in model.buffers() if id(t) not in inside]
    return ModelReport(
        layers=tuple(_layer_report(name, layer) for name, layer in layers.items()),
        other_parameters=sum(t.numel() for t in others),
        other_bytes=sum(_nbytes(t) for t in (*others, *buffers)),
    )


def cosine_similarity(a: nn.Module, b: nn.Module) -> Similarity:
    """Compare the linear weights of two models, dense, masked or sparsified, matched by module name.

    Computed in float64 on the CPU; the cosine with an all-zero weight is 0. Raises ValueError if the
    models' linear layers differ in name or shape.
    """
    layers_a, layers_b = dict(linear_layers(a)), dict(linear_layers(b))
    if layers_a.keys() != layers_b.keys():
        name = sorted(layers_a.keys() ^ layers_b.keys())[0]
        raise ValueError(f"cosine_similarity: expected the same linear layers in both models, got {name!r} in one only")
    products = {name: _products(name, layers_a[name], layers_b[name]) for name in layers_a}
    sums = tuple(sum(column) for column in zip(*products.values(), strict=True)) or (0.0, 0.0, 0.0)
    return Similarity({name: _cosine(*p) for name, p in products.items()}, _cosine(*sums))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, each taken as one vector; in float64 on the CPU, 0 if one is all zero."""
    return _cosine(*_dots(a, b))


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of every nn.Linear, masked ones and subclasses included, SparseLinear and NMLinear, once each.

    The matrices of an nn.LSTM, nn.GRU or nn.Conv1d count as such.
    """
    for name, module in named_layers(model):
        if isinstance(module, Linear):
            yield name, module


@torch.no_grad()
def effective_weight(layer: Linear) -> Tensor:
    """The dense (N, K) weight the layer multiplies by now: masks applied, zeros that are not stored filled in."""
    if isinstance(layer, CompressedLinear):
        return layer.weight.to_dense().detach()
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return hook.apply_mask(layer).detach()
    return layer.weight.detach()


def is_masked(layer: nn.Module) -> bool:
    """Whether a tensor is computed from others: torch's parametrize (our masks) or torch.nn.utils.prune."""
    return parametrize.is_parametrized(layer) or bool(torch_pruned(layer))


def torch_pruned(module: nn.Module) -> list[str]:
    """Names of the tensors of a module, its own alone, that carry a mask of torch.nn.utils.prune."""
    originals = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    return [name for name in originals if f"{name}_mask" in module._buffers]


def _layer_report(name: str, layer: Linear) -> LayerReport:
    rows, cols = layer.out_features, layer.in_features
    bias = layer.bias
    bias_numel, bias_bytes = (0, 0) if bias is None else (bias.numel(), _nbytes(bias))
    if isinstance(layer, CompressedLinear):
        weight = layer.weight
        kind = "{}x{}".format(*weight.block) if isinstance(weight, BlockSparse) else "{}:{}".format(*weight.pattern)
        values, stored, multiplied = weight.values, weight.nbytes, weight.values.numel()
    else:
        kind = "masked" if is_masked(layer) else "dense"
        values = effective_weight(layer)
        stored, multiplied = _nbytes(values), values.numel()
    return LayerReport(
        name=name,
        kind=kind,
        shape=(rows, cols),
        parameters=rows * cols + bias_numel,
        nonzeros=int(values.count_nonzero()),
        dense_bytes=rows * cols * values.element_size() + bias_bytes,
        stored_bytes=stored + bias_bytes,
        flops=2 * multiplied,
        dense_flops=2 * rows * cols,
    )


def _products(name: str, a: Linear, b: Linear) -> tuple[float, float, float]:
    """(a·b, a·a, b·b) of the flattened weights."""
    wa, wb = effective_weight(a), effective_weight(b)
    if wa.shape != wb.shape:
        raise ValueError(f"cosine_similarity: expected {name} of shape {tuple(wa.shape)}, got {tuple(wb.shape)}")
    return _dots(wa, wb)


def _dots(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(a·b, a·a, b·b)."""
    va, vb = (tensor.detach().to("cpu", torch.float64).flatten() for tensor in (a, b))
    return float(va @ vb), float(va @ va), float(vb @ vb)


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    norms = sqrt(square_a) * sqrt(square_b)
    return dot / norms if norms else 0.0


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""The cost model against the clock, layer by layer: what it predicts, what is measured, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..layers import SparseLinear
from ..measure import machine, use_threads
from .cache import calibrated
from .calibration import undisturbed
from .law import Work
from .model import INPUT_BYTES, CostModel, Kind

ALIKE = 0.05
"""Layers of one shape and block whose densities round to the same multiple of this are explained once."""


@dataclass(frozen=True)
class ExplainedLayer:
    """One distinct sparse layer at one number of tokens; times in seconds, weights warm.

    names     of the layers that it stands for
    dense     the kind of the dense layer it is compared with; float32 for int8
    parts     the predicted sparse time by what it is spent on: overhead, pack, multiply, output, memory
    """

    names: tuple[str, ...]
    kind: Kind
    dense: Kind
    work: Work
    predicted_sparse: float
    predicted_dense: float
    measured_sparse: float
    measured_dense: float
    parts: dict[str, float]

    @property
    def density(self) -> float:
        return self.work.stored / (self.work.rows * self.work.columns)

    @property
    def sparse_error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted_sparse / self.measured_sparse - 1

    @property
    def dense_error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted_dense / self.measured_dense - 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "kind": str(self.kind),
            "dense_kind": str(self.dense),
            "shape": [self.work.rows, self.work.columns],
            "tokens": self.work.tokens,
            "density": self.density,
            "predicted_seconds": {"sparse": self.predicted_sparse, "dense": self.predicted_dense},
            "measured_seconds": {"sparse": self.measured_sparse, "dense": self.measured_dense},
            "error": {"sparse": self.sparse_error, "dense": self.dense_error},
            "parts_seconds": self.parts,
        }


@dataclass(frozen=True)
class Explanation:
    """`explain`'s result; `machine` as `measure.machine()`."""

    layers: tuple[ExplainedLayer, ...]
    model: CostModel
    machine: dict[str, Any]

    def errors(self) -> dict[str, list[float]]:
        """{"sparse", "dense": relative errors, one for each layer}."""
        return {
            "sparse": [layer.sparse_error for layer in self.layers],
            "dense": [layer.dense_error for layer in self.layers],
        }

    def summary(self) -> list[str]:
        """Lines for people: errors here, and errors at calibration."""
        lines = []
        for name, errors in self.errors().items():
            middle, high = np.quantile(np.abs(errors), (0.5, 0.9))
            lines.append(
                f"{name}: error median {middle:.0%}, p90 {high:.0%} over {len(errors)} predictions; "
                f"half of them are above {np.median(errors):+.0%}"
            )
        known = (
            f"{kind} {fitted.median_error:.0%} / {fitted.p90_error:.0%}" for kind, fitted in self.model.fitted.items()
        )
        lines.append(f"at calibration, on layers held out, median / p90: {', '.join(known)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """JSON data; times in seconds."""
        return {
            "machine": self.machine,
            "layers": [layer.as_dict() for layer in self.layers],
            "error": {
                name: {"median": float(np.median(np.abs(errors))), "p90": float(np.quantile(np.abs(errors), 0.9))}
                for name, errors in self.errors().items()
            },
            "calibration_error": {
                str(kind): {"median": fitted.median_error, "p90": fitted.p90_error}
                for kind, fitted in self.model.fitted.items()
            },
        }


def explain(
    model: nn.Module,
    token_counts: Sequence[int],
    threads: int | None = None,
    seconds: float = 5.0,
    costs: CostModel | None = None,
) -> Explanation:
    """Predict and time every distinct SparseLinear of a model, and an nn.Linear of its shape, on the CPU.

    token_counts  rows of the inputs (batch * sequence)
    threads       torch threads, None for the present number
    seconds       budget of timing in all, beside five rounds
    costs         the model that predicts; None for this machine's, which is calibrated where it must be

    Raises ValueError if there is no sparse layer in float32, bfloat16 or int8 on the CPU, or no token count.
    """
    if not token_counts or min(token_counts) < 1:
        raise ValueError(f"explain: expected token counts of at least 1, got {tuple(token_counts)}")
    groups = _distinct(model)
    if not groups:
        raise ValueError(
            "explain: expected a model with sparse layers in float32, bfloat16 or int8 on the CPU, got none"
        )
    pairs = [(_kind(layers[0]), _dense_kind(layers[0])) for layers in groups.values()]
    with use_threads(threads) as count, torch.inference_mode():
        costs = costs or calibrated({kind for pair in pairs for kind in pair}, count)
        calls: dict[str, Callable[[], object]] = {}
        for index, layers in enumerate(groups.values()):
            calls |= _calls(layers[0], index, token_counts)
        times = undisturbed(calls, seconds)
        rows = []
        for index, (names, layers) in enumerate(groups.items()):
            kind, dense_kind = pairs[index]
            shape = (layers[0].out_features, layers[0].in_features)
            for tokens in token_counts:
                work = Work(tokens, *shape, layers[0].values.numel())
                whole = Work(tokens, *shape, shape[0] * shape[1])
                predicted = costs.predict(kind, work), costs.predict(dense_kind, whole)
                measured = times[_name("sparse", index, tokens)], times[_name("dense", index, tokens)]
                rows.append(
                    ExplainedLayer(names, kind, dense_kind, work, *predicted, *measured, costs.parts(kind, work))
                )
        return Explanation(tuple(rows), costs, machine())


def _distinct(model: nn.Module) -> dict[tuple[str, ...], list[SparseLinear]]:
    """{names: layers} of those that a prediction cannot tell apart."""
    groups: dict[tuple, dict[str, SparseLinear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and _supported(layer):
            density = round(layer.weight.density / ALIKE)
            key = (layer.out_features, layer.in_features, layer.block, layer.values.dtype, density)
            groups.setdefault(key, {})[name] = layer
    return {tuple(group): list(group.values()) for group in groups.values()}


def _supported(layer: SparseLinear) -> bool:
    return layer.values.device.type == "cpu" and str(layer.values.dtype).removeprefix("torch.") in INPUT_BYTES


def _kind(layer: SparseLinear) -> Kind:
    return Kind.of(layer.values.dtype, (layer.block[0], layer.block[1]))


def _dense_kind(layer: SparseLinear) -> Kind:
    return Kind.of(torch.bfloat16 if layer.values.dtype == torch.bfloat16 else torch.float32)


def _calls(layer: SparseLinear, index: int, token_counts: Sequence[int]) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if layer.values.dtype == torch.bfloat16 else torch.float32
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator).to(dtype)
    calls: dict[str, Callable[[], object]] = {}
    for tokens in token_counts:
        x = torch.randn(tokens, layer.in_features, generator=generator).to(dtype)
        calls[_name("sparse", index, tokens)] = partial(layer, x)
        calls[_name("dense", index, tokens)] = partial(F.linear, x, weight, layer.bias)
    return calls


def _name(side: str, index: int, tokens: int) -> str:
    return f"{side} {index} {tokens}"

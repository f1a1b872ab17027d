"""What the cost model is: a law for each kind of layer, and how far off each law was on calls it had not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch

from ..formats.block import INT8_UNIT
from ..plan import BlockShape, block_name
from .law import DenseLaw, Law, SparseLaw, Work

INPUT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, order=True)
class Kind:
    """What a law is about: `block` (n, k) of a SparseLinear with weights of `dtype`, or None for F.linear.

    dtype   "float32", "bfloat16", or "int8" (sparse only, with float32 inputs)
    """

    dtype: str
    block: BlockShape | None = None

    def __post_init__(self) -> None:
        if self.dtype not in WEIGHT_BYTES or (self.dtype == "int8" and self.block is None):
            raise ValueError(f"Kind: expected a dtype among {', '.join(WEIGHT_BYTES)} (int8 sparse only), got {self}")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(f"Kind: expected a block with two sides of at least 1, got {self.block}")
        if self.dtype == "int8" and self.block is not None and self.block[1] % INT8_UNIT:
            raise ValueError(f"Kind: expected int8 blocks with k a multiple of {INT8_UNIT}, got {self.block}")

    @classmethod
    def of(cls, dtype: torch.dtype, block: BlockShape | None = None) -> Kind:
        return cls(str(dtype).removeprefix("torch."), block)

    def __str__(self) -> str:
        return f"{self.dtype} {'dense' if self.block is None else block_name(self.block)}"

    @classmethod
    def parse(cls, text: str) -> Kind:
        """The kind that `str` wrote. Raises ValueError for any other text."""
        dtype, _, shape = text.partition(" ")
        sides = [int(side) for side in shape.split("x") if side.isdecimal()]
        kind = cls(dtype, (sides[0], sides[1]) if len(sides) == 2 else None)
        if str(kind) != text:
            raise ValueError(f"Kind: expected a dtype and a block shape or dense, got {text!r}")
        return kind


@dataclass(frozen=True)
class Fitted:
    """A law and its errors, predicted / measured - 1, on calls that were timed but not fitted."""

    law: Law
    errors: tuple[float, ...]

    @property
    def median_error(self) -> float:
        """Of the absolute errors."""
        return float(np.median(np.abs(self.errors)))

    @property
    def p90_error(self) -> float:
        """90th percentile of the absolute errors."""
        return float(np.quantile(np.abs(self.errors), 0.9))

    def as_dict(self) -> dict[str, Any]:
        return {"law": self.law.as_dict(), "errors": list(self.errors)}

    @classmethod
    def from_dict(cls, kind: Kind, data: Any) -> Fitted:
        """What `as_dict` wrote, every field checked: raises ValueError."""
        if not isinstance(data, dict) or data.keys() != {"law", "errors"}:
            raise ValueError(f"{kind}: expected law and errors, got {data!r}")
        law: Law = DenseLaw.from_dict(data["law"]) if kind.block is None else SparseLaw.from_dict(data["law"])
        errors = data["errors"]
        if not isinstance(errors, list) or not errors or not all(type(e) is float and isfinite(e) for e in errors):
            raise ValueError(f"{kind}: expected finite errors, at least one, got {errors!r}")
        return cls(law, tuple(errors))


@dataclass(frozen=True)
class CostModel:
    """Predicts the seconds of one call of a linear layer with warm weights, on one machine and number of threads.

    threads  torch threads of the predicted calls
    fitted   what is known, by kind
    """

    threads: int
    fitted: Mapping[Kind, Fitted] = field(default_factory=dict)

    def predict(self, kind: Kind, work: Work) -> float:
        """Seconds, at least 100 ns. Raises KeyError for a kind that was not calibrated."""
        return max(self.law(kind).predict(work), 1e-7)

    def parts(self, kind: Kind, work: Work) -> dict[str, float]:
        """The same by what they are spent on: overhead, pack, multiply, output, memory."""
        return self.law(kind).parts(work)

    def error(self, kind: Kind) -> float:
        """90th percentile of the relative error on calls that were not fitted."""
        self.law(kind)
        return self.fitted[kind].p90_error

    def law(self, kind: Kind) -> Law:
        if kind not in self.fitted:
            known = ", ".join(map(str, self.fitted)) or "none"
            raise KeyError(f"CostModel: expected a calibrated kind ({known}), got {kind}")
        return self.fitted[kind].law

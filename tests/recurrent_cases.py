"""Random recurrent layers for the tests of sparse_lstm and sparse_gru, and what float64 gives for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsenlp import BlockSparse
from sparsenlp.formats.recurrent import RecurrentTensors, RecurrentWeights
from sparsenlp.ops import sparse_gru, sparse_lstm
from sparsenlp.reference.sparse_gru import sparse_gru as gru_reference
from sparsenlp.reference.sparse_lstm import sparse_lstm as lstm_reference

# As in cases.py. bfloat16 rounds sums and states at each step; int8 compares with a reference that rounds alike, but
# what lies beside a rounding boundary may fall on either side of it.
TOLERANCES = {
    (torch.float32, False): {"rtol": 1e-5, "atol": 5e-6},
    (torch.bfloat16, False): {"rtol": 2e-2, "atol": 3e-2},
    (torch.float32, True): {"rtol": 1e-2, "atol": 1e-2},
    (torch.bfloat16, True): {"rtol": 3e-2, "atol": 5e-2},
    (torch.float64, False): {"rtol": 1e-12, "atol": 1e-12},
    (torch.float16, False): {"rtol": 1e-2, "atol": 1e-2},
}
GRAD_TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 5e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 2.5e-1},  # of sums over all tokens, up to 30
}


@dataclass(frozen=True)
class RecurrentCase:
    """T steps of B sequences, or of sequences with these `lengths` packed, through a layer of H units."""

    op: str = "sparse_lstm"
    steps: int = 5
    batch: int = 3
    lengths: tuple[int, ...] = ()
    columns: int = 24
    hidden: int = 32
    projection: int = 0
    directions: int = 1
    reverse: bool = False
    block: tuple[int, int] = (8, 1)
    density: float = 0.4
    empty_rows: bool = False
    bias: bool = True
    state: bool = True
    dtype: torch.dtype = torch.float32
    int8: bool = False
    seed: int = 0

    def __str__(self) -> str:
        default = RecurrentCase()
        names = ("lengths", "columns", "hidden", "projection", "directions", "block", "density", "dtype")
        flags = ("reverse", "empty_rows", "bias", "state", "int8")
        parts = [f"{self.steps}x{self.batch}"] if not self.lengths else []
        parts += [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        parts += [("" if getattr(self, n) else "no_") + n for n in flags if getattr(self, n) != getattr(default, n)]
        return "-".join(parts).replace("torch.", "").replace(" ", "")

    @property
    def lstm(self) -> bool:
        return self.op == "sparse_lstm"

    @property
    def gates(self) -> int:
        return 4 if self.lstm else 3

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES[self.dtype, self.int8]

    @property
    def size(self) -> int:
        return self.projection or self.hidden

    def weights(self) -> tuple[RecurrentWeights, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        n, k = self.block

        def matrix(rows: int, columns: int) -> BlockSparse:
            keep = torch.rand(rows // n, columns // k, generator=generator) < self.density
            if self.empty_rows:
                keep[::2] = False
            mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
            dense = torch.randn(rows, columns, generator=generator) / max(columns * self.density, 1) ** 0.5
            sparse = BlockSparse.from_dense((dense * mask).to(self.dtype), self.block, mask)
            return sparse.quantize() if self.int8 else sparse

        def bias() -> Tensor | None:
            values = torch.randn(rows, generator=generator) / 2
            return values.to(self.dtype) if self.bias else None

        rows = self.gates * self.hidden
        return tuple(
            RecurrentWeights(
                matrix(rows, self.columns),
                matrix(rows, self.size),
                bias(),
                bias(),
                matrix(self.projection, self.hidden) if self.projection else None,
            )
            for _ in range(self.directions)
        )

    def inputs(self) -> dict[str, Any]:
        """x, state, batch_sizes and reverse."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        lengths = torch.tensor(sorted(self.lengths, reverse=True))
        sizes = (lengths[:, None] > torch.arange(max(self.lengths))).sum(0) if self.lengths else None
        leading = (int(sizes.sum()),) if sizes is not None else (self.steps, self.batch)
        batch = len(self.lengths) or self.batch
        x = torch.randn(*leading, self.columns, generator=generator).to(self.dtype)
        h, c = (
            (torch.randn(self.directions, batch, features, generator=generator) / 2).to(self.dtype)
            for features in (self.size, self.hidden)
        )
        state: Any = ((h, c) if self.lstm else h) if self.state else None
        return {"x": x, "state": state, "batch_sizes": sizes, "reverse": self.reverse}

    def run(self, backend: str | None = None, **change: Any) -> tuple[Tensor, ...]:
        """y, h_n and for an LSTM c_n."""
        arguments = {"weights": self.weights(), **self.inputs(), "backend": backend} | change
        if not self.lstm:
            return sparse_gru(**arguments)
        y, states = sparse_lstm(**arguments)
        return y, *states

    def arguments(self) -> tuple[Any, ...]:
        """Of the torch.library op, up to reverse."""
        inputs = self.inputs()
        x, batch = inputs["x"], len(self.lengths) or self.batch
        shapes = [(self.directions, batch, self.size), (self.directions, batch, self.hidden)][: 1 + self.lstm]
        states = inputs["state"] if self.lstm else [inputs["state"]]
        states = states if self.state else [x.new_zeros(shape) for shape in shapes]
        return (x, inputs["batch_sizes"], *RecurrentTensors.of(self.weights()), *states, self.reverse)

    def expected(self, save: bool = False) -> tuple[Tensor, ...]:
        """What run gives in float64, for the same rounded inputs; with `save` what is kept for the gradients too."""

        def double(value: Any) -> Any:
            if isinstance(value, list):
                return [double(item) for item in value]
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        arguments = [double(value) for value in self.arguments()]
        reference = lstm_reference if self.lstm else gru_reference
        results = reference(*arguments, save)
        return results if save else results[: 3 if self.lstm else 2]


_SMALL = RecurrentCase()
_SHAPES = [
    *(replace(_SMALL, steps=steps, batch=batch) for steps, batch in ((1, 1), (9, 1), (1, 5), (4, 9), (3, 17), (2, 40))),
    *(
        replace(_SMALL, block=block, hidden=48, columns=48, steps=4)
        for block in ((16, 1), (1, 1), (4, 2), (8, 8), (3, 1))
    ),
    *(replace(_SMALL, block=block, hidden=48, columns=48, batch=20, steps=3) for block in ((16, 1), (1, 1), (8, 2))),
    replace(_SMALL, hidden=200, batch=1, steps=2),
    replace(_SMALL, hidden=20, batch=2),  # no multiple of the block, the rows of all gates together are
    replace(_SMALL, hidden=5, columns=3, block=(1, 1), batch=2),
    replace(_SMALL, lengths=(5, 1, 3, 5)),
    replace(_SMALL, lengths=(2, 1, 3), reverse=True),
    replace(_SMALL, lengths=(1,) * 12 + (7,), directions=2),
    replace(_SMALL, directions=2),
    replace(_SMALL, directions=2, batch=20, steps=3, reverse=True),
    replace(_SMALL, directions=2, batch=1, bias=False, state=False),
    replace(_SMALL, reverse=True),
    replace(_SMALL, bias=False),
    replace(_SMALL, state=False),
    replace(_SMALL, density=0.0),
    replace(_SMALL, density=1.0),
    replace(_SMALL, empty_rows=True),
    replace(_SMALL, batch=0),
]
_PROJECTED = [
    replace(_SMALL, projection=16),
    replace(_SMALL, projection=40, directions=2, batch=1),
    replace(_SMALL, projection=8, batch=20, reverse=True),
    replace(_SMALL, projection=16, lengths=(4, 2, 1), directions=2),
]


def _all(shapes: list[RecurrentCase], op: str) -> list[RecurrentCase]:
    shapes = [replace(case, op=op) for case in shapes if op == "sparse_lstm" or case.hidden != 20]
    small = [shapes[0], replace(shapes[2], directions=2), replace(_SMALL, op=op, lengths=(4, 4, 1)), shapes[4]]
    return [
        *shapes,
        *(replace(case, dtype=torch.bfloat16) for case in shapes),
        *(replace(case, int8=True, block=(8, 4), dtype=d) for case in small for d in (torch.float32, torch.bfloat16)),
    ]


SPARSE_LSTM = _all([*_SHAPES, *_PROJECTED], "sparse_lstm")
SPARSE_GRU = _all(_SHAPES, "sparse_gru")

THREADED = [  # enough work in a step for several threads
    RecurrentCase(hidden=hidden, columns=64, steps=6, batch=batch, directions=directions, block=block, density=0.5)
    for hidden, batch, directions, block in (
        (256, 1, 1, (8, 1)),
        (256, 1, 2, (8, 2)),
        (128, 20, 1, (8, 2)),
        (136, 4, 2, (8, 1)),
    )
]
THREADED += [
    replace(THREADED[1], lengths=(6, 4, 4, 2, 1), seed=1),  # sequences end, and in one direction begin, at every step
    replace(THREADED[1], lengths=(6, 4, 4, 2, 1), block=(8, 4), int8=True),
]


def gradients(case: RecurrentCase, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Of a weighted sum of all results, by input; values are those of `case.dtype`, computed with in `dtype`."""
    inputs = case.inputs()
    leaves: dict[str, Tensor] = {"x": inputs["x"].to(dtype).requires_grad_()}
    if case.state:
        states = inputs["state"] if case.lstm else (inputs["state"],)
        leaves |= {name: s.to(dtype).requires_grad_() for name, s in zip(("h0", "c0"), states, strict=False)}
    weights = []
    for d, own in enumerate(case.weights()):
        parts: dict[str, Any] = {}
        for name in ("input", "recurrent", "projection"):
            matrix = getattr(own, name)
            if matrix is not None:
                leaves[f"{name}{d}"] = matrix.values.to(dtype).requires_grad_()
                matrix = replace(matrix, values=leaves[f"{name}{d}"])
            parts[name] = matrix
        for name in ("bias_input", "bias_recurrent"):
            if case.bias:
                leaves[f"{name}{d}"] = getattr(own, name).to(dtype).requires_grad_()
            parts[name] = leaves.get(f"{name}{d}")
        weights.append(RecurrentWeights(**parts))
    state: Any = None
    if case.state:
        state = (leaves["h0"], leaves["c0"]) if case.lstm else leaves["h0"]
    results = case.run(backend, weights=weights, x=leaves["x"], state=state)
    total = sum((r * torch.linspace(-1, 1, r.numel()).to(case.dtype).to(dtype).view_as(r)).sum() for r in results)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def grad_cases(op: str) -> list[RecurrentCase]:
    small = replace(_SMALL, op=op)
    shapes = [
        small,
        replace(small, directions=2, batch=1),
        replace(small, batch=20, steps=3, reverse=True, block=(16, 2)),
        replace(small, lengths=(4, 1, 2, 4), directions=2),
        replace(small, lengths=(1,) * 20 + (3,) * 15, reverse=True),
        replace(small, bias=False, state=False, empty_rows=True),
    ]
    if op == "sparse_lstm":
        shapes += [replace(small, projection=16), replace(small, projection=8, lengths=(3, 1), directions=2)]
    return [replace(case, dtype=dtype) for case in shapes for dtype in (torch.float32, torch.bfloat16)]

"""N:M sparsity: n of every m neighbouring inputs of an output are stored (2:4 is the best known)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .block import check_sizes, validate_scales
from .stored_weight import StoredWeight

INDEX_DTYPE = torch.uint8
PACKED_VALUES = 32
"""Rows of packed indices are padded to a multiple of this many."""


@dataclass(frozen=True, eq=False, slots=True)
class NM(StoredWeight):
    """An N x K matrix of which n of every m consecutive values along K are stored.

    values   (N, K / m * n)         any floating dtype, or int8
    indices  (N, K / m * n)  uint8  position of each value in its group of m, strictly increasing within a group
    shape    (N, K)
    pattern  (n, m)                 0 < n <= m <= 256
    scales   (N,)                   float32 with int8 values, which times this are the weights; else None

    Building one checks nothing; `validate` checks everything, and must have run on any data that
    comes from a file before a kernel sees it.
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]
    pattern: tuple[int, int]
    scales: Tensor | None = None

    @classmethod
    def from_dense(cls, dense: Tensor, pattern: tuple[int, int] = (2, 4)) -> NM:
        """Keep the nonzeros of `dense` (N, K); a group with fewer than n also stores its lowest zeros.

        Raises ValueError if K is not a multiple of m, or a group holds more than n nonzeros.
        """
        n, m = _check_pattern(pattern)
        if dense.dim() != 2:
            raise ValueError(f"NM: expected a 2-D matrix, got shape {tuple(dense.shape)}")
        rows, columns = dense.shape
        if columns % m:
            raise ValueError(f"NM: expected columns divisible by {m}, got shape {rows}x{columns}")
        groups = dense.unflatten(1, (columns // m, m))
        nonzero = groups != 0
        most = int(nonzero.sum(dim=2).max()) if dense.numel() else 0
        if most > n:
            raise ValueError(f"NM: expected at most {n} nonzeros in every group of {m}, got {most}")
        # nonzeros first, then zeros, each by position; the n first of them, again by position
        position = torch.arange(m, device=dense.device)
        order = torch.where(nonzero, position, position + m).argsort(dim=2)
        kept = order[..., :n].sort(dim=2).values
        return cls(
            values=groups.gather(2, kept).flatten(1),
            indices=kept.flatten(1).to(INDEX_DTYPE),
            shape=(rows, columns),
            pattern=(n, m),
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the dense matrix: float32 for int8 values."""
        return self.values.dtype if self.scales is None else torch.float32

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Stored values / all values, n / m; explicit zeros count as stored."""
        total = self.shape[0] * self.shape[1]
        return self.values.numel() / total if total else 0.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        tensors = (self.values, self.indices, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to_dense(self) -> Tensor:
        """The (N, K) matrix, zeros included; float32 of int8 values."""
        dense = to_dense(self.values, self.indices, self.pattern, self.shape[1])
        return dense if self.scales is None else dense * self.scales[:, None]

    def quantize(self) -> NM:
        """As int8, symmetric per output row: scale = max |w| / 127, w ~ int8 * scale within scale / 2.

        A row of zeros gets the scale 1. Raises ValueError if a weight is not finite.
        """
        values = self.values.detach().float()
        if not bool(values.isfinite().all()):
            raise ValueError("NM: expected finite weights to quantize, got inf or nan")
        largest = values.abs().amax(dim=1) if values.shape[1] else values.sum(dim=1)
        scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        return replace(self, values=(values / scales[:, None]).round().to(torch.int8), scales=scales)

    def to(self, *args: Any, **kwargs: Any) -> NM:
        """As Tensor.to for the values; indices and scales (float32) follow the device."""
        values = self.values.to(*args, **kwargs)
        scales = None if self.scales is None else self.scales.to(values.device)
        return NM(values, self.indices.to(values.device), self.shape, self.pattern, scales)

    def validate(self) -> NM:
        """Return self, or raise TypeError (dtypes) or ValueError (shapes, indices) naming the first fault."""
        validate(self.values, self.indices, self.shape, self.pattern, self.scales)
        return self


def columns_of(indices: Tensor, pattern: tuple[int, int]) -> Tensor:
    """The column of each stored value, (N, K / m * n) int64."""
    n, m = pattern
    place = torch.arange(indices.shape[1], device=indices.device)
    return indices.long() + place.div(n, rounding_mode="floor") * m


def to_dense(values: Tensor, indices: Tensor, pattern: tuple[int, int], columns: int) -> Tensor:
    """Scatter values into a dense (N, columns) matrix; differentiable in `values`."""
    return values.new_zeros(values.shape[0], columns).scatter(1, columns_of(indices, pattern), values)


def index_bits(pattern: tuple[int, int]) -> int:
    """Bits of one packed index: 2 for groups of up to 4, 4 for up to 16. Raises ValueError beyond."""
    if pattern[1] > 16:
        raise ValueError(f"NM: expected groups of at most 16 to pack indices, got {pattern[1]}")
    return 2 if pattern[1] <= 4 else 4


def pack_indices(indices: Tensor, pattern: tuple[int, int]) -> Tensor:
    """indices (N, V) in 2 or 4 bits each (`index_bits`), as kernels read them.

    Index 0 stands in the lowest bits of byte 0, and so on; rows are padded with zeros to a multiple of 32
    indices. Returns (N, V rounded up to 32, times bits / 8) uint8. Raises ValueError for groups above 16.
    """
    bits = index_bits(pattern)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(indices, (0, -indices.shape[1] % PACKED_VALUES))
    parts = padded.unflatten(1, (padded.shape[1] // per_byte, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=INDEX_DTYPE, device=indices.device)
    return (parts << shifts).sum(dim=2, dtype=INDEX_DTYPE)


def unpack_indices(packed: Tensor, pattern: tuple[int, int], count: int) -> Tensor:
    """The first `count` indices of each row that `pack_indices` packed: (N, count) uint8."""
    bits = index_bits(pattern)
    shifts = torch.arange(0, 8, bits, dtype=INDEX_DTYPE, device=packed.device)
    return (packed[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)[:, :count].contiguous()


def _check_pattern(pattern: tuple[int, int]) -> tuple[int, int]:
    n, m = pattern
    if not 0 < n <= m <= 256:
        raise ValueError(f"NM: expected a pattern with 0 < n <= m <= 256, got {n}:{m}")
    return n, m


def validate(
    values: Tensor,
    indices: Tensor,
    shape: tuple[int, int],
    pattern: tuple[int, int],
    scales: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless the tensors describe an N x K matrix of the pattern."""
    n, m = _check_pattern(pattern)
    if not values.is_floating_point() and values.dtype != torch.int8:
        raise TypeError(f"NM: expected floating-point or int8 values, got {values.dtype}")
    if indices.dtype != INDEX_DTYPE:
        raise TypeError(f"NM: expected indices of dtype {INDEX_DTYPE}, got {indices.dtype}")
    if indices.device != values.device:
        raise ValueError(f"NM: expected indices on {values.device}, got {indices.device}")
    rows, columns = shape
    check_sizes("NM", shape)
    if columns % m:
        raise ValueError(f"NM: expected columns divisible by {m}, got shape {rows}x{columns}")
    expected = (rows, columns // m * n)
    for name, tensor in (("values", values), ("indices", indices)):
        if tensor.shape != expected:
            raise ValueError(f"NM: expected {name} of shape {expected}, got {tuple(tensor.shape)}")
    validate_scales("NM", values, rows, scales)
    if indices.numel():
        if int(indices.max()) >= m:
            raise ValueError(f"NM: expected indices in [0, {m}), got {int(indices.max())}")
        groups = indices.unflatten(1, (columns // m, n))
        if bool((groups[..., 1:] <= groups[..., :-1]).any()):
            raise ValueError("NM: expected indices to increase within each group")

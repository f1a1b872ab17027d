"""BSR: a sparse weight stored as the dense blocks that are not all zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from .stored_weight import StoredWeight

INDEX_DTYPE = torch.int32
LARGEST = torch.iinfo(INDEX_DTYPE).max
"""The largest size that indices can name: of a matrix, and of how many blocks are stored."""
INT8_UNIT = 4
"""int8 blocks have a multiple of this many inputs: what one lane of a dot product takes."""


@dataclass(frozen=True, eq=False, slots=True)
class BlockSparse(StoredWeight):
    """An N x K matrix of which only some n x k blocks are stored (torch's BSR, int32 indices).

    crow_indices  (N / n + 1,)   int32   block row r owns blocks crow_indices[r] .. crow_indices[r + 1]
    col_indices   (nnzb,)        int32   block column of each block, strictly increasing within a block row
    values        (nnzb, n, k)           any floating dtype, or int8 in [-127, 127]
    shape         (N, K)
    scales        (N,)           float32 with int8 values, which times this are the weights; else None

    Building one checks nothing; `validate` checks everything, and must have run on any data that
    comes from a file before a kernel sees it.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    scales: Tensor | None = None

    @classmethod
    def from_dense(cls, dense: Tensor, block: tuple[int, int], mask: Tensor | None = None) -> BlockSparse:
        """Keep the blocks of `dense` (N, K) that hold a nonzero, or those that `mask` (N, K) touches.

        Raises ValueError if N is not a multiple of n, or K of k, `mask` has another shape, or there are more blocks
        than int32 can count.
        """
        n, _ = block
        blocks = split_blocks(dense, block)
        if mask is None:
            keep = (blocks != 0).any(dim=3).any(dim=2)
        elif mask.shape != dense.shape:
            raise ValueError(f"BlockSparse: expected a mask of shape {tuple(dense.shape)}, got {tuple(mask.shape)}")
        else:
            keep = split_blocks(mask != 0, block).any(dim=3).any(dim=2)
        rows, cols = keep.nonzero(as_tuple=True)
        check_count("BlockSparse", rows.numel())
        counts = torch.zeros(dense.shape[0] // n + 1, dtype=INDEX_DTYPE, device=dense.device)
        counts[1:] = keep.sum(dim=1)
        return cls(
            crow_indices=counts.cumsum(0, dtype=INDEX_DTYPE),
            col_indices=cols.to(INDEX_DTYPE),
            values=blocks[rows, cols],
            shape=(dense.shape[0], dense.shape[1]),
        )

    @property
    def block(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def nnz_blocks(self) -> int:
        return self.values.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the dense matrix: float32 for int8 values."""
        return self.values.dtype if self.scales is None else torch.float32

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Stored values / all values; explicit zeros inside a stored block count as stored."""
        total = self.shape[0] * self.shape[1]
        return self.values.numel() / total if total else 0.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        tensors = (self.crow_indices, self.col_indices, self.values, self.scales)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def row_density(self) -> Tensor:
        """Share of stored blocks in each block row, (N / n,) float32."""
        block_cols = max(self.shape[1] // self.block[1], 1)
        return self.crow_indices.diff().to(torch.float32) / block_cols

    def row_indices(self) -> Tensor:
        """Block row of each stored block, (nnzb,) int64."""
        return block_rows(self.crow_indices, self.nnz_blocks)

    def to_dense(self) -> Tensor:
        """The (N, K) matrix, zeros included; float32 for int8 values."""
        dense = to_dense(self.crow_indices, self.col_indices, self.values, self.shape[1])
        return dense if self.scales is None else dense * self.scales[:, None]

    def reblock(self, block: tuple[int, int]) -> BlockSparse:
        """The same matrix in other blocks, which may have to store more zeros; floating dtypes only."""
        return BlockSparse.from_dense(self.to_dense(), block)

    def quantize(self) -> BlockSparse:
        """As int8, symmetric per output row: scale = max |w| / 127, w ~ int8 * scale within scale / 2.

        A row of zeros gets the scale 1. Blocks are merged to a multiple of 4 inputs where k is not one.

        Raises ValueError if K is not a multiple of 4 (of lcm(k, 4)), or a weight is not finite.
        """
        n, k = self.block
        if k % INT8_UNIT:
            return self.reblock((n, lcm(k, INT8_UNIT))).quantize()
        values = self.values.detach().float()
        if not bool(values.isfinite().all()):
            raise ValueError("BlockSparse: expected finite weights to quantize, got inf or nan")
        magnitudes = to_dense(self.crow_indices, self.col_indices, values.abs(), self.shape[1])
        largest = magnitudes.amax(dim=1) if self.shape[1] else magnitudes.sum(dim=1)
        scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        quantized = values / scales.view(-1, n)[self.row_indices()][:, :, None]
        return replace(self, values=quantized.round().to(torch.int8), scales=scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> BlockSparse:
        """int8 as floating-point values."""
        if self.scales is None:
            return self.to(dtype)
        per_block = self.scales.view(-1, self.block[0])[self.row_indices()]
        return replace(self, values=(self.values * per_block[:, :, None]).to(dtype), scales=None)

    def to(self, *args: Any, **kwargs: Any) -> BlockSparse:
        """As Tensor.to for the values; indices (int32) and scales (float32) follow the device."""
        values = self.values.to(*args, **kwargs)
        device = values.device
        scales = None if self.scales is None else self.scales.to(device)
        return BlockSparse(self.crow_indices.to(device), self.col_indices.to(device), values, self.shape, scales)

    def validate(self) -> BlockSparse:
        """Return self, or raise TypeError (dtypes) or ValueError (shapes, indices) naming the first fault."""
        validate(self.crow_indices, self.col_indices, self.values, self.shape, self.scales)
        return self


def check_count(name: str, blocks: int) -> None:
    """Raise ValueError unless indices can count so many blocks."""
    if blocks > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST} blocks, got {blocks}; choose larger blocks")


def check_sizes(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless indices can name all rows and columns of a matrix of this shape."""
    if not all(0 <= size <= LARGEST for size in shape):
        raise ValueError(f"{name}: expected sizes from 0 to {LARGEST}, got {' x '.join(map(str, shape))}")


def check_crow_indices(name: str, crow_indices: Tensor, blocks: int) -> None:
    """Raise ValueError unless the row pointers, at least one, go from 0 to `blocks` and never decrease."""
    first, last = int(crow_indices[0]), int(crow_indices[-1])
    if first != 0 or last != blocks:
        raise ValueError(f"{name}: expected crow_indices from 0 to {blocks}, got {first} to {last}")
    if bool((crow_indices[1:] < crow_indices[:-1]).any()):  # a difference may go round in 32 bits, and look like a rise
        raise ValueError(f"{name}: expected crow_indices never to decrease")


def check_col_indices(name: str, crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    """Raise ValueError unless all are in [0, columns) and increase in each row of the checked crow_indices."""
    check_range(name, "col_indices", col_indices, 0, columns)
    row = block_rows(crow_indices, col_indices.numel())
    if bool(((col_indices[1:] <= col_indices[:-1]) & (row[1:] == row[:-1])).any()):
        raise ValueError(f"{name}: expected col_indices to increase within each block row")


def check_range(name: str, what: str, index: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all indices are in [low, high)."""
    if not index.numel():
        return
    least, most = int(index.min()), int(index.max())
    if least < low or most >= high:
        raise ValueError(f"{name}: expected {what} in [{low}, {high}), got {least} to {most}")


def split_blocks(dense: Tensor, block: tuple[int, int]) -> Tensor:
    """View (N, K) as (N / n, K / k, n, k)."""
    n, k = block
    if n < 1 or k < 1:
        raise ValueError(f"BlockSparse: expected block sides of at least 1, got {n}x{k}")
    if dense.dim() != 2:
        raise ValueError(f"BlockSparse: expected a 2-D matrix, got shape {tuple(dense.shape)}")
    rows, cols = dense.shape
    if rows % n or cols % k:
        raise ValueError(f"BlockSparse: expected a shape divisible by blocks of {n}x{k}, got {rows}x{cols}")
    return dense.reshape(rows // n, n, cols // k, k).permute(0, 2, 1, 3)


def block_rows(crow_indices: Tensor, nnz_blocks: int) -> Tensor:
    """Expand crow_indices to one block row per block, (nnzb,) int64."""
    rows = torch.arange(crow_indices.numel() - 1, device=crow_indices.device)
    return rows.repeat_interleave(crow_indices.diff().long(), output_size=nnz_blocks)


def to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """Scatter blocks into a dense (N, columns) matrix; differentiable in `values`."""
    nnz_blocks, n, k = values.shape
    block_row_count = crow_indices.numel() - 1
    rows = block_rows(crow_indices, nnz_blocks)
    dense = values.new_zeros(block_row_count, columns // k, n, k).index_put((rows, col_indices.long()), values)
    return dense.permute(0, 2, 1, 3).reshape(block_row_count * n, columns)


def validate(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: tuple[int, int], scales: Tensor | None = None
) -> None:
    """Raise TypeError or ValueError unless the tensors describe an N x K BSR matrix."""
    for name, index in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if index.dtype != INDEX_DTYPE:
            raise TypeError(f"BlockSparse: expected {name} of dtype {INDEX_DTYPE}, got {index.dtype}")
        if index.dim() != 1 or not index.is_contiguous():
            raise ValueError(f"BlockSparse: expected {name} to be 1-D and contiguous, got shape {tuple(index.shape)}")
        if index.device != values.device:
            raise ValueError(f"BlockSparse: expected {name} on {values.device}, got {index.device}")
    if not values.is_floating_point() and values.dtype != torch.int8:
        raise TypeError(f"BlockSparse: expected floating-point or int8 values, got {values.dtype}")
    if values.dim() != 3 or 0 in values.shape[1:]:
        raise ValueError(f"BlockSparse: expected values of shape (nnzb, n, k), got {tuple(values.shape)}")
    nnz_blocks, n, k = values.shape
    rows, cols = shape
    check_sizes("BlockSparse", shape)
    if rows % n or cols % k:
        raise ValueError(f"BlockSparse: expected a shape divisible by blocks of {n}x{k}, got {rows}x{cols}")
    if crow_indices.numel() != rows // n + 1:
        raise ValueError(f"BlockSparse: expected {rows // n + 1} crow_indices, got {crow_indices.numel()}")
    if col_indices.numel() != nnz_blocks:
        raise ValueError(f"BlockSparse: expected {nnz_blocks} col_indices, got {col_indices.numel()}")
    check_crow_indices("BlockSparse", crow_indices, nnz_blocks)
    check_col_indices("BlockSparse", crow_indices, col_indices, cols // k)
    validate_scales("BlockSparse", values, rows, scales)
    if scales is not None and k % INT8_UNIT:
        raise ValueError(f"BlockSparse: expected int8 blocks with k a multiple of {INT8_UNIT}, got {k}")


def validate_scales(name: str, values: Tensor, rows: int, scales: Tensor | None) -> None:
    """Raise unless int8 values come with a positive float32 scale for each row, and others with none."""
    if (values.dtype == torch.int8) != (scales is not None):
        raise TypeError(f"{name}: expected scales with int8 values and only then, got {values.dtype} values")
    if scales is None:
        return
    if scales.dtype != torch.float32 or scales.shape != (rows,) or scales.device != values.device:
        raise ValueError(
            f"{name}: expected float32 scales of shape ({rows},) on {values.device}, "
            f"got {scales.dtype} {tuple(scales.shape)} on {scales.device}"
        )
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"{name}: expected finite scales above 0")
    if bool((values == -128).any()):
        raise ValueError(f"{name}: expected int8 values in [-127, 127], got -128")

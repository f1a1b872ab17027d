"""BSR: a sparse weight stored as the dense blocks that are not all zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INDEX_DTYPE = torch.int32


@dataclass(frozen=True, eq=False, slots=True)
class BlockSparse:
    """An N x K matrix of which only some n x k blocks are stored (torch's BSR, int32 indices).

    crow_indices  (N / n + 1,)   int32   block row r owns blocks crow_indices[r] .. crow_indices[r + 1]
    col_indices   (nnzb,)        int32   block column of each block, strictly increasing within a block row
    values        (nnzb, n, k)           any floating dtype; strides are free, see `packed`
    shape         (N, K)

    Building one checks nothing; `validate` checks everything, and must have run on any data that
    comes from a file before a kernel sees it.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, dense: Tensor, block: tuple[int, int], mask: Tensor | None = None) -> BlockSparse:
        """Keep the blocks of `dense` (N, K) that hold a nonzero, or those that `mask` (N, K) touches.

        Raises ValueError if N is not a multiple of n, or K of k, or `mask` has another shape.
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
    def density(self) -> float:
        """Stored values / all values; explicit zeros inside a stored block count as stored."""
        total = self.shape[0] * self.shape[1]
        return self.values.numel() / total if total else 0.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.crow_indices, self.col_indices, self.values))

    def row_density(self) -> Tensor:
        """Share of stored blocks in each block row, (N / n,) float32."""
        block_cols = max(self.shape[1] // self.block[1], 1)
        return self.crow_indices.diff().to(torch.float32) / block_cols

    def row_indices(self) -> Tensor:
        """Block row of each stored block, (nnzb,) int64."""
        return block_rows(self.crow_indices, self.nnz_blocks)

    def to_dense(self) -> Tensor:
        """The (N, K) matrix, zeros included."""
        return to_dense(self.crow_indices, self.col_indices, self.values, self.shape[1])

    def transpose(self) -> BlockSparse:
        """The K x N matrix Wᵀ, in blocks of k x n."""
        crow, col, values = transpose(self.crow_indices, self.col_indices, self.values, self.shape[1])
        return BlockSparse(crow, col, values, (self.shape[1], self.shape[0]))

    def packed(self) -> BlockSparse:
        """The same matrix with each block column-major in memory, which is how kernels read it.

        Only the strides of `values` change (to n*k, 1, n), so packed weights cost no extra memory
        and still look canonical. Blocks with n == 1 or k == 1 are packed as they are.
        """
        return BlockSparse(self.crow_indices, self.col_indices, pack_values(self.values), self.shape)

    def to(self, *args: Any, **kwargs: Any) -> BlockSparse:
        """As Tensor.to for the values; the indices follow the device and stay int32."""
        values = self.values.to(*args, **kwargs)
        return BlockSparse(self.crow_indices.to(values.device), self.col_indices.to(values.device), values, self.shape)

    def validate(self) -> BlockSparse:
        """Return self, or raise TypeError (dtypes) or ValueError (shapes, indices) naming the first fault."""
        validate(self.crow_indices, self.col_indices, self.values, self.shape)
        return self


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


def transpose(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, col_indices, values) of Wᵀ for a W with `columns` columns."""
    nnz_blocks, _, k = values.shape
    sorted_cols, order = col_indices.sort(stable=True)
    edges = torch.arange(columns // k + 1, device=col_indices.device, dtype=INDEX_DTYPE)
    crow = torch.searchsorted(sorted_cols, edges, out_int32=True)
    rows = block_rows(crow_indices, nnz_blocks)
    return crow, rows[order].to(INDEX_DTYPE), values[order].transpose(1, 2)


def pack_values(values: Tensor) -> Tensor:
    """(nnzb, n, k) with strides (n*k, 1, n); returns `values` itself where it is already so."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def validate(crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless the tensors describe an N x K BSR matrix."""
    for name, index in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if index.dtype != INDEX_DTYPE:
            raise TypeError(f"BlockSparse: expected {name} of dtype {INDEX_DTYPE}, got {index.dtype}")
        if index.dim() != 1 or not index.is_contiguous():
            raise ValueError(f"BlockSparse: expected {name} to be 1-D and contiguous, got shape {tuple(index.shape)}")
        if index.device != values.device:
            raise ValueError(f"BlockSparse: expected {name} on {values.device}, got {index.device}")
    if not values.is_floating_point():
        raise TypeError(f"BlockSparse: expected floating-point values, got {values.dtype}")
    if values.dim() != 3 or 0 in values.shape[1:]:
        raise ValueError(f"BlockSparse: expected values of shape (nnzb, n, k), got {tuple(values.shape)}")
    nnz_blocks, n, k = values.shape
    rows, cols = shape
    if rows % n or cols % k:
        raise ValueError(f"BlockSparse: expected a shape divisible by blocks of {n}x{k}, got {rows}x{cols}")
    if crow_indices.numel() != rows // n + 1:
        raise ValueError(f"BlockSparse: expected {rows // n + 1} crow_indices, got {crow_indices.numel()}")
    if col_indices.numel() != nnz_blocks:
        raise ValueError(f"BlockSparse: expected {nnz_blocks} col_indices, got {col_indices.numel()}")
    if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != nnz_blocks:
        raise ValueError(
            f"BlockSparse: expected crow_indices from 0 to {nnz_blocks}, "
            f"got {int(crow_indices[0])} to {int(crow_indices[-1])}"
        )
    if bool((crow_indices.diff() < 0).any()):
        raise ValueError("BlockSparse: expected crow_indices never to decrease")
    if nnz_blocks:
        low, high = int(col_indices.min()), int(col_indices.max())
        if low < 0 or high >= cols // k:
            raise ValueError(f"BlockSparse: expected col_indices in [0, {cols // k}), got {low} to {high}")
        same_row = block_rows(crow_indices, nnz_blocks).diff() == 0
        if bool((col_indices.diff()[same_row] <= 0).any()):
            raise ValueError("BlockSparse: expected col_indices to increase within each block row")

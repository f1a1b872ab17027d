"""2:4 in the layout of torch.sparse.to_sparse_semi_structured (CUTLASS): the same values, other metadata.

The metadata are 4 bits for every 4 columns, the two positions stored, as `pack_indices` has them. CUTLASS orders them
as the lanes of a warp hand them to mma.sp, for tiles of 32 rows x 32 columns (int8: 16 x 64):

    16-bit types   (K / 32, N / 32, 8 g, 2 q, 2 c, 2 h) words of 16 bits: row 16 q + 8 h + g, columns 16 c to 16 c + 15
    int8           (K / 64, N / 16, 8 g, 2 c, 2 h) words of 32 bits: row 8 h + g, columns 32 c to 32 c + 31

Plain reshapes, on any device. Source: cutlass/util/host_reorder.h, torch/sparse/_semi_structured_conversions.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nm import NM, pack_indices, unpack_indices

PATTERN = (2, 4)


def to_semi_structured(weight: NM) -> tuple[Tensor, Tensor]:
    """(values, metadata) of a 2:4 weight, as `packed` and `meta` of torch's SparseSemiStructuredTensorCUTLASS.

    values    (N, K / 2)                 the weight's own, float16, bfloat16 or int8
    metadata  (N, K / 16) int16, for int8 values (N, K / 32) int32

    Raises ValueError unless the pattern is 2:4 and N x K a multiple of 32 x 32 (int8: 16 x 64), TypeError for
    another dtype. Scales of an int8 weight are left to the caller.
    """
    rows, columns = weight.shape
    if weight.pattern != PATTERN:
        raise ValueError(f"to_semi_structured: expected the pattern 2:4, got {weight.pattern[0]}:{weight.pattern[1]}")
    word = _word(weight.values.dtype)
    _check_shape("to_semi_structured", rows, columns, word)
    count = columns // (8 * word.itemsize)
    words = pack_indices(weight.indices, PATTERN).view(word)[:, :count]
    tiles = words.reshape(rows // _tile(word), *_row_axes(word), count // 2, 2)
    return weight.values, tiles.permute(_order(word)).reshape(rows, count)


def from_semi_structured(values: Tensor, metadata: Tensor) -> NM:
    """The 2:4 weight of torch's `packed` and `meta`; int8 values get scales of 1.

    Raises what `to_semi_structured` does, and ValueError if the shapes do not fit together or the positions of a
    group are not in order.
    """
    word = _word(values.dtype)
    rows, columns = values.shape[0], 2 * values.shape[1]
    _check_shape("from_semi_structured", rows, columns, word)
    count = columns // (8 * word.itemsize)
    if metadata.shape != (rows, count) or metadata.dtype != word:
        raise ValueError(
            f"from_semi_structured: expected metadata of shape {(rows, count)} and dtype {word}, "
            f"got {tuple(metadata.shape)} and {metadata.dtype}"
        )
    order = _order(word)
    sizes = (rows // _tile(word), *_row_axes(word), count // 2, 2)
    tiles = metadata.reshape([sizes[axis] for axis in order])
    words = tiles.permute([order.index(axis) for axis in range(len(order))]).reshape(rows, count)
    indices = unpack_indices(words.contiguous().view(torch.uint8), PATTERN, values.shape[1])
    scales = torch.ones(rows, device=values.device) if values.dtype == torch.int8 else None
    return NM(values, indices, (rows, columns), PATTERN, scales).validate()


def _word(dtype: torch.dtype) -> torch.dtype:
    """The dtype of metadata for values of `dtype`."""
    words = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.int8: torch.int32}
    if dtype not in words:
        raise TypeError(f"semi-structured: expected values of float16, bfloat16 or int8, got {dtype}")
    return words[dtype]


def _tile(word: torch.dtype) -> int:
    """Rows of a tile."""
    return 32 if word == torch.int16 else 16


def _row_axes(word: torch.dtype) -> tuple[int, ...]:
    """(q, h, g) or (h, g), the parts of a row in its tile."""
    return (2, 2, 8) if word == torch.int16 else (2, 8)


def _order(word: torch.dtype) -> tuple[int, ...]:
    """CUTLASS's order of the axes (tile, q, h, g, columns, c) or (tile, h, g, columns, c)."""
    return (4, 0, 3, 1, 5, 2) if word == torch.int16 else (3, 0, 2, 4, 1)


def _check_shape(name: str, rows: int, columns: int, word: torch.dtype) -> None:
    across = 16 * word.itemsize
    if rows % _tile(word) or columns % across:
        raise ValueError(
            f"{name}: expected a shape that is a multiple of {_tile(word)} x {across}, got {rows} x {columns}"
        )

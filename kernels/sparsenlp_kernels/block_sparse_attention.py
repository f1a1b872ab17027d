"""block_sparse_attention: compiled and simulated, not run on hardware. Gradients: block_sparse_attention_backward.py.

A program computes a tile of queries of one head, over the blocks of its block row. Scores are in units of ln 2, for
exp2. Where a block refers to a pattern, pairs outside it are masked; whole blocks load none. Products run on tensor
cores for float16 and bfloat16, and on FMA for float32 (TF32 would miss the op's tolerance). Needs compute capability
8.0 (cp.async and bfloat16 mma).

Source: Dao 2023, arXiv:2307.08691; blocks after Child et al. 2019, arXiv:1904.10509.
"""

# mypy: allow-incomplete-defs
# (in kernels only constexpr parameters are annotated)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bsr_linear import DTYPES
from .bsr_linear_product import compiler_options
from .launch import INTERPRETED, Device, Launch, check_countable, run, tuned

MOST_WIDTH = 256


@triton.jit
def _places(row, count, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets [rows, BLOCK] of the rows (int64) of a (count, WIDTH), which of them there are)"""
    column = tl.arange(0, BLOCK)
    inside = row[:, None] < count
    if WIDTH < BLOCK:
        inside = inside & (column[None, :] < WIDTH)
    return row[:, None] * stride + column[None, :], inside


@triton.jit
def load_rows(x_ptr, row, count, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `row` (int64) of x (count, WIDTH), [rows, BLOCK], zero beyond them."""
    places, inside = _places(row, count, stride, WIDTH, BLOCK)
    return tl.load(x_ptr + places, mask=inside, other=0.0)


@triton.jit
def load_real_rows(x_ptr, row, count, stride, key_mask_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The same of keys or values, and zero at padding, which may hold NaN."""
    places, inside = _places(row, count, stride, WIDTH, BLOCK)
    if key_mask_ptr is not None:
        inside = inside & (tl.load(key_mask_ptr + row, mask=row < count, other=0) != 0)[:, None]
    return tl.load(x_ptr + places, mask=inside, other=0.0)


@triton.jit
def store_rows(x_ptr, row, count, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store x [rows, BLOCK] as rows of a contiguous (count, WIDTH)."""
    places, inside = _places(row, count, WIDTH, WIDTH, BLOCK)
    tl.store(x_ptr + places, tl.cast(x, x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def masked(
    x,
    other,
    query,
    key,
    keys,
    key_mask_ptr,
    patterns_ptr,
    pattern,
    HAS_PATTERNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x where a query attends to a key, else `other`; one of query and key is [n, 1], the other [1, m], both int64.

    Queries beyond the last count as any: their rows of query and gradient are zero.
    """
    real = key < keys
    if key_mask_ptr is not None:
        real = real & (tl.load(key_mask_ptr + key, mask=real, other=0) != 0)
    x = tl.where(real, x, other)
    if HAS_PATTERNS:  # noqa: SIM102 (known when compiling, which the pattern is not)
        if pattern >= 0:
            place = tl.cast(pattern, tl.int64) * (ROWS * COLUMNS) + (query % ROWS * COLUMNS + key % COLUMNS)
            x = tl.where(tl.load(patterns_ptr + place) != 0, x, other)
    return x


@triton.jit
def locate_queries(
    crow_ptr, queries, HEADS: tl.constexpr, ROWS: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(batch, head, both as one int64, queries of the tile [BM], first stored block, how many) of a program."""
    tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    batch_head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    head = batch_head % HEADS
    mask_row = first // ROWS
    if PER_HEAD:
        mask_row += head * tl.cdiv(queries, ROWS)
    start = tl.load(crow_ptr + mask_row)
    count = tl.load(crow_ptr + mask_row + 1) - start
    return batch_head // HEADS, head, batch_head, tl.cast(first + tl.arange(0, BLOCK_M), tl.int64), start, count


@triton.jit
def _forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    crow_ptr,
    col_ptr,
    index_ptr,
    patterns_ptr,
    key_mask_ptr,
    y_ptr,
    lse_ptr,
    scale,
    queries,
    keys,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    key_stride_b,
    key_stride_h,
    key_stride_l,
    value_stride_b,
    value_stride_h,
    value_stride_l,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_PATTERNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (B, H, Lq, E) and lse (B, H, Lq), both contiguous."""
    batch, head, batch_head, row, start, count = locate_queries(crow_ptr, queries, HEADS, ROWS, PER_HEAD, BLOCK_M)
    q_rows = query_ptr + batch * query_stride_b + head * query_stride_h
    k_rows = key_ptr + batch * key_stride_b + head // GROUP * key_stride_h
    v_rows = value_ptr + batch * value_stride_b + head // GROUP * value_stride_h
    if key_mask_ptr is not None:
        key_mask_ptr += batch * keys
    q = load_rows(q_rows, row, queries, query_stride_l, D, BLOCK_D)  # [BM, BD]
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    steps: tl.constexpr = COLUMNS // BLOCK_N
    for step in range(0, count * steps):
        p = start + step // steps
        key = tl.cast(tl.load(col_ptr + p), tl.int64) * COLUMNS + step % steps * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        k = load_rows(k_rows, key, keys, key_stride_l, D, BLOCK_D)  # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)  # [BM, BN]
        s = masked(
            s,
            float("-inf"),
            row[:, None],
            key[None, :],
            keys,
            key_mask_ptr,
            patterns_ptr,
            tl.load(index_ptr + p),
            HAS_PATTERNS,
            ROWS,
            COLUMNS,
        )
        before = largest
        largest = tl.maximum(largest, tl.max(s, axis=1))
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.exp2(s - safe[:, None])  # [BM, BN]
        shrink = tl.exp2(before - safe)
        total = total * shrink + tl.sum(weight, axis=1)
        v = load_real_rows(v_rows, key, keys, value_stride_l, key_mask_ptr, E, BLOCK_E)  # [BN, BE]
        acc = tl.dot(tl.cast(weight, v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    empty = total == 0
    y = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, float("-inf"), largest * 0.6931471805599453 + tl.log(total))
    store_rows(y_ptr + batch_head * queries * E, row, queries, y, E, BLOCK_E)
    tl.store(lse_ptr + batch_head * queries + row, lse, mask=row < queries)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(context, log-sum-exp) of softmax(scale Q Kᵀ) V over the pairs that the mask keeps; no gradient.

    query            (B, H, Lq, D)    float32, float16 or bfloat16, on CUDA (on CPU where Triton interprets)
    key              (B, Hkv, Lk, D)  dtype of query
    value            (B, Hkv, Lk, E)  dtype of query; D and E at most 256
    crow_indices ... patterns         as in sparsenlp.formats.BlockMask, int32 and bool, contiguous
    key_mask         (B, Lk)          bool, False for padding, or None
    returns          (B, H, Lq, E) in the dtype of query, (B, H, Lq) float32: zeros and -inf without any key

    The content of the indices is trusted. Raises TypeError for a dtype, ValueError for a shape or a device that does
    not fit.
    """
    check(query, key, value, crow_indices, col_indices, pattern_indices, patterns, key_mask)
    y = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if lse.numel():
        mask = (crow_indices, col_indices, pattern_indices, patterns)
        run([plan(query, key, value, *mask, key_mask, scale, y, lse)], query)
    return y, lse


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
    scale: float,
    y: Tensor,
    lse: Tensor,
    device: Device | None = None,
) -> Launch:
    """The launch that fills y and lse, not empty, from arguments that are known to fit."""
    shapes = Shapes(query, key, value, crow_indices, patterns)
    sides = sides_of("forward", shapes, query, device)
    tile = tile_of(shapes, sides["tile"], sides["step"])
    return Launch(
        kernel=_forward_kernel,
        programs=shapes.batch * shapes.heads * triton.cdiv(shapes.queries, tile["BLOCK_M"]),
        arguments=(
            *shapes.rows,
            crow_indices,
            col_indices,
            pattern_indices,
            patterns.view(torch.uint8),
            None if key_mask is None else key_mask.contiguous().view(torch.uint8),
            y,
            lse,
            scale,
            *shapes.sizes,
        ),
        constants={**shapes.constants, **tile},
        options=options_of(shapes, tile, sides),
    )


class Shapes:
    """What the launches of a call share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, crow_indices: Tensor, patterns: Tensor) -> None:
        self.batch, self.heads, self.queries, self.width = query.shape
        _, self.kv_heads, self.keys, self.value_width = value.shape
        self.widest = max(self.width, self.value_width)
        _, self.block_rows, self.block_columns = patterns.shape
        self.mask_heads = (crow_indices.numel() - 1) // triton.cdiv(self.queries, self.block_rows)
        self.rows = tuple(t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        strides = [stride for t in self.rows for stride in t.stride()[:3]]
        self.sizes = (self.queries, self.keys, *strides)
        self.constants: dict[str, int | str] = {
            "HEADS": self.heads,
            "GROUP": self.heads // self.kv_heads,
            "D": self.width,
            "E": self.value_width,
            "BLOCK_D": max(triton.next_power_of_2(self.width), 16),
            "BLOCK_E": max(triton.next_power_of_2(self.value_width), 16),
            "ROWS": self.block_rows,
            "COLUMNS": self.block_columns,
            "PER_HEAD": self.mask_heads > 1,
            "HAS_PATTERNS": patterns.shape[0] > 0,
        }


def tile_of(shapes: Shapes, m: int, n: int) -> dict[str, int]:
    """Sides of a program's tile, powers of two: at most m queries and n keys, and such that they divide a block's."""
    queries = max(triton.next_power_of_2(shapes.queries), 16)
    return {
        "BLOCK_M": min(m, shapes.block_rows & -shapes.block_rows, queries),
        "BLOCK_N": min(n, shapes.block_columns & -shapes.block_columns),
    }


def sides_of(direction: str, shapes: Shapes, query: Tensor, device: Device | None) -> dict[str, int]:
    """A row of the tuned table: the most queries (or keys) of a program's tile, and keys (or queries) of its steps;
    the stages of its pipeline; and `warps`, at least.

    direction  "forward" or "backward", of float32 or half, narrow for widths of up to 64: what fits registers and the
               99 KiB of shared memory of the smallest GPU
    """
    kind = "float32" if query.dtype == torch.float32 else "half"
    width = "narrow" if shapes.widest <= 64 else "wide"
    return tuned("block_sparse_attention", (device or Device.of(query)).arch, f"{direction}_{kind}_{width}")


def options_of(shapes: Shapes, tile: dict[str, int], sides: dict[str, int]) -> dict[str, int | bool]:
    wide = shapes.widest > 128 or tile["BLOCK_M"] > 64
    return compiler_options(8 if wide else sides["warps"], sides["stages"])


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    pattern_indices: Tensor,
    patterns: Tensor,
    key_mask: Tensor | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of block_sparse_attention fit together."""
    op, device = "block_sparse_attention", "cpu" if INTERPRETED else "cuda"
    if query.dtype not in DTYPES:
        raise TypeError(f"{op}: expected query of dtype float32, float16 or bfloat16, got {query.dtype}")
    if query.device.type != device:
        raise ValueError(f"{op}: expected query on {device}, got {query.device}")
    named = {"key": key, "value": value, "patterns": patterns, "crow_indices": crow_indices}
    named |= {"col_indices": col_indices, "pattern_indices": pattern_indices}
    for name, tensor in {**named, **({} if key_mask is None else {"key_mask": key_mask})}.items():
        floating = query.dtype if name in ("key", "value") else torch.bool
        dtype = torch.int32 if name.endswith("indices") else floating
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: expected {name} on {query.device}, got {tensor.device}")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"{op}: expected query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, E)")
    (batch, heads, queries, width), (_, kv_heads, keys, _) = query.shape, key.shape
    if key.shape != (batch, kv_heads, keys, width) or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"{op}: expected key and value beside {tuple(query.shape)}, got {tuple(key.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: expected query heads in multiples of {kv_heads} key heads, got {heads}")
    if not 0 < width <= MOST_WIDTH or not 0 < value.shape[3] <= MOST_WIDTH:
        raise ValueError(f"{op}: expected widths from 1 to {MOST_WIDTH}, got {width} and {value.shape[3]}")
    if patterns.dim() != 3 or any(side < 16 or side % 16 for side in patterns.shape[1:]):
        raise ValueError(f"{op}: expected patterns (P, m, n), m and n multiples of 16, got {tuple(patterns.shape)}")
    if not all(t.is_contiguous() for t in (crow_indices, col_indices, pattern_indices, patterns)):
        raise ValueError(f"{op}: expected the tensors of a mask to be contiguous")
    block_rows = triton.cdiv(queries, patterns.shape[1])
    if crow_indices.shape not in ((block_rows + 1,), (heads * block_rows + 1,)):
        raise ValueError(
            f"{op}: expected crow_indices of {block_rows} block rows for 1 or {heads} heads, "
            f"got shape {tuple(crow_indices.shape)}"
        )
    sizes = {
        "queries": queries,
        "keys": keys,
        "stored blocks": col_indices.numel(),
        "pairs in patterns": patterns.numel(),
        "tiles of 16 queries or keys": batch * heads * triton.cdiv(max(queries, keys), 16),
    }
    check_countable(op, sizes, f"split query of shape {tuple(query.shape)} by batch or heads")
    if key_mask is not None and key_mask.shape != (batch, keys):
        raise ValueError(f"{op}: expected key_mask of shape {(batch, keys)}, got {tuple(key_mask.shape)}")

"""The inputs that tests and benchmarks of block_sparse_attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import TOLERANCES, normal
from torch import Tensor

from sparsenlp.formats import BlockMask
from sparsenlp.reference import block_sparse_attention as reference


@dataclass(frozen=True)
class BlockSparseAttentionCase:
    """`queries` x `keys` (0: as many) of heads x width; `mask` names a function of `block_mask`."""

    queries: int
    keys: int = 0
    mask: str = "window"
    block: tuple[int, int] = (16, 16)
    batch: int = 2
    heads: int = 2
    kv_heads: int = 0  # 0: as many as heads
    width: int = 16
    value_width: int = 0  # 0: as width
    padding: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.queries}x{self.keys or self.queries}", self.mask, "b" + "x".join(map(str, self.block))]
        parts += [f"{self.batch}x{self.heads}:{self.kv_heads or self.heads}"]
        parts += [f"{self.width}:{self.value_width or self.width}", *["padding"] * self.padding]
        parts += [f"scale{self.scale}"] * (self.scale is not None)
        return "-".join(parts + [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32))

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["block_sparse_attention", self.dtype]

    @property
    def grad_tolerance(self) -> dict[str, float]:
        return TOLERANCES["block_sparse_attention_grad", self.dtype]

    def block_mask(self) -> BlockMask:
        keys, sizes = self.keys or self.queries, {"keys": self.keys or self.queries, "block": self.block}
        if self.mask == "causal":
            return BlockMask.causal(self.queries, **sizes)
        if self.mask == "window":
            return BlockMask.sliding_window(self.queries, 20, 9, **sizes)
        if self.mask == "longformer":
            window = BlockMask.sliding_window(self.queries, 20, 9, **sizes)
            return window | BlockMask.global_tokens(self.queries, [0, 3], **sizes)
        if self.mask == "bigbird":
            return BlockMask.bigbird(self.queries, 3, 1, 1, heads=self.heads, **sizes)
        generator = torch.Generator().manual_seed(self.seed)
        share = {"none": 0.0, "random": 0.3, "whole": 2.0}[self.mask]
        dense = torch.rand(self.heads, self.queries, keys, generator=generator) < share
        if self.mask == "random":  # empty blocks, rows and a whole block as well
            dense[:, 5:9] = False
            dense[0, :16, 16:48] = False
            dense[:, 16:32, :16] = True
        return BlockMask.from_dense(dense, self.block)

    def arguments(self) -> dict:
        """Arguments of the op by name; keys and values at padding are NaN."""
        keys, kv_heads = self.keys or self.queries, self.kv_heads or self.heads
        query = normal(self.seed, self.batch, self.heads, self.queries, self.width)
        key = normal(self.seed + 1, self.batch, kv_heads, keys, self.width)
        value = normal(self.seed + 2, self.batch, kv_heads, keys, self.value_width or self.width)
        key_mask = None
        if self.padding:
            key_mask = torch.rand(self.batch, keys, generator=torch.Generator().manual_seed(self.seed)) < 0.7
            key_mask[0, keys // 2 :] = False
            for t in (key, value):
                t.masked_fill_(~key_mask[:, None, :, None], torch.nan)
        return {
            "query": query.to(self.dtype),
            "key": key.to(self.dtype),
            "value": value.to(self.dtype),
            "mask": self.block_mask(),
            "key_mask": key_mask,
            "scale": self.scale,
        }

    def raw_arguments(self, dtype: torch.dtype | None = None) -> tuple:
        """Arguments of the torch.library op, with query, key and value in `dtype`."""
        a = self.arguments()
        mask, scale = a["mask"], self.width**-0.5 if self.scale is None else self.scale
        tensors = (mask.crow_indices, mask.col_indices, mask.pattern_indices, mask.patterns)
        return *(a[n].to(dtype or self.dtype) for n in ("query", "key", "value")), *tensors, a["key_mask"], scale

    def expected(self) -> tuple[Tensor, Tensor]:
        """The context and log-sum-exp that the float64 reference gives for the same rounded inputs."""
        return reference.block_sparse_attention(*self.raw_arguments(torch.float64))

    def grad(self) -> tuple[Tensor, Tensor]:
        """Gradients of the context, in the case's dtype, and of the log-sum-exp, float32, zero where it is -inf."""
        context, lse = self.expected()
        noise = normal(self.seed + 4, *lse.shape).masked_fill(lse.isinf(), 0)
        return normal(self.seed + 3, *context.shape).to(self.dtype), noise

    def expected_grads(self) -> tuple[Tensor, ...]:
        """Gradients of query, key and value by torch's autograd through the float64 reference."""
        query, key, value, *rest = self.raw_arguments(torch.float64)
        leaves = [t.requires_grad_() for t in (query, key, value)]
        outputs = reference.block_sparse_attention(*leaves, *rest)
        return torch.autograd.grad(outputs, leaves, [g.double() for g in self.grad()])


def attention_cases(*arguments: object, **options: object) -> list[BlockSparseAttentionCase]:
    dtypes = (torch.float32, torch.bfloat16)
    return [BlockSparseAttentionCase(*arguments, **options, dtype=dtype) for dtype in dtypes]


MASKS = ("causal", "window", "longformer", "bigbird", "random", "whole", "none")
BLOCK_SPARSE_ATTENTION = [
    *(case for mask in MASKS for case in attention_cases(70, mask=mask)),
    *(case for mask in ("causal", "random", "bigbird") for case in attention_cases(100, mask=mask, block=(32, 32))),
    *(
        case
        for block in ((16, 48), (48, 16), (64, 32))
        for case in attention_cases(130, mask="longformer", block=block)
    ),
    *(case for n in (1, 2, 15, 16, 17, 33, 64) for case in attention_cases(n, mask="causal")),
    *(case for n in (1, 5, 40) for case in attention_cases(n, 90, mask="causal", padding=True)),
    *(case for n in (1, 5, 40) for case in attention_cases(n, 90, mask="random", heads=4, kv_heads=2)),
    *attention_cases(3, 90, mask="random", heads=4, kv_heads=2, width=64, padding=True),
    *(case for width in (1, 3, 8, 20, 33, 64, 128) for case in attention_cases(40, mask="causal", width=width)),
    *(case for w, e in ((4, 24), (33, 2), (16, 40)) for case in attention_cases(40, width=w, value_width=e)),
    *(case for mask in MASKS for case in attention_cases(50, mask=mask, heads=6, kv_heads=2, padding=True)),
    *attention_cases(70, 33, mask="random", scale=0.5),
    *attention_cases(300, mask="window", batch=1, block=(64, 64), width=64),
    *attention_cases(260, mask="causal", batch=1, heads=1, block=(64, 64)),
    *attention_cases(20, batch=0),
]

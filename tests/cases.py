"""The inputs that op tests and benchmarks share: op x shape x pattern x activation, with tolerances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenlp.formats import NM, BlockSparse
from sparsenlp.reference import add_layer_norm as add_layer_norm_reference
from sparsenlp.reference import bsr_linear as reference
from sparsenlp.reference import embed_layer_norm as embed_layer_norm_reference
from sparsenlp.reference import nm_linear as nm_reference

# Largest accepted error per (op, dtype), as for torch.testing.assert_close. Inputs are scaled so that
# outputs are about 1; never loosened to make a kernel pass.
TOLERANCES = {
    ("bsr_linear", torch.float32): {"rtol": 2e-6, "atol": 4e-6},
    ("bsr_linear", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1e-2},
    ("bsr_linear", torch.float16): {"rtol": 2e-3, "atol": 2e-3},
    ("bsr_linear", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("bsr_linear_wgrad", torch.float32): {"rtol": 2e-6, "atol": 1e-5},
    ("bsr_linear_wgrad", torch.bfloat16): {"rtol": 1.6e-2, "atol": 5e-2},
    ("bsr_linear_wgrad", torch.float16): {"rtol": 2e-3, "atol": 6e-3},
    ("nm_linear", torch.float32): {"rtol": 2e-6, "atol": 4e-6},
    ("nm_linear", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1e-2},
    ("nm_linear", torch.float16): {"rtol": 2e-3, "atol": 2e-3},
    ("nm_linear", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("nm_linear_wgrad", torch.float32): {"rtol": 2e-6, "atol": 1e-5},
    ("nm_linear_wgrad", torch.bfloat16): {"rtol": 1.6e-2, "atol": 5e-2},
    ("nm_linear_wgrad", torch.float16): {"rtol": 2e-3, "atol": 6e-3},
    ("add_layer_norm", torch.float32): {"rtol": 1e-6, "atol": 2e-6},
    ("add_layer_norm", torch.bfloat16): {"rtol": 4e-3, "atol": 1e-5},
    ("add_layer_norm", torch.float16): {"rtol": 5e-4, "atol": 1e-5},
    ("add_layer_norm", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("add_layer_norm_grad", torch.float32): {"rtol": 1e-5, "atol": 1e-5},
    ("add_layer_norm_grad", torch.bfloat16): {"rtol": 8e-3, "atol": 1e-4},
    ("embed_layer_norm", torch.float32): {"rtol": 1e-6, "atol": 2e-6},
    ("embed_layer_norm", torch.bfloat16): {"rtol": 4e-3, "atol": 1e-5},
    ("embed_layer_norm", torch.float16): {"rtol": 5e-4, "atol": 1e-5},
    ("embed_layer_norm", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("embed_layer_norm_grad", torch.float32): {"rtol": 1e-5, "atol": 1e-5},
    ("embed_layer_norm_grad", torch.bfloat16): {"rtol": 1.6e-2, "atol": 5e-2},  # torch adds rounded rows
    ("encoder_layer", torch.float32): {"rtol": 1e-5, "atol": 1e-5},
    ("encoder_layer", torch.bfloat16): {"rtol": 2e-2, "atol": 4e-2},
    ("encoder_layer", torch.int8): {"rtol": 2e-2, "atol": 4e-2},
    ("sparse_ffn", torch.float32): {"rtol": 2e-6, "atol": 6e-6},
    ("sparse_ffn", torch.bfloat16): {"rtol": 1.6e-2, "atol": 2e-2},
    ("sparse_ffn", torch.int8): {"rtol": 2e-2, "atol": 4e-2},
    ("dense_attention", torch.float32): {"rtol": 2e-6, "atol": 4e-6},
    ("dense_attention", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1e-2},
    ("block_sparse_attention", torch.float32): {"rtol": 2e-6, "atol": 4e-6},
    ("block_sparse_attention", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1e-2},
    ("block_sparse_attention", torch.float16): {"rtol": 2e-3, "atol": 2e-3},
    ("block_sparse_attention", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
    ("block_sparse_attention_grad", torch.float32): {"rtol": 1e-5, "atol": 2e-5},
    ("block_sparse_attention_grad", torch.bfloat16): {"rtol": 1.6e-2, "atol": 5e-2},
    ("block_sparse_attention_grad", torch.float16): {"rtol": 4e-3, "atol": 1e-2},
    ("block_sparse_attention_grad", torch.float64): {"rtol": 1e-12, "atol": 1e-12},
}


@dataclass(frozen=True)
class BsrLinearCase:
    """x (*tokens, K) times an N x K weight in blocks, of which `density` are stored."""

    tokens: tuple[int, ...]
    rows: int
    columns: int
    block: tuple[int, int]
    density: float = 0.3
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    dtype: torch.dtype = torch.float32
    int8: bool = False
    empty_rows: bool = False
    uneven: bool = False  # rows from full ones to empty ones, whatever the density
    seed: int = 0

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens)) or "vector"
        parts = [tokens, f"{self.rows}x{self.columns}", "b" + "x".join(map(str, self.block)), f"d{self.density:g}"]
        parts += [self.activation] * (self.activation != "none") + ["nobias"] * (not self.bias)
        parts += ["residual"] * self.residual + ["emptyrows"] * self.empty_rows + ["uneven"] * self.uneven
        parts += ["int8"] * self.int8
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        return "-".join(parts)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8 else self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["bsr_linear", self.dtype]

    def weight(self) -> BlockSparse:
        """Random blocks scaled so that a row's dot product has about unit variance."""
        n, k = self.block
        generator = torch.Generator().manual_seed(self.seed)
        density = torch.linspace(1, 0, self.rows // n)[:, None] if self.uneven else self.density
        keep = torch.rand(self.rows // n, self.columns // k, generator=generator) < density
        if self.empty_rows:
            keep[::2] = False
        mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
        scale = 1 / math.sqrt(max(self.columns * self.density, 1))
        dense = torch.randn(self.rows, self.columns, generator=generator) * scale
        weight = BlockSparse.from_dense((dense * mask).to(self.dtype), self.block, mask)
        return weight.quantize() if self.int8 else weight

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*self.tokens, self.columns, generator=generator).to(self.dtype)

    def bias_vector(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.rows, generator=generator).to(self.dtype) if self.bias else None

    def residual_tensor(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 3)
        return torch.randn(*self.tokens, self.rows, generator=generator).to(self.dtype) if self.residual else None

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        weight, bias, residual = self.weight(), self.bias_vector(), self.residual_tensor()
        values = weight.values if self.int8 else weight.values.double()
        bias, residual = (t.double() if t is not None else None for t in (bias, residual))
        tensors = (weight.crow_indices, weight.col_indices, values, bias, self.activation, residual, weight.scales)
        return reference.bsr_linear(self.x().double(), *tensors)


BLOCKS = [
    *((n, k) for n in (1, 2, 4, 8, 16) for k in (1, 2, 4, 8)),
    *((32, 1), (64, 1), (32, 32), (64, 16), (16, 16), (1, 32), (2, 16)),
    *((3, 5), (12, 4), (24, 2), (5, 4), (40, 12)),
]
TOKENS = [1, 2, 3, 5, 8, 9, 16, 17, 33, 47, 64, 65, 130]

BSR_LINEAR = [
    *(BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k)) for n, k in BLOCKS for tokens in (1, 7, 33)),
    *(
        BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k), dtype=torch.bfloat16, residual=tokens == 7)
        for n, k in BLOCKS
        for tokens in (1, 7, 33)
    ),
    *(
        BsrLinearCase((tokens,), 5 * n, 13 * k, (n, k), int8=True, residual=tokens == 7)
        for n, k in BLOCKS
        for tokens in (1, 7, 33)
        if k % 4 == 0
    ),
    *(
        BsrLinearCase((tokens,), 72, columns, block, dtype=dtype, int8=int8)
        for tokens in TOKENS
        for block, columns, dtype, int8 in (
            ((8, 1), 77, torch.float32, False),
            ((8, 1), 77, torch.bfloat16, False),
            ((8, 2), 78, torch.bfloat16, False),
            ((8, 4), 76, torch.float32, True),
            ((8, 4), 76, torch.bfloat16, True),
        )
    ),
    *(
        BsrLinearCase((tokens,), 40, 48, (8, 4), activation=activation, residual=True, dtype=dtype, int8=int8)
        for activation in ("none", "relu", "gelu", "gelu_tanh")
        for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
        for tokens in (1, 40)
    ),
    *(
        BsrLinearCase((tokens,), 40, 48, (8, 4), density=d, dtype=dtype, int8=int8)
        for d in (0.0, 1.0)
        for dtype, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
        for tokens in (1, 40)
    ),
    *(BsrLinearCase((tokens,), 64, 48, (8, 1), empty_rows=True, bias=False) for tokens in (2, 40)),
    BsrLinearCase((40,), 64, 48, (8, 1), empty_rows=True, bias=False, dtype=torch.bfloat16),
    BsrLinearCase((40,), 64, 48, (8, 4), empty_rows=True, bias=False, int8=True),
    BsrLinearCase((2, 3, 5), 32, 24, (4, 1)),
    BsrLinearCase((), 32, 24, (4, 1)),
    BsrLinearCase((0,), 32, 24, (4, 1)),
    BsrLinearCase((3, 0), 32, 24, (8, 1)),
    BsrLinearCase((0,), 32, 24, (4, 4), int8=True),
    BsrLinearCase((128,), 256, 512, (8, 1), density=0.1),
    BsrLinearCase((128,), 256, 512, (8, 2), density=0.1, dtype=torch.bfloat16),
    BsrLinearCase((128,), 256, 512, (8, 4), density=0.1, int8=True),
    *(
        BsrLinearCase((tokens,), 32, 24, (8, 1), dtype=dtype)
        for dtype in (torch.float16, torch.float64)
        for tokens in (1, 20)
    ),
]


@dataclass(frozen=True)
class NMLinearCase:
    """x (*tokens, K) times an N x K weight that keeps n of every m inputs."""

    tokens: tuple[int, ...]
    rows: int
    columns: int
    pattern: tuple[int, int] = (2, 4)
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    dtype: torch.dtype = torch.float32
    int8: bool = False
    seed: int = 0

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens)) or "vector"
        parts = [tokens, f"{self.rows}x{self.columns}", "of".join(map(str, self.pattern))]
        parts += [self.activation] * (self.activation != "none") + ["nobias"] * (not self.bias)
        parts += ["residual"] * self.residual + ["int8"] * self.int8
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        return "-".join(parts)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8 else self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["nm_linear", self.dtype]

    def weight(self) -> NM:
        """Random places and values, scaled so that a row's dot product has about unit variance."""
        n, m = self.pattern
        generator = torch.Generator().manual_seed(self.seed)
        groups = torch.randn(self.rows, self.columns // m, m, generator=generator)
        kept = torch.rand(groups.shape, generator=generator).argsort(dim=2) < n
        dense = (groups * kept).flatten(1) / math.sqrt(max(self.columns * n / m, 1))
        weight = NM.from_dense(dense.to(self.dtype), self.pattern)
        return weight.quantize() if self.int8 else weight

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*self.tokens, self.columns, generator=generator).to(self.dtype)

    def bias_vector(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.rows, generator=generator).to(self.dtype) if self.bias else None

    def residual_tensor(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 3)
        return torch.randn(*self.tokens, self.rows, generator=generator).to(self.dtype) if self.residual else None

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        weight, bias, residual = self.weight(), self.bias_vector(), self.residual_tensor()
        bias, residual = (t.double() if t is not None else None for t in (bias, residual))
        values = weight.values if self.int8 else weight.values.double()
        tensors = (values, weight.indices, weight.pattern, bias, self.activation, residual, weight.scales)
        return nm_reference.nm_linear(self.x().double(), *tensors)


PATTERNS = [(2, 4), (1, 4), (4, 8)]

NM_LINEAR = [
    *(
        NMLinearCase((tokens,), 37, columns, pattern, dtype=dtype, residual=tokens == 7)
        for pattern, columns in (((2, 4), 204), ((1, 4), 204), ((4, 8), 200))
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (1, 2, 4, 7, 8, 16, 17, 33, 65, 130)
    ),
    *(
        NMLinearCase((tokens,), rows, columns, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, columns in ((1, 4), (16, 128), (600, 36), (5, 1000))
        for tokens in (1, 40)
    ),
    *(
        NMLinearCase((tokens,), 40, 48, activation=activation, residual=True, dtype=dtype)
        for activation in ("none", "relu", "gelu", "gelu_tanh")
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (1, 40)
    ),
    NMLinearCase((2, 3, 7), 32, 24, bias=False),
    NMLinearCase((), 32, 24),
    NMLinearCase((0,), 32, 24),
    NMLinearCase((3, 0), 32, 24),
    NMLinearCase((5,), 0, 24),
    *(
        NMLinearCase(tokens, 40, 48, residual=True, activation="gelu", dtype=dtype, int8=True)
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in ((1,), (20,), (0,))
    ),
    *(
        NMLinearCase((tokens,), 32, 24, pattern, dtype=dtype)
        for dtype in (torch.float16, torch.float64)
        for pattern in PATTERNS
        for tokens in (1, 20)
    ),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def below(seed: int, bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class AddLayerNormCase:
    """x (*tokens, H), its rows scaled and shifted at random, and a residual."""

    tokens: tuple[int, ...]
    hidden: int
    residual: bool = True
    bias: bool = True
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.tokens)) or "vector", str(self.hidden)]
        parts += ["noresidual"] * (not self.residual) + ["nobias"] * (not self.bias)
        parts += [f"eps{self.eps:g}"] * (self.eps != 1e-5)
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        return "-".join(parts)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["add_layer_norm", self.dtype]

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, float]:
        """x, residual, weight, bias, eps"""
        shape = (*self.tokens, self.hidden)
        x = normal(self.seed, *shape) * (1 + normal(self.seed + 1, *self.tokens, 1).abs())
        x = x + normal(self.seed + 2, *self.tokens, 1)
        residual = normal(self.seed + 3, *shape).to(self.dtype) if self.residual else None
        weight = (1 + normal(self.seed + 4, self.hidden) / 4).to(self.dtype)
        bias = normal(self.seed + 5, self.hidden).to(self.dtype) if self.bias else None
        return x.to(self.dtype), residual, weight, bias, self.eps

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        *tensors, eps = self.arguments()
        return add_layer_norm_reference.add_layer_norm(*(t.double() if t is not None else None for t in tensors), eps)


HIDDEN = [2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 100, 384, 768, 1031]

ADD_LAYER_NORM = [
    *(
        AddLayerNormCase((5,), hidden, residual=residual, dtype=dtype)
        for hidden in HIDDEN
        for residual in (True, False)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        AddLayerNormCase(tokens, 65, bias=len(tokens) != 1, dtype=dtype)
        for tokens in ((), (1,), (0,), (3, 0), (2, 3, 5), (300,))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(AddLayerNormCase((4,), 40, eps=eps) for eps in (1e-12, 1.0)),
    *(AddLayerNormCase((4,), 40, dtype=dtype) for dtype in (torch.float16, torch.float64)),
    AddLayerNormCase((4,), 1),
]


@dataclass(frozen=True)
class EmbedLayerNormCase:
    """ids (*batch, S) of a vocabulary of 50, with positions and token types as `positions` and `types` say."""

    batch: tuple[int, ...]
    length: int
    hidden: int
    positions: str = "default"  # "none", "default", "given", "shared" by all sequences, or "counted"
    types: str = "given"  # "none", "default", "given" or "shared" by all sequences
    bias: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            "x".join(map(str, (*self.batch, self.length))),
            str(self.hidden),
            self.positions,
            f"types_{self.types}",
        ]
        parts += ["nobias"] * (not self.bias)
        parts += [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32)
        return "-".join(parts)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["embed_layer_norm", self.dtype]

    def arguments(self) -> dict[str, object]:
        """Arguments of embed_layer_norm by name."""
        shape, rows = (*self.batch, self.length), self.length + 4
        ids = below(self.seed, 50, *shape)
        if self.positions == "counted":
            ids = torch.where(below(self.seed + 1, 3, *shape) == 0, 1, ids)  # a third is padding, anywhere
        position_ids = {"given": (*shape,), "shared": (1, self.length)}.get(self.positions)
        type_ids = {"given": (*shape,), "shared": (self.length,)}.get(self.types)
        return {
            "ids": ids,
            "word": normal(self.seed + 2, 50, self.hidden).to(self.dtype),
            "position": normal(self.seed + 3, rows, self.hidden).to(self.dtype) if self.positions != "none" else None,
            "token_type": normal(self.seed + 4, 3, self.hidden).to(self.dtype) if self.types != "none" else None,
            "position_ids": below(self.seed + 5, rows, *position_ids) if position_ids is not None else None,
            "token_type_ids": below(self.seed + 6, 3, *type_ids) if type_ids is not None else None,
            "weight": (1 + normal(self.seed + 7, self.hidden) / 4).to(self.dtype),
            "bias": normal(self.seed + 8, self.hidden).to(self.dtype) if self.bias else None,
            "eps": 1e-12,
            "padding_idx": 1 if self.positions == "counted" else None,
        }

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        arguments = self.arguments()
        return embed_layer_norm_reference.embed_layer_norm(
            **{n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
        )


EMBED_LAYER_NORM = [
    *(
        EmbedLayerNormCase((2,), 6, 40, positions, types, dtype=dtype)
        for positions in ("none", "default", "given", "shared", "counted")
        for types in ("none", "default", "given", "shared")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        EmbedLayerNormCase((2,), 5, hidden, dtype=dtype)
        for hidden in HIDDEN
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        EmbedLayerNormCase(batch, length, 65, positions, bias=length != 1)
        for positions in ("default", "counted")
        for batch, length in (((), 7), ((3,), 0), ((0,), 7), ((2, 3), 5), ((1,), 1), ((4,), 90))
    ),
    *(EmbedLayerNormCase((2,), 6, 40, dtype=dtype) for dtype in (torch.float16, torch.float64)),
]

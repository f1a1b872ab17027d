"""The layers and parts of layers that tests of the fused encoder share, with what they should give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from cases import TOLERANCES, normal
from torch import Tensor

from sparsenlp.formats import BlockSparse
from sparsenlp.formats.encoder import EncoderWeights, SparseProjection
from sparsenlp.ops.encoder_layer import arguments as encoder_arguments
from sparsenlp.reference import dense_attention as attention_reference
from sparsenlp.reference import encoder_layer as encoder_reference
from sparsenlp.reference import sparse_ffn as ffn_reference
from sparsenlp.reference.bsr_linear import ACTIVATIONS


def random_projection(
    case: EncoderLayerCase | SparseFfnCase, rows: int, columns: int, generator: torch.Generator
) -> SparseProjection:
    """Blocks as the case has them, scaled so that a row's dot product has about unit variance."""
    n, k = case.block
    keep = torch.rand(rows // n, columns // k, generator=generator) < case.density
    keep[: len(keep) * case.empty_rows : 2] = False
    mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
    dense = torch.randn(rows, columns, generator=generator) / math.sqrt(max(columns * case.density, 1))
    dtype = torch.bfloat16 if case.weight_dtype == torch.bfloat16 else torch.float32
    weight = BlockSparse.from_dense((dense * mask).to(dtype), case.block, mask)
    bias = torch.randn(rows, generator=generator)
    return SparseProjection(weight.quantize() if case.weight_dtype == torch.int8 else weight, bias)


@dataclass(frozen=True)
class EncoderLayerCase:
    """One layer on sequences of `lengths`, padded to the longest; heads by their (query, value) dimensions."""

    lengths: tuple[int, ...]
    hidden: int = 32
    heads: tuple[tuple[int, int], ...] = ((16, 16), (16, 16))
    neurons: int = 64
    block: tuple[int, int] = (8, 1)
    tile: int = 16
    density: float = 0.3
    activation: str = "gelu"
    pre_norm: bool = False
    position_bias: bool = False
    empty_rows: bool = False
    weight_dtype: torch.dtype = torch.float32
    precision: str = "float32"
    seed: int = 0

    def __str__(self) -> str:
        heads = "+".join(f"{q}:{v}" for q, v in self.heads) or "none"
        parts = ["_".join(map(str, self.lengths)), f"H{self.hidden}", f"heads{heads}", f"F{self.neurons}"]
        parts += ["b" + "x".join(map(str, self.block)), f"T{self.tile}", f"d{self.density:g}", self.activation]
        parts += ["pre"] * self.pre_norm + ["bias"] * self.position_bias + ["emptyrows"] * self.empty_rows
        parts += [str(self.weight_dtype).removeprefix("torch.")] * (self.weight_dtype != torch.float32)
        return "-".join(parts + [self.precision] * (self.precision != "float32"))

    @property
    def tolerance(self) -> dict[str, float]:
        """By what is rounded on the way; rounded weights alone are those of the expected result too."""
        rounded = torch.int8 if self.weight_dtype == torch.int8 else getattr(torch, self.precision)
        return TOLERANCES["encoder_layer", rounded]

    @property
    def length(self) -> int:
        return max(self.lengths)

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(len(self.lengths), self.length, self.hidden, generator=generator)

    def mask(self) -> Tensor:
        return torch.arange(self.length) < torch.tensor(self.lengths)[:, None]

    def bias(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (len(self.heads), self.length, self.length)
        return torch.randn(shape, generator=generator) if self.position_bias else None

    def weights(self) -> EncoderWeights:
        generator = torch.Generator().manual_seed(self.seed + 2)

        def projection(rows: int, columns: int) -> SparseProjection:
            return random_projection(self, rows, columns, generator)

        def norm() -> tuple[Tensor, Tensor]:
            weight, bias = torch.randn(2, self.hidden, generator=generator)
            return 1 + 0.1 * weight, 0.1 * bias

        query_rows, value_rows = ((0, *accumulate(head[i] for head in self.heads)) for i in (0, 1))
        return EncoderWeights(
            query=projection(query_rows[-1], self.hidden),
            key=projection(query_rows[-1], self.hidden),
            value=projection(value_rows[-1], self.hidden),
            output=projection(self.hidden, value_rows[-1]),
            fc1=projection(self.neurons, self.hidden),
            fc2=projection(self.hidden, self.neurons),
            norm1=norm(),
            norm2=norm(),
            query_rows=query_rows,
            value_rows=value_rows,
            scale=0.25,
            activation=self.activation,
            pre_norm=self.pre_norm,
        )

    def expected(self) -> Tensor:
        """(B, S, H) float64: what the reference gives in float64 for the same weights, zeros at padding."""
        stream, spans = encoder_reference.encoder_pack(self.x(), self.mask(), self.tile)
        arguments = encoder_arguments(self.weights())
        y = encoder_reference.encoder_layer(stream.double(), spans, *arguments, self.bias())
        return encoder_reference.encoder_unpack(y, spans, len(self.lengths), self.length, torch.float64)


RAGGED = (5, 1, 17, 30)
ENCODER_DTYPES = [  # of the weights, precision inside, what the width of a block must be a multiple of
    (torch.float32, "float32", 1),
    (torch.bfloat16, "float32", 1),
    (torch.bfloat16, "bfloat16", 1),
    (torch.int8, "float32", 4),
    (torch.int8, "bfloat16", 4),
]


def encoder_cases(**options: object) -> list[EncoderLayerCase]:
    """A case with these options for every dtype of weights and precision."""
    settings: dict = {"lengths": RAGGED, "block": (8, 4)} | options
    return [
        EncoderLayerCase(**settings, weight_dtype=dtype, precision=precision)
        for dtype, precision, unit in ENCODER_DTYPES
        if settings["block"][1] % unit == 0
    ]


ENCODER_LAYER = [
    *(case for block in ((8, 1), (8, 2), (8, 4), (8, 8), (16, 16)) for case in encoder_cases(block=block)),
    *encoder_cases(block=(8, 32), density=1.0),
    *(
        case
        for tile in (16, 32)
        for lengths in ((1,), (16,), (33, 33))
        for case in encoder_cases(lengths=lengths, tile=tile)
    ),
    *(case for activation in ACTIVATIONS for case in encoder_cases(activation=activation)),
    *(case for pre_norm in (False, True) for case in encoder_cases(pre_norm=pre_norm, position_bias=True, tile=32)),
    *encoder_cases(heads=((8, 16), (24, 8), (16, 32)), position_bias=True),
    *encoder_cases(heads=((8, 0), (0, 8))),
    *encoder_cases(heads=()),
    *encoder_cases(neurons=0, pre_norm=True),
    *encoder_cases(heads=(), neurons=0),
    *encoder_cases(empty_rows=True),
    *encoder_cases(density=0.0),
    *encoder_cases(hidden=128, heads=((64, 64), (64, 64)), neurons=256, lengths=(70, 3, 129)),
]


@dataclass(frozen=True)
class SparseFfnCase:
    """x (*tokens, hidden) through fc1 (neurons, hidden) and fc2 (outputs, neurons)."""

    tokens: tuple[int, ...]
    hidden: int = 32
    neurons: int = 64
    outputs: int = 32
    block: tuple[int, int] = (8, 4)
    density: float = 0.3
    activation: str = "gelu"
    empty_rows: bool = False
    weight_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.tokens)) or "vector", f"{self.hidden}-{self.neurons}-{self.outputs}"]
        parts += ["b" + "x".join(map(str, self.block)), f"d{self.density:g}", self.activation]
        parts += ["emptyrows"] * self.empty_rows + [str(self.weight_dtype).removeprefix("torch.")]
        return "-".join(parts + [f"x_{str(self.dtype).removeprefix('torch.')}"] * (self.dtype != torch.float32))

    @property
    def tolerance(self) -> dict[str, float]:
        """By what is rounded on the way: x and y, or hidden features to int8."""
        return TOLERANCES["sparse_ffn", torch.int8 if self.weight_dtype == torch.int8 else self.dtype]

    def x(self) -> Tensor:
        return normal(self.seed, *self.tokens, self.hidden).to(self.dtype)

    def weights(self) -> tuple[SparseProjection, SparseProjection]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        fc1 = random_projection(self, self.neurons, self.hidden, generator)
        return fc1, random_projection(self, self.outputs, self.neurons, generator)

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs and weights."""
        fc1, fc2 = self.weights()
        return ffn_reference.sparse_ffn(self.x().double(), fc1.tensors(), fc2.tensors(), self.activation)


def ffn_cases(tokens: int | tuple[int, ...] = 33, **options: object) -> list[SparseFfnCase]:
    """A case with these options for every dtype of weights and x."""
    settings: dict = {"tokens": (tokens,) if isinstance(tokens, int) else tokens, "block": (8, 4)} | options
    return [
        SparseFfnCase(**settings, weight_dtype=weight_dtype, dtype=dtype)
        for weight_dtype in (torch.float32, torch.bfloat16, torch.int8)
        for dtype in (torch.float32, torch.bfloat16)
        if weight_dtype != torch.int8 or settings["block"][1] % 4 == 0
    ]


SPARSE_FFN = [
    *(case for tokens in (1, 15, 16, 17, 32, 33, 48, 65, 130) for case in ffn_cases(tokens)),
    *(case for tokens in ((), (0,), (3, 0), (2, 3, 5)) for case in ffn_cases(tokens)),
    *(case for block in ((8, 1), (8, 2), (8, 8), (16, 16), (4, 1), (1, 1)) for case in ffn_cases(block=block)),
    *ffn_cases(block=(3, 5), hidden=35, neurons=45, outputs=12),
    *ffn_cases(block=(5, 4), hidden=20, neurons=60, outputs=85),
    *(case for activation in ACTIVATIONS for case in ffn_cases(40, activation=activation)),
    *(case for density in (0.0, 1.0) for case in ffn_cases(density=density)),
    *ffn_cases(empty_rows=True),
    *ffn_cases(neurons=0),
    *ffn_cases(hidden=256, neurons=512, outputs=128, block=(8, 4), density=0.1, tokens=100),
]


@dataclass(frozen=True)
class DenseAttentionCase:
    """Sequences of `lengths` tokens, padded to the longest; `width` and `value_width` are those of a head."""

    lengths: tuple[int, ...]
    heads: int = 2
    width: int = 16
    value_width: int = 16
    position_bias: bool = False
    holes: bool = False  # padding is anywhere in a sequence, not at its end
    views: bool = False  # of one tensor with queries, keys and values side by side
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        widths = f"{self.heads}x{self.width}:{self.value_width}"
        parts = ["_".join(map(str, self.lengths)) or "none", widths]
        parts += ["bias"] * self.position_bias + ["holes"] * self.holes + ["views"] * self.views
        parts += [f"scale{self.scale}"] * (self.scale is not None)
        return "-".join(parts + [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float32))

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES["dense_attention", self.dtype]

    def mask(self) -> Tensor:
        length = max(self.lengths, default=5)
        order = torch.arange(length)
        if self.holes:
            order = order[torch.randperm(length, generator=torch.Generator().manual_seed(self.seed))]
        return order < torch.tensor(self.lengths, dtype=torch.int64)[:, None]

    def arguments(self) -> dict:
        """Arguments of dense_attention by name; padding holds NaN."""
        mask = self.mask()
        widths = [self.heads * w for w in (self.width, self.width, self.value_width)]
        together = normal(self.seed, *mask.shape, sum(widths)).to(self.dtype)
        together[~mask] = torch.nan
        query, key, value = (
            together.split(widths, dim=2) if self.views else (t.clone() for t in together.split(widths, 2))
        )
        bias = normal(self.seed + 1, self.heads, mask.shape[1], mask.shape[1]) if self.position_bias else None
        return {
            "query": query,
            "key": key,
            "value": value,
            "heads": self.heads,
            "mask": None if bool(mask.all()) else mask,
            "scale": self.scale,
            "position_bias": bias,
        }

    def expected(self) -> Tensor:
        """What the float64 reference gives for the same rounded inputs."""
        names = ("query", "key", "value")
        arguments = {n: t.double() if n in names else t for n, t in self.arguments().items()}
        scale = self.width**-0.5 if self.scale is None else self.scale
        return attention_reference.dense_attention(**arguments | {"scale": scale})


def attention_cases(*lengths: int, **options: object) -> list[DenseAttentionCase]:
    return [DenseAttentionCase(lengths, **options, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]


DENSE_ATTENTION = [
    *(case for length in (1, 2, 15, 16, 17, 31, 32, 33, 48, 65, 129, 300) for case in attention_cases(length)),
    *(
        case
        for width in (1, 3, 5, 8, 20, 64, 100, 256)
        for case in attention_cases(40, 7, width=width, value_width=width)
    ),
    *(case for widths in ((4, 24), (33, 2)) for case in attention_cases(20, width=widths[0], value_width=widths[1])),
    *attention_cases(20, value_width=0),
    *(case for lengths in ((5, 1, 17, 30), (33, 33), (1, 1), (140, 3)) for case in attention_cases(*lengths)),
    *(case for lengths in ((5, 0, 17), (0,), (0, 0)) for case in attention_cases(*lengths)),
    *(case for lengths in ((), (0, 30, 0)) for case in attention_cases(*lengths, views=True)),
    *(
        case
        for holes in (False, True)
        for bias in (False, True)
        for case in attention_cases(50, 9, 0, 36, holes=holes, position_bias=bias, views=True)
    ),
    *(case for views in (False, True) for case in attention_cases(70, 70, 70, heads=3, views=views, scale=0.3)),
    *attention_cases(200, 180, heads=1, width=64, value_width=64, position_bias=True),
]

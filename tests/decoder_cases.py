"""Random decoder stacks for the tests of decoder_layers: weights, tokens, a cache and what float64 gives for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsenlp.formats import BlockSparse
from sparsenlp.formats.decoder import DecoderLayerWeights, DecoderProjection, DecoderWeights
from sparsenlp.reference import decoder_layers as reference

# As in cases.py, for a stack of two layers. int8 compares with a reference that rounds activations alike, but what
# lies beside a rounding boundary may fall on either side of it, a layer's step of the activations.
TOLERANCES = {
    (torch.float32, False): {"rtol": 1e-5, "atol": 2e-5},
    (torch.bfloat16, False): {"rtol": 3e-2, "atol": 6e-2},
    (torch.float32, True): {"rtol": 2e-2, "atol": 4e-2},
    (torch.bfloat16, True): {"rtol": 4e-2, "atol": 8e-2},
}


@dataclass(frozen=True)
class DecoderCase:
    """B sequences of T new tokens after `past`, in 2 layers of hidden size H."""

    batch: int = 1
    length: int = 1
    past: int = 5
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 64
    block: tuple[int, int] = (8, 2)
    density: float = 0.4
    activation: str = "silu"
    gated: bool = True
    one_input: bool = False
    layer_norm: bool = False
    bias: bool = False
    rotary: bool = True
    padded: bool = False
    dense: bool = False
    dtype: torch.dtype = torch.float32
    int8: bool = False
    layers: int = 2
    seed: int = 0

    def __str__(self) -> str:
        default = DecoderCase()
        names = ("past", "hidden", "heads", "kv_heads", "head_dim", "inner", "block", "density", "activation", "dtype")
        flags = ("gated", "one_input", "layer_norm", "bias", "rotary", "padded", "dense", "int8")
        parts = [f"{self.batch}x{self.length}"]
        parts += [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        parts += [("" if getattr(self, n) else "no_") + n for n in flags if getattr(self, n) != getattr(default, n)]
        return "-".join(parts).replace("torch.", "").replace(" ", "")

    @property
    def tolerance(self) -> dict[str, float]:
        return TOLERANCES[self.dtype, self.int8]

    def weights(self) -> DecoderWeights:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def projection(rows: int, columns: int) -> DecoderProjection:
            n, k = self.block
            bias = random(rows).to(self.dtype) if self.bias else None
            weight = random(rows, columns) / (columns * (1 if self.dense else max(self.density, 0.1))) ** 0.5
            if self.dense:
                return DecoderProjection(weight.to(self.dtype), bias)
            keep = torch.rand(rows // n, columns // k, generator=generator) < self.density
            mask = keep.repeat_interleave(n, 0).repeat_interleave(k, 1)
            sparse = BlockSparse.from_dense((weight * mask).to(self.dtype), self.block, mask)
            return DecoderProjection(sparse.quantize() if self.int8 else sparse, bias)

        def norm() -> tuple[Tensor, Tensor | None]:
            weight = (1 + random(self.hidden) / 4).to(self.dtype)
            return weight, random(self.hidden).to(self.dtype) if self.layer_norm else None

        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = (query + 2 * key,) if self.one_input else (query, key, key)
        layers = tuple(
            DecoderLayerWeights(
                inputs=tuple(projection(n, self.hidden) for n in rows),
                output=projection(self.hidden, query),
                up=projection(self.inner, self.hidden),
                down=projection(self.hidden, self.inner),
                norm1=norm(),
                norm2=norm(),
                gate=projection(self.inner, self.hidden) if self.gated else None,
            )
            for _ in range(self.layers)
        )
        return DecoderWeights(layers, norm(), self.heads, self.head_dim**-0.5, self.activation, 1e-5)

    def inputs(self) -> dict[str, Any]:
        """x, cache, past, rope, positions and mask; what the cache has no token for is NaN."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (2, self.layers, self.batch, self.kv_heads, self.past + self.length + 3, self.head_dim)
        cache = torch.randn(shape, generator=generator).to(self.dtype)
        cache[..., self.past :, :] = torch.nan
        positions = torch.randint(0, 40, (self.batch, self.length), generator=generator)
        angles = torch.randn(40, self.head_dim // 2, generator=generator)
        mask = None
        if self.padded:
            mask = torch.rand(self.batch, self.past + self.length, generator=generator) < 0.7
            mask[-1] = False
        return {
            "x": torch.randn(self.batch, self.length, self.hidden, generator=generator).to(self.dtype),
            "cache": cache,
            "past": self.past,
            "rope": torch.cat([angles.cos(), angles.sin()], dim=1) if self.rotary else None,
            "positions": positions if self.rotary else None,
            "mask": mask,
        }

    def expected(self) -> tuple[Tensor, Tensor]:
        """(y, cache) of the float64 reference."""
        weights, inputs = self.weights(), self.inputs()
        tensors = weights.lists()

        def double(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        lists = {f: [double(t) for t in v] for f, v in tensors._asdict().items() if f not in ("scales", "crow_indices")}
        tensors = tensors._replace(**{f: v for f, v in lists.items() if f != "col_indices"})
        x, cache = inputs["x"].double(), inputs["cache"].double()
        others = (inputs["rope"], inputs["positions"], inputs["mask"])
        settings = (weights.heads, weights.scale, weights.activation, weights.eps)
        y = reference.decoder_layers(x, cache, inputs["past"], *tensors, *settings, *others)
        return y, cache


_LLAMA = DecoderCase()
_GPT2 = DecoderCase(
    kv_heads=4, one_input=True, layer_norm=True, bias=True, rotary=False, gated=False, activation="gelu_tanh"
)
_SHAPES = [
    *(
        replace(base, batch=batch, length=length, past=past)
        for base in (_LLAMA, _GPT2)
        for batch, length, past in ((1, 1, 0), (1, 1, 33), (3, 1, 17), (1, 8, 0), (2, 5, 3), (2, 20, 0))
    ),
    *(
        replace(_LLAMA, batch=batch, length=length, past=past, padded=True)
        for batch, length, past in ((1, 1, 20), (3, 1, 33), (2, 7, 4))
    ),
    *(
        replace(_LLAMA, head_dim=head_dim, heads=heads, kv_heads=kv_heads, past=21)
        for head_dim, heads, kv_heads in ((64, 3, 1), (128, 1, 1), (96, 2, 2), (80, 2, 1), (8, 4, 4), (20, 2, 2))
    ),
    *(
        replace(_LLAMA, activation=activation, gated=gated)
        for activation in ("silu", "relu", "gelu", "gelu_tanh")
        for gated in (True, False)
    ),
    replace(_LLAMA, one_input=True),
    replace(_LLAMA, bias=True, batch=2, length=2),
    replace(_GPT2, gated=True, one_input=False),
    replace(_LLAMA, dense=True, length=3),
    replace(_LLAMA, dense=True, hidden=47, heads=2, head_dim=6, kv_heads=1, inner=37),
    replace(_LLAMA, head_dim=10, block=(2, 2), past=21),
    replace(_LLAMA, hidden=50, inner=35, block=(1, 1), head_dim=10),
    replace(_LLAMA, density=0.0, bias=True),
    replace(_LLAMA, density=0.05),
    replace(_LLAMA, hidden=80, block=(16, 2)),
    replace(_LLAMA, batch=0),
    replace(_LLAMA, length=0),
    replace(_LLAMA, layers=0),
]

DECODER_LAYERS = [
    *_SHAPES,
    *(replace(case, dtype=torch.bfloat16) for case in _SHAPES),
    *(
        replace(case, int8=True, block=(8, 4), dtype=dtype)
        for case in (_LLAMA, replace(_LLAMA, batch=2, length=9), _GPT2)
        for dtype in (torch.float32, torch.bfloat16)
    ),
]

"""A linear layer that stores and multiplies only n of every m neighbouring inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import NM
from ..formats.nm import INDEX_DTYPE, validate
from ..ops.bsr_linear import ACTIVATIONS
from ..ops.nm_linear import call, pack
from .compressed_linear import CompressedLinear
from .incoming import take_incoming


class NMLinear(CompressedLinear):
    """y = act(x Wᵀ + b + residual), (..., in_features) -> (..., out_features), W in the N:M `pattern`.

    The state dict holds the names of the format: values and indices (N, K / m * n), bias, and for a `quantized` layer
    (int8 values, see `quantize`) scales. Kernels read
    the values as they are, so training changes them in place; `packed`, a buffer outside of the state dict,
    is the indices as kernels read them. It is made when the layer gets its indices: by `from_dense`,
    `from_weight` or `load_state_dict`. The indices are fixed from then on.

    A new layer is allocated with no content; use one of those to fill it.
    """

    content = ("values", "indices")
    index_dtype = INDEX_DTYPE

    indices: Tensor
    packed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: tuple[int, int] = (2, 4),
        bias: bool = True,
        activation: str = "none",
        quantized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n, m = pattern
        if not 0 < n <= m:
            raise ValueError(f"NMLinear: expected a pattern with 0 < n <= m, got {n}:{m}")
        if in_features % m:
            raise ValueError(f"NMLinear: expected in_features divisible by {m}, got {in_features}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"NMLinear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = (n, m)
        self.activation = activation
        self.input_scale: float | None = None
        stored = (out_features, in_features // m * n)
        first = torch.arange(n, dtype=INDEX_DTYPE, device=device).repeat(out_features, in_features // m)
        self.register_buffer("indices", first)
        self.register_buffer("packed", pack(first, self.pattern), persistent=False)
        values = torch.empty(stored, device=device, dtype=torch.int8 if quantized else dtype)
        self.values = nn.Parameter(values, requires_grad=not quantized)
        self.register_buffer("scales", torch.ones(out_features, device=device) if quantized else None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_load_state_dict_pre_hook(take_incoming)
        self.register_load_state_dict_post_hook(_pack_loaded)

    @classmethod
    def from_weight(cls, weight: NM, bias: Tensor | None = None, activation: str = "none") -> NMLinear:
        """Wrap an N:M weight (validated here) and an optional bias of shape (N,)."""
        weight.validate()
        rows, columns = weight.shape
        quantized = weight.scales is not None
        cls._check_bias(weight, bias)
        layer = cls(columns, rows, weight.pattern, bias is not None, activation, quantized, device="meta")
        layer.indices = weight.indices
        layer.packed = pack(weight.indices, weight.pattern)
        layer.scales = weight.scales
        layer.values = nn.Parameter(weight.values.detach().contiguous(), requires_grad=not quantized)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: tuple[int, int] = (2, 4), activation: str = "none") -> NMLinear:
        """Store the nonzeros of `linear`, at most n in each group of m.

        The bias is shared with `linear`; training mode and requires_grad carry over.
        """
        return cls._replacing(linear, NM.from_dense(linear.weight.detach(), pattern), activation)

    def _weight(self) -> NM:
        return NM(self.values, self.indices, (self.out_features, self.in_features), self.pattern, self.scales)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # nn.Module.__getattr__ costs as much as a small kernel, so the tensors are taken from their dicts.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return call(
            x,
            parameters["values"],
            buffers["indices"],
            buffers["packed"],
            self.pattern,
            self.in_features,
            parameters["bias"],
            self.activation,
            residual,
            buffers["scales"],
            self.input_scale,
        )

    def check_content(self, tensors: dict[str, Tensor], scales: Tensor | None) -> None:
        validate(**tensors, shape=(self.out_features, self.in_features), pattern=self.pattern, scales=scales)

    def _format_repr(self) -> str:
        n, m = self.pattern
        return f"pattern={n}:{m}"


def _pack_loaded(module: NMLinear, _: Any) -> None:
    module.packed = pack(module.indices, module.pattern)

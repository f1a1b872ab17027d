"""A linear layer that stores and multiplies only the nonzero blocks of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BlockSparse
from ..formats.block import INDEX_DTYPE, validate
from ..ops.bsr_linear import ACTIVATIONS, call
from .compressed_linear import CompressedLinear
from .incoming import take_incoming


class SparseLinear(CompressedLinear):
    """y = act(x Wᵀ + b + residual), (..., in_features) -> (..., out_features), W in BSR blocks of `block`.

    The state dict holds BSR's own names: values (nnzb, n, k), crow_indices, col_indices and bias, and for a
    `quantized` layer (int8 values, see `quantize`) scales. Kernels read them as they are.

    `nnz_blocks` blocks are allocated with no content; use `from_dense`, `from_weight` or
    `load_state_dict` to fill them.
    """

    content = ("crow_indices", "col_indices", "values")
    index_dtype = INDEX_DTYPE

    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: tuple[int, int],
        nnz_blocks: int,
        bias: bool = True,
        activation: str = "none",
        quantized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n, _ = block
        if activation not in ACTIVATIONS:
            raise ValueError(f"SparseLinear: expected an activation among {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.block = tuple(block)
        self.activation = activation
        self.input_scale: float | None = None
        self.register_buffer("crow_indices", torch.zeros(out_features // n + 1, dtype=INDEX_DTYPE, device=device))
        self.register_buffer("col_indices", torch.zeros(nnz_blocks, dtype=INDEX_DTYPE, device=device))
        values = torch.empty(nnz_blocks, *block, device=device, dtype=torch.int8 if quantized else dtype)
        self.values = nn.Parameter(values, requires_grad=not quantized)
        self.register_buffer("scales", torch.ones(out_features, device=device) if quantized else None)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_load_state_dict_pre_hook(take_incoming)

    @classmethod
    def from_weight(cls, weight: BlockSparse, bias: Tensor | None = None, activation: str = "none") -> SparseLinear:
        """Wrap a BSR weight (validated here) and an optional bias of shape (N,)."""
        weight.validate()
        rows, cols = weight.shape
        quantized = weight.scales is not None
        cls._check_bias(weight, bias)
        layer = cls(cols, rows, weight.block, 0, bias is not None, activation, quantized, device="meta")
        layer.crow_indices = weight.crow_indices
        layer.col_indices = weight.col_indices
        layer.scales = weight.scales
        layer.values = nn.Parameter(weight.values.detach().contiguous(), requires_grad=not quantized)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, block: tuple[int, int], mask: Tensor | None = None, activation: str = "none"
    ) -> SparseLinear:
        """Store the blocks of `linear` that hold a nonzero, or those that `mask` (N, K) touches.

        The bias is shared with `linear`; training mode and requires_grad carry over.
        """
        weight = linear.weight.detach()
        if mask is not None:
            weight = weight * mask.to(weight.dtype)
        return cls._replacing(linear, BlockSparse.from_dense(weight, block, mask), activation)

    def _weight(self) -> BlockSparse:
        shape = (self.out_features, self.in_features)
        return BlockSparse(self.crow_indices, self.col_indices, self.values, shape, self.scales)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # nn.Module.__getattr__ costs as much as a small kernel, so the tensors are taken from their dicts.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return call(
            x,
            buffers["crow_indices"],
            buffers["col_indices"],
            parameters["values"],
            self.in_features,
            parameters["bias"],
            self.activation,
            residual,
            buffers["scales"],
            self.input_scale,
        )

    def check_content(self, tensors: dict[str, Tensor], scales: Tensor | None) -> None:
        validate(**tensors, shape=(self.out_features, self.in_features), scales=scales)

    def _format_repr(self) -> str:
        n, k = self.block
        return f"block={n}x{k}, sparsity={self.weight.sparsity:.3f}"

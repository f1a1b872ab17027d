"""What linear layers of a sparse format share."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..ops.bsr_linear import check_input_scale

Layer = TypeVar("Layer", bound="CompressedLinear")


class CompressedLinear(nn.Module):
    """A linear layer that stores the weights of a format, in `values` and buffers of that format's own names.

    content      names of the values and indices; index_dtype is that of the indices
    scales       of int8 values, one for each output, in float32 whatever the layer's dtype; None of others
    activation   applied last, "none" or another of `bsr_linear`
    input_scale  rounds x to int8 as a constant; None finds a scale for each token as it comes
    """

    content: ClassVar[tuple[str, ...]]
    index_dtype: ClassVar[torch.dtype]

    in_features: int
    out_features: int
    values: nn.Parameter
    scales: Tensor | None
    bias: nn.Parameter | None
    activation: str
    input_scale: float | None

    @classmethod
    def from_weight(cls, weight: Any, bias: Tensor | None = None, activation: str = "none") -> Any:
        """Wrap a weight of the format (validated here) and an optional bias of shape (N,)."""
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """The weight as a format; it shares the layer's tensors.

        Assigning to it is for code that puts back what it read, as peft does when it unloads an adapter.
        """
        return self._weight()

    @weight.setter
    def weight(self, weight: Any) -> None:
        own = self._weight()
        if type(weight) is not type(own) or weight.values is not own.values:
            raise TypeError(
                f"{type(self).__name__}: expected the layer's own weight, got {type(weight).__name__}; "
                "densify_ makes the layer an nn.Linear, whose weight may be set"
            )

    def _weight(self) -> Any:
        raise NotImplementedError

    def check_content(self, tensors: dict[str, Tensor], scales: Tensor | None) -> None:
        """Raise TypeError or ValueError unless `content` of these names describes a weight of this layer's shape."""
        raise NotImplementedError

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with the same function (activation apart)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.to_dense().detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def quantize(self: Layer, input_scale: float | None = None) -> Layer:
        """This layer with int8 weights (`quantize` of its format), for inference; the bias is shared.

        input_scale  rounds x to int8, as a constant; None finds a scale for each token as it comes
        """
        layer = self.from_weight(self.weight.quantize(), self.bias, self.activation)
        if input_scale is not None:
            check_input_scale(input_scale, layer.scales)
        layer.input_scale = input_scale
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, {self._format_repr()}"
        if self.scales is not None:
            text += ", int8" + (f", input_scale={self.input_scale:g}" if self.input_scale else "")
        if self.bias is None:
            text += ", bias=False"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _format_repr(self) -> str:
        raise NotImplementedError

    @classmethod
    def _check_bias(cls, weight: Any, bias: Tensor | None) -> None:
        """Raises ValueError for another shape, or dtype beside values that are not int8."""
        rows, dtype = weight.shape[0], weight.values.dtype
        if bias is not None and (bias.shape != (rows,) or (bias.dtype != dtype and weight.scales is None)):
            raise ValueError(
                f"{cls.__name__}: expected bias of shape ({rows},) and dtype {dtype}, "
                f"got {tuple(bias.shape)} and {bias.dtype}"
            )

    @classmethod
    def _replacing(cls: type[Layer], linear: nn.Linear, weight: Any, activation: str) -> Layer:
        """Of that weight in place of `linear`, whose bias is shared and whose mode and requires_grad carry over."""
        layer: Layer = cls.from_weight(weight, linear.bias, activation)
        layer.values.requires_grad_(linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.train(linear.training)

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLinear:
        """As for any module, but scales stay float32 when the model changes dtype."""
        before = self.scales
        super()._apply(fn, recurse)
        if before is not None and self.scales is not None and self.scales.dtype != before.dtype:
            self.scales = self.scales.float() if before.is_meta else before.to(self.scales.device)
        return self

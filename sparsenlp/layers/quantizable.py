"""What linear layers that may have int8 weights share."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from ..ops.bsr_linear import check_input_scale

Layer = TypeVar("Layer", bound="Quantizable")


class Quantizable(nn.Module):
    """A layer of a sparse format with `quantize`; it keeps `scales`, None without int8 weights, in float32."""

    in_features: int
    out_features: int
    values: nn.Parameter
    scales: Tensor | None
    bias: nn.Parameter | None
    activation: str
    input_scale: float | None

    @classmethod
    def from_weight(cls, weight: Any, bias: Tensor | None = None, activation: str = "none") -> Any:
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        raise NotImplementedError

    def to_dense(self) -> nn.Linear:
        raise NotImplementedError

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

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizable:
        """As for any module, but scales stay float32 when the model changes dtype."""
        before = self.scales
        super()._apply(fn, recurse)
        if before is not None and self.scales is not None and self.scales.dtype != before.dtype:
            self.scales = self.scales.float() if before.is_meta else before.to(self.scales.device)
        return self

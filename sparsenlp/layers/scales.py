"""What layers with int8 weights share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Float32Scales(nn.Module):
    """A module whose buffer `scales`, None without int8 weights, stays float32 when the model changes dtype."""

    scales: Tensor | None

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Scales:
        before = self.scales
        super()._apply(fn, recurse)
        if before is not None and self.scales is not None and self.scales.dtype != before.dtype:
            self.scales = self.scales.float() if before.is_meta else before.to(self.scales.device)
        return self

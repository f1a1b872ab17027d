"""What the tests on hardware share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"


def why_no_gpu() -> str:
    """Why nothing can be tested here, "" where it can."""
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def on_gpu(*values: Any) -> list[Any]:
    """Tensors, weights and masks on the GPU; anything else as it is."""
    return [value.to(DEVICE) if hasattr(value, "to") else value for value in values]


def poison(*tensors: Tensor) -> None:
    """Leave freed memory of the size of each full of NaN, for the allocator to hand out next."""
    junk = [torch.full_like(t, torch.nan, device=DEVICE, dtype=d) for t in tensors for d in (torch.half, torch.float)]
    del junk


def assert_close(got: Tensor, expected: Tensor, tolerance: dict[str, float]) -> None:
    """`got` on the GPU against float64 on the CPU."""
    assert got.device.type == DEVICE
    torch.testing.assert_close(got.cpu().double(), expected, **tolerance)

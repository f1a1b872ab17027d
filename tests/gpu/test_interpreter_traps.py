"""Where Triton's interpreter is wrong: a Triton that passes these no longer needs `interpreted.mended`.

The file run as a script computes the facts, in a process in which Triton interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (its wheels are for Linux)")
tl = pytest.importorskip("triton.language", reason="Triton is not installed (its wheels are for Linux)")


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = row * 16 + column
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def product(dtype: torch.dtype, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the interpreter makes of a product, and the product."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    _dot[(1,)](a, b, c, precision)
    return c.double(), a.double() @ b.double()


def main() -> None:
    from interpreted import mended

    bfloat16, exact = product(torch.bfloat16, "ieee")
    assert not torch.allclose(bfloat16, exact, atol=1e-2), "bfloat16 is right without mended()"
    tf32, exact = product(torch.float32, "tf32")
    assert torch.allclose(tf32, exact, atol=1e-5), "TF32 is rounded without mended()"
    with mended():
        bfloat16, exact = product(torch.bfloat16, "ieee")
        assert torch.allclose(bfloat16, exact, atol=1e-5)
        tf32, exact = product(torch.float32, "tf32")
        assert 1e-4 < (tf32 - exact).abs().max() < 1e-2
        half, exact = product(torch.float16, "ieee")
        assert torch.allclose(half, exact, atol=1e-5)


def test_the_traps_are_as_they_were():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    main()

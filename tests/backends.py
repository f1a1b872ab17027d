"""Every way to run an op on this machine, for parametrized tests."""

from __future__ import annotations

import pytest
import torch

from sparsenlp import native

NATIVE_ISAS = native.isas()
KERNEL_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}


def each_backend(op, cases):
    """(backend, case) for the reference and for every instruction set that has a kernel for the case's weights."""
    pairs = []
    for case in cases:
        isas = native.kernels().get(f"{op}.{KERNEL_NAMES.get(case.weight_dtype)}", [])
        pairs += [pytest.param(backend, case, id=f"{backend}-{case}") for backend in ("reference", *isas)]
    return pairs

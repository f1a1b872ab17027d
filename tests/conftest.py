from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsenlp import native

sys.path.insert(0, str(Path(__file__).parent))  # cases.py is shared with bench/

from backends import NATIVE_ISAS  # needs the path above

torch.set_num_threads(2)


@pytest.fixture(params=["reference", *NATIVE_ISAS])
def backend(request):
    """Each way to run an op here: the reference, then the native kernels on every instruction set in turn."""
    if request.param == "reference":
        yield "reference"
        return
    names = [*reversed(NATIVE_ISAS)]
    in_force = native.isa()
    if names.index(request.param) > names.index(in_force):
        pytest.skip(f"{native.ISA_VARIABLE} caps the kernels at {in_force}")
    with native.isa_cap(request.param):
        yield "native"


@pytest.fixture
def needs_native():
    if not native.available:
        pytest.skip(native.why_unavailable)

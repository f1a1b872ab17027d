from __future__ import annotations

import pytest
from traced import plan_for_an_a100


@pytest.fixture
def a_gpu(monkeypatch):
    """An A100, as far as planning is concerned."""
    pytest.importorskip("sparsenlp_kernels.launch", reason="Triton is not installed")
    plan_for_an_a100(monkeypatch)

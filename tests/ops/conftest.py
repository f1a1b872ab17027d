from __future__ import annotations

import pytest

from sparsenlp import triton_kernels


@pytest.fixture
def a_gpu(monkeypatch):
    """An A100, as far as planning is concerned."""
    launch = pytest.importorskip("sparsenlp_kernels.launch", reason="Triton is not installed")
    monkeypatch.setattr(triton_kernels, "why_unavailable", lambda: "")
    monkeypatch.setattr(triton_kernels, "why_device_unavailable", lambda index: "")
    monkeypatch.setattr(launch.Device, "of", classmethod(lambda cls, tensor: launch.Device("sm_80", 108)))

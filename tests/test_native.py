from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparsenlp import native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_environment_caps_the_instruction_set(needs_native):
    for name in native.isas():
        result = run("from sparsenlp import native; print(native.isa())", SPARSENLP_CPU_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_unknown_instruction_set_is_refused_with_the_list(needs_native):
    result = run("import sparsenlp", SPARSENLP_CPU_ISA="avx1024")
    assert result.returncode != 0
    assert "expected one of scalar, neon, neon_dot, neon_bf16, avx2," in result.stderr


def test_cap_is_lifted_again(needs_native):
    before = native.isa()
    with native.isa_cap("scalar"):
        assert native.isa() == "scalar"
    assert native.isa() == before
    with pytest.raises(ValueError, match="got 'fast'"):
        native.set_isa_cap("fast")


def test_import_is_light():
    heavy = ("transformers", "matplotlib", "typer", "pandas")
    code = f"import sys, sparsenlp; print([name for name in {heavy} if name in sys.modules])"
    result = run(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_works_without_the_extension():
    code = """
import sys
sys.modules["sparsenlp._C"] = None
import torch, sparsenlp
from sparsenlp import native
assert not native.available and native.why_unavailable and native.isas() == []
linear = torch.nn.Linear(16, 8)
layer = sparsenlp.SparseLinear.from_dense(linear, (8, 1))
x = torch.randn(3, 16, requires_grad=True)
W = (layer.crow_indices, layer.col_indices, layer.values, layer.bias, "none")
torch.testing.assert_close(layer(x), linear(x))
torch.testing.assert_close(torch.ops.sparsenlp.bsr_linear(x, *W), linear(x))
layer(x).sum().backward()
print("ok")
"""
    result = run(code)
    assert result.stdout.strip() == "ok", result.stderr


def test_fingerprint_names_the_binary(needs_native, monkeypatch):
    assert len(native.fingerprint()) == 16
    native.fingerprint.cache_clear()
    monkeypatch.setattr(native, "_C", None)
    assert native.fingerprint() is None
    native.fingerprint.cache_clear()

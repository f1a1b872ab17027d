"""The CUDA backend of nm_linear: what it refuses, without a GPU.

The kernels are simulated in tests/gpu, and run in tests/hardware where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import NMLinearCase
from torch._subclasses import FakeTensorMode

from sparsenlp import NMLinear, native_cuda
from sparsenlp.formats import NM
from sparsenlp.ops import nm_linear, nm_linear_cuda, recurrent_cuda
from sparsenlp.ops.nm_linear import pack

HALF = torch.float16
CASE = NMLinearCase((3, 5), 24, 64, dtype=HALF)


@pytest.fixture
def library(monkeypatch):
    """As if the library were built."""
    monkeypatch.setattr(native_cuda, "available", True)
    monkeypatch.setattr(native_cuda, "why_unavailable", "")


def like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@contextmanager
def on_fake_gpu(case: NMLinearCase) -> Iterator[tuple[torch.Tensor, NM]]:
    """x and weight as fake tensors on a GPU that need not be there."""
    x, weight = case.x(), case.weight()
    with FakeTensorMode():
        values, indices = like(weight.values), like(weight.indices)
        yield like(x), NM(values, indices, weight.shape, weight.pattern, like(weight.scales))


def test_a_gpu_without_the_library_is_an_error(monkeypatch):
    monkeypatch.setattr(native_cuda, "available", False)
    monkeypatch.setattr(native_cuda, "why_unavailable", "the CUDA library was not built")
    with on_fake_gpu(CASE) as (x, weight):
        message = r"x \(3, 5, 64\) float16 with a 24 x 64 float16 weight in 2:4: .*not built.*backend='reference'"
        with pytest.raises(RuntimeError, match=message):
            nm_linear(x, weight)
        assert nm_linear(x, weight, backend="reference").shape == (3, 5, 24)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(CASE, dtype=torch.float32), "expected x in float16 or bfloat16 .*, got torch.float32"),
        (replace(CASE, dtype=torch.float64, int8=True), "expected x in float16 or bfloat16 .*, got torch.float64"),
        (replace(CASE, pattern=(1, 4)), r"expected the pattern 2:4, .* got 1:4 \(which fits into 2:4 as it is"),
        (replace(CASE, pattern=(1, 2)), r"expected the pattern 2:4, .* got 1:2 \(which fits into 2:4 as it is"),
        (replace(CASE, pattern=(4, 8)), r"expected the pattern 2:4, .* got 4:8\. "),
        (replace(CASE, columns=24), "expected K to be a multiple of 16, got 24"),
        (replace(CASE, columns=48, int8=True), "expected K to be a multiple of 32, got 48"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [None, "cuda"])
def test_what_no_kernel_takes_is_an_error(case, message, backend, library):
    with on_fake_gpu(case) as (x, weight), pytest.raises(RuntimeError, match=message):
        nm_linear(x, weight, backend=backend)


def test_sizes_that_32_bits_cannot_count(library):
    with FakeTensorMode():
        x, values = torch.empty(1 << 31, 64, dtype=HALF, device="cuda"), torch.empty(24, 32, dtype=HALF, device="cuda")
        weight = NM(values, torch.empty(24, 32, dtype=torch.uint8, device="cuda"), (24, 64), (2, 4))
        with pytest.raises(
            RuntimeError, match=r"expected sizes up to .*, got 2147483648 tokens and a weight of 24 x 64"
        ):
            nm_linear(x, weight)


def test_the_layer_says_so_too(library):
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"NMLinear.to_dense\(\)"):
        NMLinear(64, 24, device="cuda")(torch.empty(2, 64, device="cuda"))


def test_cuda_backend_wants_a_gpu(library):
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: expected x on a CUDA device, got cpu"):
        nm_linear(CASE.x(), CASE.weight(), backend="cuda")


@pytest.mark.parametrize("case", [CASE, replace(CASE, int8=True, dtype=torch.float32)], ids=str)
def test_what_a_kernel_takes_is_traced(case, library):
    with on_fake_gpu(case) as (x, weight):
        y = nm_linear(x, weight)
    assert y.shape == (3, 5, 24)
    assert y.dtype == case.dtype
    assert y.is_cuda


def prepare(**change):
    weight, y = CASE.weight(), torch.empty(3, 5, 24, dtype=HALF)
    names = {
        "x": CASE.x(),
        "values": weight.values,
        "packed": pack(weight.indices, weight.pattern),
        "bias": CASE.bias_vector(),
        "activation": "relu",
        "residual": torch.zeros_like(y),
        "scales": None,
        "input_scale": 0.0,
        "y": y,
    }
    return nm_linear_cuda.prepare(**(names | change), what="here")


def test_arguments():
    arguments, held = prepare()
    assert (arguments.M, arguments.N, arguments.K) == (15, 24, 64)
    assert (arguments.activation, arguments.dtype, arguments.y_dtype) == (1, 1, 1)
    assert arguments.scales is None
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == {
        name: getattr(arguments, name) for name in ("x", "values", "packed", "bias", "residual", "y")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3 * 5 * 64 + 1, dtype=HALF)[1:].view(3, 5, 64)}, "expected x to begin on a multiple of 16"),
        ({"packed": torch.zeros(24 * 8 + 1, dtype=torch.uint8)[1:].view(24, 8)}, "packed to begin on a multiple of 8"),
        ({"values": torch.zeros(24, 31, dtype=HALF)}, r"expected values of shape \(24, 32\)"),
        ({"packed": torch.zeros(24, 4, dtype=torch.uint8)}, r"expected packed of shape \(24, 8\)"),
        ({"packed": torch.zeros(24, 8, dtype=torch.int8)}, "and dtype torch.uint8"),
        ({"bias": torch.zeros(23, dtype=HALF)}, r"expected bias of shape \(24,\)"),
        ({"bias": torch.zeros(24)}, "expected bias of .* dtype torch.float16"),
        ({"residual": torch.zeros(15, 24, dtype=HALF)}, r"expected residual of shape \(3, 5, 24\)"),
        ({"scales": torch.ones(24)}, "expected values of .* dtype torch.int8"),
        ({"bias": torch.zeros(24, dtype=HALF, device="meta")}, "on cpu, got .* on meta"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(RuntimeError, match=f"^here: .*{message}"):
        prepare(**change)


@pytest.mark.skipif(not native_cuda.available, reason=native_cuda.why_unavailable)
@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        ("sparsenlp_nm_linear", nm_linear_cuda.Arguments(M=1, N=1, K=32, dtype=0, y_dtype=0)),
        ("sparsenlp_sparse_lstm", recurrent_cuda.Arguments(dtype=9)),
        ("sparsenlp_sparse_gru", recurrent_cuda.Arguments(dtype=9)),
    ],
    ids=["nm_linear", "sparse_lstm", "sparse_gru"],
)
def test_a_failed_launch_names_the_code(function, unknown, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match=r"^here: the launch failed with CUDA error 1, invalid argument"):
        native_cuda.launch(function, torch.device("cuda", 0), unknown, 0, "here")


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    monkeypatch.setattr(native_cuda, "LIBRARY", tmp_path / "broken.so")
    monkeypatch.setattr(native_cuda, "library", native_cuda.library.__wrapped__)
    with pytest.raises(RuntimeError, match=r"^here: the CUDA library does not load, build it again"):
        native_cuda.launch("sparsenlp_nm_linear", torch.device("cuda", 0), nm_linear_cuda.Arguments(), 0, "here")


def test_kernel_for_tokens():
    names = [nm_linear_cuda.KERNELS[nm_linear_cuda.kernel_for(tokens)][0] for tokens in (1, 8, 9, 64, 65, 4096)]
    assert names == ["few", "few", "small", "small", "large", "large"]

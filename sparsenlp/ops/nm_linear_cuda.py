"""nm_linear on a CUDA GPU: what it takes, and the launch. Compiled and simulated, not run on hardware."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import native_cuda
from ..reference.bsr_linear import ACTIVATIONS, quantize_tokens

PATTERN = (2, 4)
KERNELS: tuple[tuple[str, int | None], ...] = (("large", None), ("small", 64), ("few", 8))
"""(kernel, the most tokens it is for), numbered as enum NmKernel of csrc/cuda/nm_linear/nm_linear.h."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # enum NmDtype
LARGEST = 2**31 - 2**10  # a size; kernels round sizes up to their tiles in 32 bits


class Arguments(ctypes.Structure):
    """struct NmLinearCuda of csrc/cuda/nm_linear/nm_linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "values", "packed", "bias", "residual", "x_scales", "scales", "y")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "activation", "dtype", "y_dtype")),
    )


def why_not(x: Tensor, values: Tensor, packed: Tensor | None, pattern: tuple[int, int]) -> str:
    """Why no kernel takes x (..., K) with these weights, "" if one does. Reads no data."""
    if not native_cuda.available:
        return native_cuda.why_unavailable
    if not x.is_cuda:
        return f"expected x on a CUDA device, got {x.device}"
    if tuple(pattern) != PATTERN or packed is None:
        n, m = pattern
        fits = (n <= 2 and m % 4 == 0) or (n, m) == (1, 2)  # at most 2 in any 4 neighbours
        remedy = " (which fits into 2:4 as it is: NMLinear.from_dense(layer.to_dense(), (2, 4)))" if fits else ""
        return f"expected the pattern 2:4, the only one that tensor cores multiply, got {n}:{m}{remedy}"
    quantized = values.dtype == torch.int8
    if x.dtype not in (torch.float16, torch.bfloat16) and not (quantized and x.dtype == torch.float32):
        return f"expected x in float16 or bfloat16 (or float32 with int8 weights), got {x.dtype}"
    unit = 32 if quantized else 16
    if x.shape[-1] % unit:
        return f"expected K to be a multiple of {unit}, got {x.shape[-1]} (pad x and the weight with zeros)"
    rows = math.prod(x.shape[:-1])
    if max(rows, values.shape[0], x.shape[-1]) > LARGEST:
        return f"expected sizes up to {LARGEST}, got {rows} tokens and a weight of {values.shape[0]} x {x.shape[-1]}"
    return ""


def kernel_for(tokens: int) -> int:
    """The number of the kernel for so many tokens. Chosen by what they were written for, not by timing."""
    return max(i for i, (_, most) in enumerate(KERNELS) if most is None or tokens <= most)


def forward(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    packed: Tensor,
    pattern: list[int],
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    input_scale: float = 0.0,
) -> Tensor:
    """The CUDA implementation of the op sparsenlp::nm_linear. int8 rounds x in torch before the launch.

    Raises RuntimeError naming the shapes where no kernel takes them, or the launch fails.
    """
    what = describe(x, values, pattern)
    n, m = pattern
    reason = why_not(x, values, packed, (n, m)) or native_cuda.why_not_on(x.device)
    if reason:
        raise RuntimeError(f"{what}: {reason}")
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    if not y.numel():
        return y
    arguments, held = prepare(x, values, packed, bias, activation, residual, scales, input_scale, y, what)
    native_cuda.launch("sparsenlp_nm_linear", x.device, arguments, kernel_for(arguments.M), what=what)
    del held  # the allocator keeps freed memory for this stream, so the tensors may go before the kernel has run
    return y


def prepare(
    x: Tensor,
    values: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scales: Tensor | None,
    input_scale: float,
    y: Tensor,
    what: str,
) -> tuple[Arguments, dict[str, Tensor]]:
    """What the launcher takes, and the tensors it points to by the names of the arguments.

    Raises RuntimeError that begins with `what` if the tensors do not fit together or begin at an odd address.
    """
    N, K = values.shape[0], x.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "values": (values, (N, K // 2), x.dtype if scales is None else torch.int8),
        "packed": (packed, (N, -(-K // 64) * 8), torch.uint8),
        "bias": (bias, (N,), x.dtype),
        "residual": (residual, y.shape, x.dtype),
        "scales": (scales, (N,), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise RuntimeError(
                f"{what}: expected {name} of shape {tuple(shape)} and dtype {dtype} on {x.device}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype} on {tensor.device}"
            )
    tensors: dict[str, Tensor | None] = {"x": x, **{name: tensor for name, (tensor, *_) in expected.items()}, "y": y}
    if scales is not None:
        rounded, x_scales = quantize_tokens(x, input_scale)
        tensors |= {"x": rounded.to(torch.int8), "x_scales": x_scales}
    held = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in held.items():
        alignment = {"packed": 8, "x_scales": 4, "scales": 4}.get(name, 16)
        if tensor.data_ptr() % alignment:
            raise RuntimeError(f"{what}: expected {name} to begin on a multiple of {alignment} bytes: clone() it")
    arguments = Arguments(
        M=math.prod(x.shape[:-1]),
        N=N,
        K=K,
        activation=list(ACTIVATIONS).index(activation),
        dtype=DTYPES[values.dtype],
        y_dtype=DTYPES[y.dtype],
        **{name: tensor.data_ptr() for name, tensor in held.items()},
    )
    return arguments, held


def describe(x: Tensor, values: Tensor, pattern: list[int] | tuple[int, int]) -> str:
    """Names op, shapes and dtypes, for errors."""
    n, m = pattern
    weight = f"{values.shape[0]} x {x.shape[-1]} {str(values.dtype).removeprefix('torch.')} weight in {n}:{m}"
    return f"nm_linear on x {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} with a {weight}"

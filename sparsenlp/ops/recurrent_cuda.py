"""The steps of sparse_lstm and sparse_gru by CUDA C++: what it takes, and the launch. Compiled and simulated, not run
on hardware."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import native_cuda

if TYPE_CHECKING:
    from .recurrent_gpu import Direction

KERNELS: tuple[tuple[str, int], ...] = (("one", 1), ("few", 8))
"""(kernel, the most sequences it is for), numbered as enum RecurrentKernel of csrc/cuda/recurrent.h."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum RecurrentDtype
UNITS = range(8, 65)
"""Hidden units that a block of threads may have: whole blocks of the weight, or an equal part of one."""
SURE_UNITS = 1024
"""Hidden units that any GPU of 16 multiprocessors divides; more may be refused at the launch."""
ALIGNMENT = 16  # bytes that a half of the state is a multiple of


class Arguments(ctypes.Structure):
    """struct RecurrentCuda of csrc/cuda/recurrent.h."""

    POINTERS = (
        *("inputs", "bias", "crow_indices", "col_indices", "values", "h", "c", "y", "h_n", "gates", "cells"),
        *("table", "counter"),
    )
    SIZES = ("T", "B", "H", "n", "k", "half", "y_stride", "dtype")
    _fields_ = (*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int) for name in SIZES))


def why_not(batch: int, values: list[Tensor]) -> str:
    """Why the kernels do not take so many sequences, or these recurrent weights; "" if they do."""
    if not native_cuda.available:
        return native_cuda.why_unavailable
    if batch > KERNELS[-1][1]:
        return f"expected at most {KERNELS[-1][1]} sequences, got {batch}"
    for n in {v.shape[1] for v in values}:
        if all(units % n and n % units for units in UNITS):
            return f"expected blocks whose height divides a number from 8 to 64, or has such a divisor, got {n}"
    return ""


def kernel_for(batch: int) -> int:
    """The number of the kernel for so many sequences."""
    return next(i for i, (_, most) in enumerate(KERNELS) if batch <= most)


def run_steps(what: str, direction: Direction) -> None:
    """Raises RuntimeError that begins with `what` if the launch fails."""
    device = direction.inputs.device
    if reason := native_cuda.why_not_on(device):
        raise RuntimeError(f"{what}: {reason}")
    arguments, held = prepare(direction)
    op = "sparse_gru" if direction.c is None else "sparse_lstm"
    native_cuda.launch(f"sparsenlp_{op}", device, arguments, kernel_for(arguments.B), what)
    del held  # the allocator keeps freed memory for this stream, so the tensors may go before the kernel has run


def prepare(direction: Direction) -> tuple[Arguments, dict[str, Tensor]]:
    """What the launcher takes, and the tensors it points to by the names of the arguments."""
    batch, hidden = direction.h.shape
    lanes = KERNELS[kernel_for(batch)][1]
    unit = ALIGNMENT // direction.h.element_size()
    half = -(-hidden * lanes // unit) * unit
    h = direction.h.new_zeros(2, half)
    h[:, : hidden * lanes].view(2, hidden, lanes)[..., :batch] = direction.h.t()
    held = {name: tensor for name, tensor in direction._asdict().items() if tensor is not None}
    held |= {name: held[name].contiguous() for name in ("inputs", "bias", "values") if name in held}
    held |= {"h": h, "counter": torch.zeros(1, dtype=torch.int32, device=h.device)}
    _, n, k = direction.values.shape
    arguments = Arguments(
        **{name: tensor.data_ptr() for name, tensor in held.items()},
        T=direction.table.shape[0] - 1,
        B=batch,
        H=hidden,
        n=n,
        k=k,
        half=half,
        y_stride=direction.y.stride(0),
        dtype=DTYPES[direction.inputs.dtype],
    )
    return arguments, held

"""A Triton kernel and its arguments, compiled for a GPU that need not be there, and run in the PTX interpreter.

A launch is anything with the fields of `sparsenlp_kernels.bsr_linear.Launch`: kernel, programs (an int or a tuple of
up to three), arguments, constants, options.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import ptx
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
SM80 = GPUTarget("cuda", 80, 32)
INTERPRETED = triton.knobs.runtime.interpret  # then there is no compiler


def compile_launch(launch: Any, target: GPUTarget = SM80) -> Any:
    """What the launcher launches, compiled as Triton's JIT does: 1 and None constant, divisibility by 16 known."""
    signature, constants, attributes = dict.fromkeys(launch.constants, "constexpr"), dict(launch.constants), {}
    for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        position = launch.kernel.arg_names.index(name)
        if _is_constant(launch, value, position):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if launch.kernel.params[position].do_not_specialize:
            continue
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0 and not isinstance(value, float):
            attributes[(position,)] = [["tt.divisibility", 16]]
    places = {(launch.kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(launch.kernel, signature, places, attributes)
    return triton.compile(source, target=target, options=launch.options)


def _is_constant(launch: Any, value: Any, position: int) -> bool:
    return value is None or (type(value) is int and value == 1 and not launch.kernel.params[position].do_not_specialize)


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def simulate(launch: Any, schedule: ptx.LockStep | ptx.Adversarial | None = None, compiled: Any = None) -> Counter[str]:
    """Run the launch's sm_80 PTX on its CPU tensors, in place. Returns how often a warp executed each opcode.

    Tensors that overlap in memory share a buffer; others may not be reached through each other's pointers.
    """
    compiled = compiled or compile_launch(launch)
    values = [v for position, v in enumerate(launch.arguments) if not _is_constant(launch, v, position)]
    merged = buffers([value for value in values if isinstance(value, Tensor)])
    arguments = [pointer(value, merged) if isinstance(value, Tensor) else value for value in values]
    text, name = compiled.asm["ptx"], compiled.metadata.name
    scratch = np.zeros(0, np.uint8)  # Triton's last parameters point to memory that these kernels do not use
    arguments += [scratch] * (len(ptx.parse(text, name).parameters) - len(arguments))
    grid = launch.programs if isinstance(launch.programs, tuple) else (launch.programs,)
    block = (32 * compiled.metadata.num_warps,)
    return ptx.run(text, name, grid, block, arguments, compiled.metadata.shared, schedule, cooperative=True)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


def buffers(tensors: list[Tensor]) -> dict[int, np.ndarray]:
    """Address -> bytes, as views of the memory of the tensors: one buffer per tensor, or per tensors that overlap."""
    merged: list[tuple[int, int, Tensor]] = []
    for tensor in sorted(tensors, key=extent):
        start, end = extent(tensor)
        if merged and start < merged[-1][1]:
            first, last, _ = merged.pop()
            start, end = first, max(last, end)
        merged.append((start, end, tensor))
    return {start: _bytes(tensor, start, end) for start, end, tensor in merged}


def _bytes(tensor: Tensor, start: int, end: int) -> np.ndarray:
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=torch.uint8).set_(storage, start - storage.data_ptr(), (end - start,), (1,))
    return view.numpy()


def pointer(tensor: Tensor, merged: dict[int, np.ndarray]) -> ptx.Pointer:
    address = tensor.data_ptr()
    start = max(start for start in merged if start <= address)
    return ptx.Pointer(merged[start], address - start)

"""The Triton kernels: whether a GPU can run them, and why not. Triton is imported when the first of them runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_unavailable() -> str:
    """Why this installation cannot run Triton kernels, with what to do; "" where it can. Imports no Triton."""
    for module, remedy in (("triton", "pip install 'sparsenlp[gpu]'"), ("sparsenlp_kernels", "reinstall sparsenlp")):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {remedy}"
    if not torch.cuda.is_available():
        return "torch sees no GPU: install a GPU build of torch and its driver"
    return ""


@functools.cache
def why_device_unavailable(index: int) -> str:
    """As above, for the GPU of this index."""
    reason = why_unavailable()
    capability = (0, 0) if reason else torch.cuda.get_device_capability(index)
    if not reason and capability < CAPABILITY:
        found = "{}.{}".format(*capability)
        reason = f"expected compute capability 8.0 or later, got {found} of {torch.cuda.get_device_name(index)}"
    return reason


def load(op: str, x: Tensor) -> ModuleType:
    """The module of kernels of `op` for x on a GPU, or RuntimeError with what to do."""
    reason = why_device_unavailable(x.device.index or 0)
    if reason:
        raise RuntimeError(
            f"{op}: backend 'triton' cannot run for x of shape {tuple(x.shape)} on {x.device}: {reason}; "
            "or pass backend='reference', which is dense"
        )
    return importlib.import_module(f"sparsenlp_kernels.{op}")


def register(op: str, function: Callable[..., Any]) -> None:
    """Run `function` for the functional sparsenlp::<op> on a GPU, and let torch.compile see the kernels it launches.

    As torch.library.triton_op does for an op of its own: while AOTAutograd traces, the op is replaced by what
    `function` does, where shapes are static. torch.export keeps the op.
    """

    def replace(mode: Any, overload: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        static = all(isinstance(size, int) for tensor in tensors for size in tensor.shape)
        if not tensors[0].is_cuda or not static or why_unavailable() or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    torch.library.impl(f"sparsenlp::{op}", "cuda", function)
    torch.library.register_torch_dispatch(f"sparsenlp::{op}", FunctionalTensorMode, replace)

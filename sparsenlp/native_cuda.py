"""The library of CUDA kernels: whether it is there, why not, and how it is called.

It is a plain shared library (csrc/cuda) that knows nothing of torch or Python, and is opened when it is first
asked for. Opening needs neither a GPU nor a driver. Compiled and simulated, not run on hardware.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libsparsenlp_cuda.so")
OLDEST_GPU = (8, 0)

NOT_BUILT = "the CUDA library was not built (no nvcc, or SPARSENLP_CUDA=0): build sparsenlp where nvcc is found"

available = LIBRARY.exists()
why_unavailable = "" if available else NOT_BUILT


@functools.cache
def library() -> ctypes.CDLL:
    """The library, opened. Raises OSError if it does not load."""
    opened = ctypes.CDLL(str(LIBRARY))
    opened.sparsenlp_cuda_error.restype = ctypes.c_char_p
    return opened


def why_not_on(device: torch.device) -> str:
    """Why the GPU runs no kernel of the library; "" if it does."""
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= OLDEST_GPU else f"expected a GPU of compute capability 8.0 or newer, got {capability}"


def launch(function: str, device: torch.device, arguments: ctypes.Structure, kernel: int, what: str) -> None:
    """Call the launcher `function` on torch's current stream of `device`.

    Raises RuntimeError that begins with `what` if the library does not load or the launch fails.
    """
    try:
        launcher = getattr(library(), function)
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{what}: the CUDA library does not load, build it again: {error}") from None
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = launcher(ctypes.byref(arguments), kernel, ctypes.c_void_p(stream))
    if code:
        words = library().sparsenlp_cuda_error(code).decode()
        raise RuntimeError(f"{what}: the launch failed with CUDA error {code}, {words}")

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


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and why it is not there."""
    if not LIBRARY.exists():
        return None, "the CUDA library was not built (SPARSENLP_CUDA=0, or no nvcc): install sparsenlp where nvcc is found"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the CUDA library does not load: {error}"
    library.sparsenlp_cuda_error.restype = ctypes.c_char_p
    return library, ""


def available() -> bool:
    return load()[0] is not None


def why_unavailable() -> str:
    """"" where the library is there."""
    return load()[1]


def why_not_on(device: torch.device) -> str:
    """Why no kernel of the library runs on `device`; "" if they do."""
    if not available():
        return why_unavailable()
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got {device}"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"expected a GPU of compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return ""


def launch(function: str, device: torch.device, *arguments: ctypes.Structure | int, what: str) -> None:
    """Call `function` of the library with the arguments and torch's current stream of `device`.

    Raises RuntimeError that begins with `what` if it returns a code.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(f"{what}: {reason}")
    pointers = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = getattr(library, function)(*pointers, stream)
    if code:
        raise RuntimeError(f"{what}: the launch failed with CUDA error {code}, {library.sparsenlp_cuda_error(code).decode()}")

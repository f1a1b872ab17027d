"""Tensors that end, or begin, where memory ends: a read or write beyond them is a signal."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


class Fences:
    """Makes such copies, and keeps their memory."""

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []

    def fence(self, tensor: Tensor, at_end: bool) -> Tensor:
        """A contiguous copy against an unreadable page: behind it, or else in front of it."""
        page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        if not size:
            return tensor.contiguous()
        inside = -(-size // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        self._kept.append(memory)
        whole = (ctypes.c_char * len(memory)).from_buffer(memory)
        address = ctypes.addressof(whole)
        for first in (address, address + page + inside):
            if _LIBC.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(page), _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = page + (inside - size if at_end else 0)
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
        copy = flat.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def fence_all(self, value: Any, at_end: bool) -> Any:
        if isinstance(value, list):
            return [self.fence_all(item, at_end) for item in value]
        return self.fence(value, at_end) if isinstance(value, Tensor) else value


def in_a_child(work: Callable[[], str]) -> str:
    """What `work` returns in a forked process, or the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)} after {answer}" if os.WIFSIGNALED(status) else answer

"""All tensors of a call are on one device: the check that every op shares.

torch gives a call with tensors on several devices to one of them, and meta wins: the fake kernel of an op, which
returns memory that nobody has written, would answer for a meta bias beside a CPU's x. So every kernel but the CPU's,
which torch only calls when all tensors are there, looks at all of them first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_devices(op: str, names: list[str], arguments: tuple[Any, ...]) -> None:
    """Raise ValueError naming a tensor, or a tensor in a list, that is not on the device of most.

    `batch_sizes` may be on the CPU, where every backend reads them.
    """
    tensors = [
        (name, tensor)
        for name, value in zip(names, arguments, strict=False)
        for tensor in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(tensor, Tensor) and not (name == "batch_sizes" and tensor.is_cpu)
    ]
    devices = [tensor.device for _, tensor in tensors]
    if all(device == devices[0] for device in devices):
        return
    expected = max(devices, key=devices.count)
    name, device = next((name, tensor.device) for name, tensor in tensors if tensor.device != expected)
    raise ValueError(f"{op}: expected {name} on {expected}, got {device}")


def on_one_device(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which takes the arguments of sparsenlp::<op> in their order, behind `check_devices`."""
    schema = getattr(torch.ops.sparsenlp, op).default._schema
    names = [argument.name for argument in schema.arguments]

    @functools.wraps(kernel)
    def checked(*arguments: Any, **named: Any) -> Any:
        check_devices(op, [*names[: len(arguments)], *named], (*arguments, *named.values()))
        return kernel(*arguments, **named)

    return checked


def register_fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake for sparsenlp::<op>, for calls whose tensors are on one device."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"sparsenlp::{op}", on_one_device(op, fake))
        return fake

    return register

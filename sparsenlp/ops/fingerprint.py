"""A number that changes when tensors are edited, from a few elements of each: fast enough for every forward.

Version counters of tensors do not see what is done through `.data`, as some optimizers and averages of weights do it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native

PLACES = 4
"""Elements of each tensor that are looked at."""
CANDIDATES = 64
"""Elements among which those are chosen that are not zero: most edits leave zeros alone."""


class Watch:
    """A few elements of each of some tensors on the CPU, which it keeps alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        for number in [_kept.pop() for _ in range(len(_kept))]:
            _release(number)
        places = places_of(tensors)
        if native.available and tensors:
            self.number = _watch([t.detach() for t in tensors], places)
            weakref.finalize(self, _release, self.number)
        else:
            self.number = None
            self.views = [_view(tensor.detach(), row) for tensor, row in zip(tensors, places.tolist(), strict=True)]

    def fingerprint(self) -> int:
        """A hash of the elements as they are now."""
        if self.number is not None:
            return _fingerprint(self.number)
        return hash(tuple(tuple(view[places].tolist()) for view, places in self.views))


_kept: list[Tensor] = []
"""Numbers of watches that are gone, of which the extension has not been told."""


def _release(number: Tensor) -> None:
    try:
        _unwatch(number)
    except Exception:  # garbage is collected while a graph is traced, where no op runs
        _kept.append(number)


def places_of(tensors: Sequence[Tensor]) -> Tensor:
    """Where to look, (tensors, PLACES) int64: elements from each tensor's first one on, scattered; -1 for none."""
    rows = [_places(tensor) for tensor in tensors]
    return torch.stack(rows) if rows else torch.empty(0, PLACES, dtype=torch.int64)


def _places(tensor: Tensor) -> Tensor:
    count = tensor.numel()
    if not count:
        return torch.full((PLACES,), -1)
    steps = torch.arange(CANDIDATES, dtype=torch.float64) * 0.6180339887498949 % 1  # spread, however many are taken
    rest = (steps * count).long()
    sizes, strides = (tensor.shape, tensor.stride()) if tensor.dim() else ((1,), (1,))
    places = torch.zeros_like(rest)
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        places += rest % size * stride
        rest = rest // size
    view, _ = _view(tensor.detach(), [])
    return places[(view[places] == 0).to(torch.int8).argsort(stable=True)[:PLACES]]


def _view(tensor: Tensor, places: list[int]) -> tuple[Tensor, list[int]]:
    """All that the tensor reaches, in one dimension, and the places that are some."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((reach + 1,), (1,)) if tensor.numel() else tensor.flatten()
    return flat, [place for place in places if place >= 0]


torch.library.define("sparsenlp::watch", "(Tensor[] tensors, Tensor places) -> Tensor")
torch.library.define("sparsenlp::fingerprint", "(Tensor watch) -> int")
torch.library.define("sparsenlp::unwatch", "(Tensor watch) -> ()")
_watch = torch.ops.sparsenlp.watch.default
_fingerprint = torch.ops.sparsenlp.fingerprint.default
_unwatch = torch.ops.sparsenlp.unwatch.default

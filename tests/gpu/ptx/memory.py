"""Global and shared memory that notice misuse, and the asynchronous copies between them.

Source: PTX ISA 5.1 (state spaces), 6.4.1 (alignment), 9.7.9.25 (cp.async).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .bits import UNSIGNED, PtxError
from .races import RaceDetector

SHARED_WINDOW = 1 << 60  # where shared memory starts in the generic address space
BUFFER_SHIFT = 40  # buffer i of global memory starts at (i + 1) << 40: an overrun meets no other buffer
UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2  # states of a byte of shared memory


class Space:
    """Bytes that threads load and store. Subclasses translate addresses and check them."""

    name: str
    content: np.ndarray  # uint8, a multiple of 16 long
    races: RaceDetector | None = None
    ordered = False  # accesses are strong, so that they do not race with each other

    def place(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Indices into `content` of accesses of `size` bytes at `address` by `threads`, after checks."""
        raise NotImplementedError

    def load(self, address: np.ndarray, element: int, count: int, mask: np.ndarray) -> np.ndarray:
        """(threads, count) unsigned integers of `element` bytes; zeros where `mask` is false."""
        threads = np.flatnonzero(mask)
        result = np.zeros((len(mask), count), UNSIGNED[8 * element])
        result[threads] = self.vectors(element, count)[self._slots(address, element * count, threads)]
        return result

    def store(self, address: np.ndarray, data: np.ndarray, mask: np.ndarray) -> None:
        """Write data (threads, count); of threads with the same address, the last wins."""
        threads = np.flatnonzero(mask)
        element, count = data.dtype.itemsize, data.shape[1]
        size = element * count
        place = self._place(address[threads], size, threads)
        content, slots = self.vectors(element, count), place // size
        if self.races is None or self.ordered:
            self.touch(place, size, threads, address[threads], True)
            content[slots] = data[threads]
            return
        places = self._bytes(place, size)
        raw = np.ascontiguousarray(data[threads]).view(np.uint8).reshape(places.shape)
        changed = (self.content[places] != raw) | self.is_new(places)
        self.touch(place, size, threads, address[threads], True)
        content[slots] = data[threads]
        self.check_writes(places, threads, address, changed)
        lost = (self.content[places] != raw) & (self.races.writer[places] != threads[:, None] // 32 % self.races.warps)
        if (wrong := lost.any(1)).any():
            raise AccessError("two warps write different values at once", address[threads], threads, wrong)

    def vectors(self, element: int, count: int) -> np.ndarray:
        return self.content.view(UNSIGNED[8 * element]).reshape(-1, count)

    def _slots(self, address: np.ndarray, size: int, threads: np.ndarray, writes: bool = False) -> np.ndarray:
        used = address[threads]
        place = self._place(used, size, threads)
        self.touch(place, size, threads, used, writes)
        return place // size

    def _place(self, used: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        if (wrong := used % np.uint64(size) != 0).any():
            raise AccessError(f"misaligned {size}-byte access to {self.name} memory", used, threads, wrong)
        return self.place(used, size, threads)

    def touch(self, place: np.ndarray, size: int, threads: np.ndarray, used: np.ndarray, writes: bool) -> None:
        """Notice an access that passed the checks."""
        if writes or self.races is None or self.ordered:
            return
        if (wrong := self.races.reads(self._bytes(place, size), threads)).any():
            raise AccessError("a read races with another warp's write: no barrier between them", used, threads, wrong)

    def is_new(self, places: np.ndarray) -> np.ndarray:
        """Bytes whose first write counts as one, whatever they held."""
        return np.zeros(places.shape, bool)

    def check_writes(self, places: np.ndarray, threads: np.ndarray, address: np.ndarray, changed: np.ndarray) -> None:
        if self.races is not None and not self.ordered and (wrong := self.races.writes(places, threads, changed)).any():
            what = "a write races with another warp's access: no barrier between them"
            raise AccessError(what, address[threads], threads, wrong)

    @staticmethod
    def _bytes(place: np.ndarray, size: int) -> np.ndarray:
        return place[:, None] + np.arange(size)


class AccessError(PtxError):
    def __init__(self, what: str, addresses: np.ndarray, threads: np.ndarray, wrong: np.ndarray) -> None:
        first = np.flatnonzero(wrong)[0]
        super().__init__(f"{what}: address {int(addresses[first]):#x}, thread {threads[first]} of the launch")


@dataclass(frozen=True)
class Pointer:
    """A place within an array, as an argument of a kernel."""

    array: np.ndarray
    offset: int = 0  # bytes


class GlobalMemory(Space):
    """The arrays that a kernel gets, each with a range of addresses of its own, aligned as in this process."""

    name = "global"

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays
        low = [array.ctypes.data % 256 for array in arrays]
        self.first = np.array([*low, 0], np.int64)  # offsets of the first byte within a buffer's range
        self.last = np.array([low_ + array.nbytes for low_, array in zip(low, arrays, strict=True)] + [0], np.int64)
        padded = -(-self.last // 256) * 256
        self.starts = np.concatenate([[0], padded.cumsum()[:-1]])
        self.content = np.zeros(int(padded.sum()) or 16, np.uint8)
        for array, content in zip(arrays, self._contents(), strict=True):
            content[:] = array.reshape(-1).view(np.uint8)

    def _contents(self) -> list[np.ndarray]:
        bounds = zip(self.starts + self.first, self.starts + self.last, strict=True)
        return [self.content[start:end] for start, end in bounds][:-1]

    def address(self, pointer: Pointer) -> int:
        index = next(i for i, array in enumerate(self.arrays) if array is pointer.array)
        return ((index + 1) << BUFFER_SHIFT) + int(self.first[index]) + pointer.offset

    def copy_back(self) -> None:
        """Write the memory back into the arrays."""
        for array, content in zip(self.arrays, self._contents(), strict=True):
            array.reshape(-1).view(np.uint8)[:] = content

    def place(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        buffer = (address >> np.uint64(BUFFER_SHIFT)).astype(np.int64) - 1
        offset = (address & np.uint64((1 << BUFFER_SHIFT) - 1)).astype(np.int64)
        buffer = np.where((buffer >= 0) & (buffer < len(self.arrays)), buffer, len(self.arrays))
        if (wrong := (offset < self.first[buffer]) | (offset + size > self.last[buffer])).any():
            raise AccessError(f"{size}-byte access out of bounds of every global buffer", address, threads, wrong)
        return self.starts[buffer] + offset


class SharedMemory(Space):
    """Shared memory of every CTA; each byte knows whether it was written, or waits for an asynchronous copy."""

    name = "shared"

    def __init__(self, ctas: int, size: int, threads_per_cta: int) -> None:
        self.size, self.threads_per_cta = size, threads_per_cta
        self.stride = -(-size // 16) * 16 + 16
        self.content = np.full(ctas * self.stride, 0xFF, np.uint8)  # NaN
        self.state = np.full(ctas * self.stride, UNWRITTEN, np.uint8)
        self.races: RaceDetector = RaceDetector(ctas, threads_per_cta // 32, ctas * self.stride)

    def place(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        if (wrong := address + np.uint64(size) > np.uint64(self.size)).any():
            raise AccessError(f"{size}-byte access out of {self.size} bytes of shared memory", address, threads, wrong)
        return threads // self.threads_per_cta * self.stride + address.astype(np.int64)

    def touch(self, place: np.ndarray, size: int, threads: np.ndarray, used: np.ndarray, writes: bool) -> None:
        if writes:
            self.mark(place, size, WRITTEN)
            return
        state = self.state.reshape(-1, size)[place // size]
        for code, what in ((UNWRITTEN, "before it is written"), (IN_FLIGHT, "while an asynchronous copy is in flight")):
            if (wrong := (state == code).any(1)).any():
                raise AccessError(f"shared memory is read {what}", used, threads, wrong)
        super().touch(place, size, threads, used, writes)

    def is_new(self, places: np.ndarray) -> np.ndarray:
        return self.state[places] != WRITTEN

    def mark(self, place: np.ndarray, size: int, state: int) -> None:
        self.state.reshape(-1, size)[place // size] = state


@dataclass
class Copy:
    """One cp.async of many threads. A thread's bytes land when a wait covers its warp's group."""

    address: np.ndarray  # in shared memory, of every thread
    data: np.ndarray  # (threads, 32-bit words)
    pending: np.ndarray  # threads whose bytes have not landed
    group: np.ndarray  # of every warp; -1 until it is committed


class AsyncCopies:
    """cp.async: the data is taken at the issue, the destination is unreadable until the wait."""

    def __init__(self, shared: SharedMemory, warps: int) -> None:
        self.shared = shared
        self.copies: list[Copy] = []
        self.committed = np.zeros(warps, np.int64)  # groups of every warp

    def issue(self, address: np.ndarray, data: np.ndarray, mask: np.ndarray) -> None:
        threads = np.flatnonzero(mask)
        size = data.shape[1] * data.dtype.itemsize
        place = self.shared._slots(address, size, threads, writes=True) * size
        places = place[:, None] + np.arange(size)
        self.shared.check_writes(places, threads, address, np.ones(places.shape, bool))
        self.shared.mark(place, size, IN_FLIGHT)
        self.copies.append(Copy(address, data, mask.copy(), np.full(len(self.committed), -1)))

    def commit(self, warps: np.ndarray) -> None:
        for copy in self.copies:
            copy.group = np.where(warps & (copy.group < 0), self.committed, copy.group)
        self.committed = self.committed + warps

    def wait(self, warps: np.ndarray, in_flight: int) -> None:
        """Land all groups of `warps` but the latest `in_flight`."""
        for copy in self.copies:
            done = warps & (copy.group >= 0) & (copy.group < self.committed - in_flight)
            landing = copy.pending & np.repeat(done, 32)
            if landing.any():
                self.shared.store(copy.address, copy.data, landing)
                copy.pending = copy.pending & ~landing
        self.copies = [copy for copy in self.copies if copy.pending.any()]

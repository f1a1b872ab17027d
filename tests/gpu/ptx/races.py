"""Races between warps in shared memory, found in any schedule by what barriers order.

Every warp has a clock that advances at barriers, and a vector of the clocks of all warps of its CTA that barriers have
told it. An access races with an earlier one by another warp, of which one is a write, if its warp has not been
told of the other's clock since. Writes that leave a byte as it is are no races.

Source: Flanagan and Freund 2009, "FastTrack: Efficient and Precise Dynamic Race Detection",
doi:10.1145/1542476.1542490.
"""

from __future__ import annotations

import numpy as np


class RaceDetector:
    def __init__(self, ctas: int, warps_per_cta: int, size: int) -> None:
        """size: bytes of the shared memory of all CTAs"""
        self.warps = warps_per_cta
        self.told = np.tile(np.eye(warps_per_cta, dtype=np.int32), (ctas, 1, 1))  # (CTA, warp, clock of each warp)
        self.writer = np.full(size, -1, np.int16)
        self.written = np.zeros(size, np.int32)  # the writer's clock
        self.read = np.zeros((size, warps_per_cta), np.int32)  # each warp's clock at its last read
        self.gathered: dict[tuple[int, int], np.ndarray] = {}  # (CTA, barrier) -> clocks of those that arrived

    def _who(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Warp within its CTA, its clock, and what it was told, of each thread."""
        cta, warp = threads // 32 // self.warps, threads // 32 % self.warps
        told = self.told[cta, warp]
        return warp, told[np.arange(len(threads)), warp], told

    def _after_write(self, places: np.ndarray, told: np.ndarray) -> np.ndarray:
        """(accesses, bytes) whether the last write is one that the warp was not told of."""
        writer = self.writer[places]
        return (writer >= 0) & (self.written[places] > np.take_along_axis(told, np.maximum(writer, 0), 1))

    def reads(self, places: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """(accesses,) which of these reads race. places: (accesses, bytes) of each thread's access"""
        warp, clock, told = self._who(threads)
        races = self._after_write(places, told).any(1)
        self.read[places, warp[:, None]] = clock[:, None]
        return races

    def writes(self, places: np.ndarray, threads: np.ndarray, changed: np.ndarray) -> np.ndarray:
        """(accesses,) which of these writes race. changed: (accesses, bytes) where they alter a byte"""
        warp, clock, told = self._who(threads)
        read_since = (self.read[places] > told[:, None, :]).any(2)
        races = (changed & (read_since | self._after_write(places, told))).any(1)
        places = places[changed]
        self.writer[places] = np.broadcast_to(warp[:, None], changed.shape)[changed]
        self.written[places] = np.broadcast_to(clock[:, None], changed.shape)[changed]
        return races

    def arrive(self, cta: int, barrier: int, warps: np.ndarray) -> None:
        """Warps of a CTA leave their clocks at a barrier, and go on to the next."""
        before = self.gathered.get((cta, barrier), np.zeros(self.warps, np.int32))
        self.gathered[cta, barrier] = np.maximum(before, self.told[cta, warps].max(0))
        self.told[cta, warps, warps] += 1

    def leave(self, cta: int, barrier: int, warps: np.ndarray) -> None:
        """Warps that waited are told the clocks of all that arrived."""
        self.told[cta, warps] = np.maximum(self.told[cta, warps], self.gathered.pop((cta, barrier)))

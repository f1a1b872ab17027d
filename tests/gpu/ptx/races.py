"""Races between warps, found in any schedule by what barriers, releases and acquires order.

Every warp has a clock that advances when it tells the others of what it did, at barriers and releases, and a vector of
the clocks of the warps of its group that it was told. An access races with an earlier one by another warp, of
which one is a write, if its warp has not been told of the other's clock since. Writes that leave a byte as it is are
no races.

In shared memory a group is a CTA. In global memory it is the launch, and clocks also pass through words: one that is
written by a release hands the writer's clocks to those who read it with an acquire, both at least of the scope of the
GPU; a fence of that scope makes releases of the writes after it, and acquires of the reads before it.

Source: Flanagan and Freund 2009, "FastTrack: Efficient and Precise Dynamic Race Detection",
doi:10.1145/1542476.1542490.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np


class RaceDetector:
    def __init__(self, groups: int, warps: int, size: int) -> None:
        """warps: of a group; size: bytes of the memory of all groups"""
        self.warps = warps
        self.told = np.tile(np.eye(warps, dtype=np.int32), (groups, 1, 1))  # (group, warp, clock of each warp)
        self.writer = np.full(size, -1, np.int16)
        self.written = np.zeros(size, np.int32)  # the writer's clock
        self.read = np.zeros((size, warps), np.int32)  # each warp's clock at its last read
        self.gathered: dict[tuple[int, Hashable], np.ndarray] = {}  # (group, barrier) -> clocks of those that arrived
        self.released: dict[int, np.ndarray] = {}  # word -> clocks that an acquire of it is told
        self.fenced = np.zeros((warps, warps), np.int32)  # clocks at each warp's last fence, for its writes to release
        self.seen = np.zeros((warps, warps), np.int32)  # clocks that each warp's next fence acquires

    def _who(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Warp within its group, its clock, and what it was told, of each thread."""
        group, warp = threads // 32 // self.warps, threads // 32 % self.warps
        told = self.told[group, warp]
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

    def arrive(self, group: int, barrier: Hashable, warps: np.ndarray) -> None:
        """Warps of a group leave their clocks at a barrier, and go on to the next."""
        before = self.gathered.get((group, barrier), np.zeros(self.warps, np.int32))
        self.gathered[group, barrier] = np.maximum(before, self.told[group, warps].max(0))
        self.told[group, warps, warps] += 1

    def leave(self, group: int, barrier: Hashable, warps: np.ndarray) -> None:
        """Warps that waited are told the clocks of all that arrived."""
        self.told[group, warps] = np.maximum(self.told[group, warps], self.gathered.pop((group, barrier)))

    # Words through which warps of the only group pass their clocks on.

    def publish(self, word: int, warp: int, release: bool, replaces: bool) -> None:
        """A strong write; one that `replaces` what was there, rather than change it, ends what others released."""
        clocks = self.fenced[warp]
        if not replaces and word in self.released:
            clocks = np.maximum(clocks, self.released[word])
        if release:
            clocks = np.maximum(clocks, self.told[0, warp])
            self.told[0, warp, warp] += 1
        self.released[word] = clocks

    def observe(self, word: int, warp: int, acquire: bool) -> None:
        """A strong read."""
        clocks = self.released.get(word, np.zeros(self.warps, np.int32))
        target = self.told[0] if acquire else self.seen
        target[warp] = np.maximum(target[warp], clocks)

    def fence(self, warps: np.ndarray) -> None:
        self.told[0, warps] = np.maximum(self.told[0, warps], self.seen[warps])
        self.fenced[warps] = self.told[0, warps]
        self.told[0, warps, warps] += 1

"""Which threads run next. A schedule is asked at every basic block, so that a run with a seed repeats exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class LockStep:
    """All warps of all CTAs together, those behind first: the fastest to simulate."""

    def start(self, ctas: int, warps_per_cta: int) -> None:
        pass

    def choose(self, runnable: np.ndarray, polling: np.ndarray) -> np.ndarray:
        """(CTAs, warps per CTA) warps that may run, out of those that can.

        polling: those that executed an atomic or an ordered load since they were last chosen; they may spin
        until another warp writes, and let the others go first.
        """
        others = runnable & ~polling
        return others if others.any() else runnable


@dataclass
class Adversarial:
    """One warp of a CTA runs, mostly as far as it can get, while the others of its CTA stand still.

    Then another is drawn. Now and then a warp is stopped after a few blocks, or a whole CTA rests.
    """

    seed: int
    patience: tuple[int, ...] = (1, 3, 1000, 1000, 1000)  # blocks until another warp is drawn; one is drawn
    rest: float = 0.125  # probability that a CTA rests instead
    generator: np.random.Generator = field(init=False, repr=False)
    warp: np.ndarray = field(init=False, repr=False)  # of each CTA; -1 for none
    left: np.ndarray = field(init=False, repr=False)  # blocks until another draw

    def start(self, ctas: int, warps_per_cta: int) -> None:
        self.generator = np.random.default_rng(self.seed)
        self.warp = np.full(ctas, -1)
        self.left = np.zeros(ctas, np.int64)

    def choose(self, runnable: np.ndarray, polling: np.ndarray) -> np.ndarray:
        chosen = np.zeros_like(runnable)
        for cta in np.flatnonzero(runnable.any(1)):
            warp = self.warp[cta]
            if self.left[cta] <= 0 or (warp >= 0 and not runnable[cta, warp]):
                rests = self.generator.random() < self.rest
                warp = -1 if rests else self.generator.choice(np.flatnonzero(runnable[cta]))
                self.warp[cta], self.left[cta] = warp, self.generator.choice(self.patience)
            self.left[cta] -= 1
            if warp >= 0:
                chosen[cta, warp] = True
        return chosen

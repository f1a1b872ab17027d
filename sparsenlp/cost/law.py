"""How the time of one linear layer depends on its sizes: laws that are linear in their coefficients, and their fit.

A coefficient is seconds per unit of a feature and never negative, so that more work never takes less time. The
features follow what the kernels do; how many tokens a kernel takes at once is found by the fit as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

import numpy as np

PAGE = 4096
"""Bytes; rows of x that are a multiple of this apart fall into the same few lines of the first cache."""

FAR = 4
"""Weights of so many times a core's cache come from farther away: its share of the next cache, or memory."""
CLEARLY_LESS = 0.9
"""Share of the error that another way of taking the tokens must come down to, to be believed over a likelier one."""
REWEIGHTINGS = 6
NEGLIGIBLE = 0.02
"""A relative error about which nothing need be done."""


@dataclass(frozen=True)
class Work:
    """One call of a linear layer: (tokens, columns) in, (tokens, rows) out, `stored` weights (all, if dense)."""

    tokens: int
    rows: int
    columns: int
    stored: int


@dataclass(frozen=True)
class Setup:
    """What does not change within a law: threads, bytes of an input and of a weight, bytes of the cache of a core."""

    threads: int
    input_bytes: int
    weight_bytes: int
    cache_bytes: int

    def beyond_cache(self, work: Work, caches: int = 1) -> float:
        """Bytes of a thread's weights that `caches` times its own cache cannot hold."""
        return max(0.0, work.stored * self.weight_bytes / self.threads - caches * self.cache_bytes)


@dataclass(frozen=True)
class Steps:
    """How a sparse kernel takes its tokens.

    few      up to so many it takes 8, 4, 2, 1 at a time, and streams the weights for each
    narrow   tokens that the last tile is padded to a multiple of
    tile     tokens of a whole tile
    serial   multiply-adds up to which it stays on one thread
    """

    few: int
    narrow: int
    tile: int
    serial: int

    def tiles(self, tokens: int) -> tuple[int, int]:
        """(whole tiles, tokens of the last one, 0 if it is whole)."""
        whole, rest = divmod(tokens, self.tile)
        padded = -(-rest // self.narrow) * self.narrow
        return (whole + 1, 0) if padded == self.tile else (whole, padded)

    @classmethod
    def candidates(cls, threads: int) -> Iterable[Steps]:
        """The likely ones first."""
        serial = (0,) if threads == 1 else (1 << 16, 1 << 14, 1 << 18)
        for few, narrow, count, limit in product((8, 4, 12), (16, 8), (2, 1, 3, 4), serial):
            yield cls(few, narrow, narrow * count, limit)


@dataclass(frozen=True)
class SparseLaw:
    """Seconds of a block-sparse layer of one dtype and block shape; `few` and `many` are coefficients, s per unit.

    few tokens   s = overhead + pack * M K + multiply * (passes, M) nnz + output * (passes, M) N + memory
    many tokens  s = overhead + pack * K tokens packed (more if rows of x collide in the cache)
                     + multiply * nnz tokens (whole tiles, last tile) + output * N (tiles, M) + memory

    Memory is what the cache of a core cannot hold: of the weights, in each pass over them, and of x and y together.
    Work is shared by the threads, but for packing: a thread packs each tile that it has a part of.
    """

    setup: Setup
    steps: Steps
    few: tuple[float, ...]
    many: tuple[float, ...]

    FEW = ("overhead", "overhead", "pack", "multiply", "multiply", "output", "output", "memory")
    MANY = ("overhead", "overhead", "pack", "pack", "multiply", "multiply", "output", "output", "memory", "memory")

    @classmethod
    def fit(cls, setup: Setup, works: Sequence[Work], seconds: Sequence[float]) -> SparseLaw:
        """The law with the least relative errors. Raises ValueError without work, or for times not above 0."""
        _check_samples(works, seconds)
        times = np.array(seconds)
        chosen: tuple[float, Steps] | None = None
        for steps in Steps.candidates(setup.threads):
            error = sum(cls._coefficients(setup, steps, works, times, few, 1)[1] for few in (True, False))
            if chosen is None or error < CLEARLY_LESS * chosen[0]:
                chosen = error, steps
        assert chosen is not None
        few, many = (cls._coefficients(setup, chosen[1], works, times, few)[0] for few in (True, False))
        return cls(setup, chosen[1], few, many)

    @classmethod
    def _coefficients(
        cls, setup: Setup, steps: Steps, works: Sequence[Work], times: np.ndarray, few: bool, rounds: int = REWEIGHTINGS
    ) -> tuple[tuple[float, ...], float]:
        """(coefficients, their error) of the works with few tokens, or of those with many."""
        chosen = [i for i, work in enumerate(works) if (work.tokens <= steps.few) == few]
        features = np.array([_sparse_features(works[i], setup, steps) for i in chosen])
        found, error = relative_fit(features.reshape(-1, len(cls.FEW if few else cls.MANY)), times[chosen], rounds)
        return tuple(found.tolist()), error

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by what they are spent on: overhead, pack, multiply, output, memory."""
        few = work.tokens <= self.steps.few
        features = _sparse_features(work, self.setup, self.steps)
        return _sum_parts(self.FEW if few else self.MANY, features, self.few if few else self.many)

    def predict(self, work: Work) -> float:
        """Seconds."""
        return sum(self.parts(work).values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SparseLaw:
        """The law that `as_dict` wrote, every field checked: raises ValueError."""
        _check_keys("SparseLaw", data, cls)
        steps = Steps(**_integers("steps", data["steps"], Steps, least=0))
        if min(steps.narrow, steps.tile) < 1 or steps.tile % steps.narrow:
            raise ValueError(f"SparseLaw: expected tiles of a multiple of narrow tokens, got {steps}")
        few = _coefficients("few", data["few"], len(cls.FEW))
        return cls(_setup(data["setup"]), steps, few, _coefficients("many", data["many"], len(cls.MANY)))


@dataclass(frozen=True)
class DenseLaw:
    """Seconds of a dense layer: at each of `tokens` overhead + multiply * N K + memory; in between, interpolated.

    The library behind it changes its ways with the number of tokens, so each measured number has its own line.
    Beyond the last one every further token costs what it did between the last two.
    """

    setup: Setup
    tokens: tuple[int, ...]
    lines: tuple[tuple[float, ...], ...]

    PARTS = ("overhead", "multiply", "memory", "memory")

    @classmethod
    def fit(cls, setup: Setup, works: Sequence[Work], seconds: Sequence[float]) -> DenseLaw:
        """A line for each number of tokens. Raises ValueError for fewer than two, or for times not above 0."""
        _check_samples(works, seconds)
        tokens = sorted({work.tokens for work in works})
        if len(tokens) < 2:
            raise ValueError(f"DenseLaw: expected at least two numbers of tokens, got {len(tokens)}")
        lines = []
        for count in tokens:
            chosen = [i for i, work in enumerate(works) if work.tokens == count]
            features = np.array([_dense_features(works[i], setup) for i in chosen])
            lines.append(tuple(relative_fit(features, np.array([seconds[i] for i in chosen]))[0].tolist()))
        return cls(setup, tuple(tokens), tuple(lines))

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by what they are spent on; a part may be negative where it is extrapolated, their sum is not."""
        features = np.array(_dense_features(work, self.setup))
        rows = np.array(self.lines) * features
        at = int(np.searchsorted(self.tokens, work.tokens, side="right"))
        low = min(max(at - 1, 0), len(self.tokens) - 2)
        start, stop = self.tokens[low], self.tokens[low + 1]
        share = max(0.0, (work.tokens - start) / (stop - start))
        step = rows[low + 1] - rows[low]
        if share > 1 and step.sum() < 0:
            step = np.zeros_like(step)
        values = rows[low] + share * step if share <= 1 else rows[low + 1] + (share - 1) * step
        return _sum_parts(self.PARTS, values.tolist(), (1.0,) * len(self.PARTS))

    def predict(self, work: Work) -> float:
        """Seconds."""
        return sum(self.parts(work).values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> DenseLaw:
        """The law that `as_dict` wrote, every field checked: raises ValueError."""
        _check_keys("DenseLaw", data, cls)
        tokens, lines = data["tokens"], data["lines"]
        if not isinstance(tokens, list) or not all(type(count) is int and count > 0 for count in tokens):
            raise ValueError(f"DenseLaw: expected tokens as positive integers, got {tokens!r}")
        if len(tokens) < 2 or sorted(set(tokens)) != tokens:
            raise ValueError(f"DenseLaw: expected at least two tokens, increasing, got {tokens}")
        if not isinstance(lines, list) or len(lines) != len(tokens):
            raise ValueError(f"DenseLaw: expected {len(tokens)} lines, got {lines!r}")
        width = len(cls.PARTS)
        return cls(_setup(data["setup"]), tuple(tokens), tuple(_coefficients("lines", line, width) for line in lines))


Law = SparseLaw | DenseLaw


def relative_fit(features: np.ndarray, seconds: np.ndarray, rounds: int = REWEIGHTINGS) -> tuple[np.ndarray, float]:
    """(c, e): c >= 0 that about minimizes e = sum of |features c - seconds| / seconds.

    Absolute errors, not squared ones, because some times are far too long on a machine that does something else as
    well: least squares, reweighted. features (samples, width), seconds (samples,) above 0; a column of zeros gets
    the coefficient 0.
    """
    if not len(seconds):
        return np.zeros(features.shape[1]), 0.0
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    weights = np.ones(len(seconds))
    for _ in range(rounds):
        found = _nonnegative_least_squares(relative / scale * weights[:, None], weights) / scale
        residual = np.abs(relative @ found - 1)
        weights = 1 / np.sqrt(np.maximum(residual, NEGLIGIBLE))
    return found, float(residual.sum())


def _nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min |a x - b| over x >= 0, by Lawson and Hanson's active sets (Solving Least Squares Problems, 1974, ch. 23)."""
    width = a.shape[1]
    x = np.zeros(width)
    free = np.zeros(width, dtype=bool)
    for _ in range(3 * width):
        gradient = np.where(free, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= 1e-10:
            break
        free[gradient.argmax()] = True
        while free.any():
            target = np.zeros(width)
            target[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if target[free].min() > 0:
                x = target
                break
            blocked = free & (target <= 0)
            gap = x[blocked] - target[blocked]
            reach = np.divide(x[blocked], gap, out=np.zeros_like(gap), where=gap > 0).min()
            x = x + reach * (target - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return x


def _sparse_features(work: Work, setup: Setup, steps: Steps) -> list[float]:
    tokens, rows, columns, stored = work.tokens, work.rows, work.columns, work.stored
    parallel = setup.threads > 1 and tokens * (stored + rows) > steps.serial
    threads = setup.threads if parallel else 1
    beyond = setup.beyond_cache(work)
    if tokens <= steps.few:
        passes = tokens // 8 + (tokens % 8).bit_count()
        shared = [stored * passes, stored * tokens, rows * passes, rows * tokens]
        return [1.0, float(parallel), columns * tokens, *(value / threads for value in shared), beyond * passes]
    whole, last = steps.tiles(tokens)
    tiles = whole + (last > 0)
    packed = columns * (whole * steps.tile + last) / tiles * -(-tiles // threads)
    colliding = packed if columns * setup.input_bytes % PAGE == 0 else 0.0
    shared = [stored * whole * steps.tile, stored * last, rows * tiles, rows * tokens]
    traffic = max(0.0, tokens * (columns + rows) * setup.input_bytes / threads - setup.cache_bytes)
    return [1.0, float(parallel), packed, colliding, *(value / threads for value in shared), beyond * tiles, traffic]


def _dense_features(work: Work, setup: Setup) -> list[float]:
    return [1.0, work.rows * work.columns, setup.beyond_cache(work), setup.beyond_cache(work, FAR)]


def _sum_parts(names: Sequence[str], features: Sequence[float], coefficients: Sequence[float]) -> dict[str, float]:
    parts = dict.fromkeys(names, 0.0)
    for name, feature, coefficient in zip(names, features, coefficients, strict=True):
        parts[name] += feature * coefficient
    return parts


def _check_samples(works: Sequence[Work], seconds: Sequence[float]) -> None:
    if not works or len(works) != len(seconds):
        raise ValueError(f"fit: expected as many times as works, at least one, got {len(seconds)} and {len(works)}")
    if not min(seconds) > 0:
        raise ValueError(f"fit: expected times above 0, got {min(seconds)}")


def _setup(data: Any) -> Setup:
    return Setup(**_integers("setup", data, Setup, least=1))


def _check_keys(name: str, data: Any, cls: type) -> None:
    expected = {field.name for field in fields(cls)}
    if not isinstance(data, dict) or data.keys() != expected:
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{name}: expected the fields {sorted(expected)}, got {got}")


def _integers(name: str, data: Any, cls: type, least: int) -> dict[str, int]:
    _check_keys(name, data, cls)
    for key, value in data.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected {key} as an integer of at least {least}, got {value!r}")
    return data


def _coefficients(name: str, data: Any, count: int) -> tuple[float, ...]:
    if not isinstance(data, list) or len(data) != count:
        raise ValueError(f"{name}: expected {count} coefficients, got {data!r}")
    if not all(type(value) in (int, float) and 0 <= value < float("inf") for value in data):
        raise ValueError(f"{name}: expected coefficients that are finite and at least 0, got {data}")
    return tuple(map(float, data))

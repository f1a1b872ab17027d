"""Calibrations are kept per machine in a file that is checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import native
from ..files import read_regular
from ..measure import machine, use_threads, watch_cpu
from .calibration import SECONDS, calibrate
from .model import CostModel, Fitted, Kind

FORMAT = 3
"""Version of the file and of the laws in it: raise it when their features change."""

LARGEST_FILE = 2**22

WORTH_KEEPING = 0.5
"""A calibration with a larger error (p90) was made while the machine was busy: it is used once, and not kept."""

UNDISTURBED = 0.9
"""Nor is one during which this process had a CPU for less of the time."""


def calibrated(
    kinds: Iterable[Kind],
    threads: int | None = None,
    directory: Path | str | None = None,
    keep: bool = True,
    seconds: float = SECONDS,
) -> CostModel:
    """The cost model of this machine for some kinds of layers, calibrating those that the cache does not have.

    threads    torch threads, None for the present number
    directory  of the cache; None for $XDG_CACHE_HOME/sparsenlp or ~/.cache/sparsenlp
    keep       False: neither read nor write the cache
    seconds    of calibration for each kind that is missing

    A calibration on a busy machine, as its error or the CPU time it got show, is not kept. A cache that cannot be
    read, is damaged or belongs to another machine is replaced, one that cannot be written is done without. A warning
    says so.
    """
    wanted = set(kinds)
    with use_threads(threads) as count:
        key = cache_key()
        path = Path(directory or default_directory()) / f"cost-{digest(key)}.json"
        known = _read(path, key) if keep else {}
        missing = wanted - known.keys()
        if missing:
            cpu_share = watch_cpu()
            found = calibrate(missing, count, seconds)
            if keep and _is_undisturbed(cpu_share()):
                good = {kind: entry for kind, entry in found.items() if _is_good(kind, entry)}
                _write(path, key, known | good)
            known |= found
    return CostModel(count, {kind: known[kind] for kind in sorted(wanted, key=str)})


def default_directory() -> Path:
    """$XDG_CACHE_HOME/sparsenlp, else ~/.cache/sparsenlp."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsenlp"


def cache_key() -> dict[str, Any]:
    """Everything a calibration depends on: the machine, torch's threads, versions, and the compiled kernels."""
    here = machine()
    names = ("cpu", "isa", "cores", "threads", "torch", "sparsenlp")
    return {"format": FORMAT, **{name: here[name] for name in names}, "kernels": native.fingerprint()}


def digest(key: dict[str, Any]) -> str:
    """16 hexadecimal digits for a file name."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: dict[str, Any]) -> dict[Kind, Fitted]:
    """What the file holds for this key; nothing, with a warning unless it does not exist, if it cannot be believed."""
    try:
        data = json.loads(read_regular(path, LARGEST_FILE))
        if (
            not isinstance(data, dict)
            or data.keys() != {"key", "kinds", "crc32"}
            or not isinstance(data["kinds"], dict)
        ):
            raise ValueError("expected an object with key, kinds and crc32")
        if data["crc32"] != _checksum(data["key"], data["kinds"]):
            raise ValueError("expected the laws that were written, got others")
        if data["key"] != key:
            raise ValueError("expected this machine's key, got another's")
        return {kind: Fitted.from_dict(kind, entry) for kind, entry in _kinds(data["kinds"])}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, not text, or a field that is wrong
        warnings.warn(f"cost cache: {path} is not used, calibrating again: {error}", stacklevel=3)
        return {}


def _is_undisturbed(cpu_share: float) -> bool:
    """Whether what was calibrated may be kept; a warning if not."""
    if cpu_share >= UNDISTURBED:
        return True
    warnings.warn(
        f"cost model: other processes took {1 - cpu_share:.0%} of the time of calibration, so it is not kept; "
        "predictions are better on an idle machine",
        stacklevel=3,
    )
    return False


def _is_good(kind: Kind, entry: Fitted) -> bool:
    """Whether it may be kept; a warning if not."""
    if entry.p90_error <= WORTH_KEEPING:
        return True
    warnings.warn(
        f"cost model: predictions for {kind} are {entry.p90_error:.0%} off (p90), so they are not kept; "
        "is the machine busy?",
        stacklevel=4,
    )
    return False


def _checksum(key: Any, kinds: Any) -> int:
    return zlib.crc32(json.dumps([key, kinds], sort_keys=True).encode())


def _kinds(entries: dict[str, Any]) -> list[tuple[Kind, Any]]:
    return [(Kind.parse(name), entry) for name, entry in entries.items()]


def _write(path: Path, key: dict[str, Any], fitted: dict[Kind, Fitted]) -> None:
    """Replace the file as a whole; a warning if that cannot be done."""
    kinds = {str(kind): entry.as_dict() for kind, entry in fitted.items()}
    data = {"key": key, "kinds": kinds, "crc32": _checksum(key, kinds)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        warnings.warn(f"cost cache: cannot write {path}, so the next run calibrates again: {error}", stacklevel=3)

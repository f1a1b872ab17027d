"""What is done: one JSON file per stage, which holds only as long as everything it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..version import __version__
from .config import DemoConfig
from .stages import Context, OnProgress, Stage


def record_file(directory: Path, name: str) -> Path:
    return directory / "records" / f"{name}.json"


def result_of(directory: Path, name: str) -> Any:
    """What a stage that is done returned."""
    return _read(directory, name)["result"]


def seconds_of(directory: Path, name: str) -> float:
    """How long a stage that is done took when it was done."""
    return float(_read(directory, name)["seconds"])


def is_done(directory: Path, stage: Stage) -> bool:
    """Whether a stage's record is there, its inputs and settings are those of the record, and its outputs exist."""
    wanted = identity(directory, stage)
    file = record_file(directory, stage.name)
    if wanted is None or not file.is_file() or not all((directory / output).is_file() for output in stage.outputs):
        return False
    return bool(_read(directory, stage.name)["identity"] == wanted)


def identity(directory: Path, stage: Stage) -> str | None:
    """A digest of the settings, the version and the records of the stages it needs; None if one of them is missing."""
    digest = hashlib.sha256(json.dumps([stage.name, __version__, stage.settings], sort_keys=True).encode())
    for need in stage.needs:
        file = record_file(directory, need)
        if not file.is_file():
            return None
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_stage(directory: Path, config: DemoConfig, stage: Stage, progress: OnProgress) -> None:
    """Do a stage, write its record, and remove the files it would have resumed from.

    Raises RuntimeError if a stage that it needs is not done.
    """
    own = identity(directory, stage)
    if own is None:
        raise RuntimeError(f"demo: expected {', '.join(stage.needs)} to be done before {stage.name}")
    record_file(directory, stage.name).unlink(missing_ok=True)
    started = time.perf_counter()
    state = directory / "work" / f"{stage.name}.{own[:12]}.state"
    result = stage.run(Context(directory, config, state, progress))
    record = {"identity": own, "seconds": time.perf_counter() - started, "result": result}
    write_json(record_file(directory, stage.name), record)
    for left in (directory / "work").glob(f"{stage.name}.*.state"):
        left.unlink()


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """All or nothing."""
    write_text(file, json.dumps(data, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """All or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _read(directory: Path, name: str) -> dict[str, Any]:
    """Raises ValueError for a damaged record."""
    file = record_file(directory, name)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"demo: expected JSON in {file}, got {error}; remove the file to do {name} again") from None
    return dict(record)

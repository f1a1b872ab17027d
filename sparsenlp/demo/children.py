"""Stages in processes of their own: they start fresh, report progress, and stop so that they can be resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .config import DemoConfig
from .records import is_done, run_stage
from .stages import stages_of

CONFIG_FILE = "demo.json"
PATIENCE = 60.0
"""Seconds that a process gets to save its state after Ctrl-C."""

OnEvent = Callable[[dict[str, Any]], None]
"""Told {"stage", "done", "total", "note"} for each bit of progress, and {"stage", "finished"} at the end of a stage."""


def do_stages(directory: Path, names: Sequence[str], on_event: OnEvent) -> None:
    """Do those of the stages, in this order and process, that are not done."""
    config = DemoConfig.read(directory / CONFIG_FILE)
    stages = stages_of(config)
    for name in names:
        if not is_done(directory, stages[name]):
            on_event({"stage": name, "done": 0, "total": 0, "note": ""})
            run_stage(
                directory,
                config,
                stages[name],
                lambda done, total, note: on_event({"stage": name, "done": done, "total": total, "note": note}),  # noqa: B023
            )
        on_event({"stage": name, "finished": True})


class Child:
    """A process that does some stages: `python -m sparsenlp.demo DIRECTORY THREADS STAGE ...`.

    It has a session of its own, so that Ctrl-C at a terminal reaches only the parent, which passes it on once.
    """

    def __init__(self, directory: Path, names: Sequence[str], threads: int, events: SimpleQueue) -> None:
        self.names = names
        self.log = directory / "work" / f"{names[0]}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sparsenlp.demo", str(directory), str(threads), *names]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, events: SimpleQueue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put(json.loads(line))

    @property
    def running(self) -> bool:
        return self.process.poll() is None or self._reader.is_alive()

    def interrupt(self) -> None:
        """As Ctrl-C."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    def check(self) -> None:
        """Raise RuntimeError with the last line of its log if it ended badly."""
        if self.process.returncode:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {self.process.returncode}"
            raise RuntimeError(f"demo: {self.names[0]} failed: {reason} (see {self.log})")


def run_children(directory: Path, groups: Sequence[Sequence[str]], threads: int, on_event: OnEvent) -> None:
    """One process for each group of stages, all at the same time, `threads` threads in all.

    On Ctrl-C and if one fails, the others are asked to stop, which saves their state. Raises RuntimeError if one
    fails, KeyboardInterrupt on Ctrl-C.
    """
    events: SimpleQueue = SimpleQueue()
    children: list[Child] = []
    try:
        for names in groups:
            children.append(Child(directory, names, max(1, threads // len(groups)), events))
        while any(child.running for child in children):
            with suppress(Empty):
                on_event(events.get(timeout=0.1))
            for child in children:
                child.check()
        while not events.empty():
            on_event(events.get())
        for child in children:
            child.check()
    finally:
        _stop(children)


def _stop(children: Sequence[Child]) -> None:
    """Interrupt what still runs, wait until it has saved its state, and kill it if that takes too long."""
    for child in children:
        if child.running:
            child.interrupt()
    end = time.monotonic() + PATIENCE
    try:
        while any(child.running for child in children) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        for child in children:
            child.kill()
            child.process.wait()

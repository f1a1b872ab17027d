"""Ctrl-C, and SIGTERM as it, end a run between two steps, where the training state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler or a container sends before it kills."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the `with` block SIGTERM raises Terminated, unless the program handles or ignores it otherwise."""
    if not _is_main() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class InterruptRequest:
    """Within its `with` block the first SIGINT or SIGTERM only sets `pending`; a second one raises at once.

    pending  KeyboardInterrupt or Terminated, None before; raised at the end of a block that did not see to it

    A program's own handler of SIGTERM stays in force. Outside the main thread, where Python delivers no signals, none
    of this holds.
    """

    def __init__(self) -> None:
        self.pending: type[KeyboardInterrupt] | None = None

    def __enter__(self) -> InterruptRequest:
        numbers = [signal.SIGINT] if _is_main() else []
        if numbers and signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _terminate):
            numbers.append(signal.SIGTERM)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.pending is not None and kind is None:
            raise self.pending("stopped after the last step")

    def _request(self, number: int, frame: FrameType | None) -> None:
        error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.pending is not None:
            raise error
        self.pending = error


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()

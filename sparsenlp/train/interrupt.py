"""Ctrl-C as a request to stop between two steps, where the training state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptRequest:
    """Within its `with` block the first SIGINT only sets `pending`; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> InterruptRequest:
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True

"""Opening files that others may have put there: only regular ones, and none larger than what is read of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

TABLE_BYTES = 4 * 2**30
"""The largest table of texts that is read; its rows are kept in memory."""


def open_regular(path: str | Path, limit: int | None, mode: str = "r", **options: Any) -> IO[Any]:
    """`open` for reading, where a pipe, a socket or a device is refused at once and never waited for.

    limit    bytes that the file may have; None for any number
    options  of `open`

    Raises OSError as `open`, and ValueError for another kind of file or a larger one.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: expected a regular file, got {_kind(found.st_mode)}")
        if limit is not None and found.st_size > limit:
            raise ValueError(f"{path}: expected at most {limit:,} bytes, got {found.st_size:,}")
        return open(descriptor, mode, **options)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, limit: int) -> bytes:
    """The content of a file. Raises as `open_regular`, also for a file that grows beyond the limit meanwhile."""
    with open_regular(path, limit, "rb") as file:
        content: bytes = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit:,} bytes, got more")
    return content


def _kind(mode: int) -> str:
    kinds = {"a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, matches in kinds.items() if matches(mode)), "a device")

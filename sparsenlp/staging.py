"""Replace a directory as a whole: written beside it, flushed to disk, then exchanged with it in one step.

Where the system has no such step (it is Linux's renameat2), there are two renames, and between them no directory. A
directory that cannot be renamed, as a mount point or the working directory of this process, has its files replaced one
by one. What a process leaves behind that was killed is removed by the next one that saves to the same place: each holds
a lock on its staging directory for as long as it lives.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV)
CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
STALE_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Files of an earlier save that would be taken for part of this one."""


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory that takes the place of `directory` when the block ends well, and vanishes when it does not.

    Other files of the old directory go along, as hard links or copies.

    Raises NotADirectoryError if `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_pretrained: expected a directory, got a file: {directory}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    staging, lock = _stage(directory)
    try:
        yield staging
        _finish(staging)
        _publish(staging, directory)
        _flush(directory.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # by now the old directory, unless something went wrong
        os.close(lock)


def _prefix(directory: Path) -> str:
    return f".{directory.name[:200]}.saving-"


def _stage(directory: Path) -> tuple[Path, int]:
    """(an empty directory beside it, the descriptor that holds its lock)."""
    while True:
        staging = directory.parent / f"{_prefix(directory)}{os.getpid()}-{secrets.token_hex(4)}"
        staging.mkdir()
        lock = _lock(staging)
        if lock is not None and staging.exists():  # else somebody took it for stale before it was locked
            return staging, lock
        if lock is not None:
            os.close(lock)


def _sweep(directory: Path) -> None:
    """Remove what dead processes left."""
    for name in os.listdir(directory.parent):
        left = directory.parent / name
        if name.startswith(_prefix(directory)) and left.is_dir() and (lock := _lock(left)) is not None:
            if _can_lock(lock):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path, wait: bool = False) -> int | None:
    """The descriptor of a locked directory, None if it is gone or locked by somebody else.

    Where directories cannot be locked, as on some network file systems, the descriptor alone.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            os.close(descriptor)
            raise
    return descriptor


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (AttributeError, OSError):
        return False
    return True


def _finish(staging: Path) -> None:
    """Usual modes, and everything on disk."""
    plain = os.stat(staging).st_mode & 0o666
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(plain)  # safetensors leaves its files readable by the owner only
        _flush(path)
    _flush(staging)


def _publish(staging: Path, directory: Path) -> None:
    """Put `staging` in the place of `directory`; what was there, if anything, is then at `staging`."""
    while True:
        if not directory.exists():
            with suppress(FileExistsError):  # then somebody else was first
                _rename_new(staging, directory)
                return
        lock = _lock(directory, wait=True)
        if lock is None:
            continue
        try:
            if os.path.samestat(os.fstat(lock), os.stat(directory)):  # else replaced while we waited
                _replace(staging, directory)
                return
        except FileNotFoundError:
            continue
        finally:
            os.close(lock)


def _replace(staging: Path, directory: Path) -> None:
    if _is_working_directory(directory):
        _replace_files(staging, directory)
        return
    _carry_over(directory, staging)
    _flush(staging)
    try:
        _exchange(staging, directory)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        _replace_files(staging, directory)


def _carry_over(old: Path, new: Path, top: bool = True) -> None:
    """Link what only the old directory has into the new one, stale weights of its own excepted."""
    shutil.copymode(old, new)
    for entry in os.scandir(old):
        target = new / entry.name
        if os.path.lexists(target) and entry.is_dir(follow_symlinks=False) and target.is_dir():
            _carry_over(Path(entry.path), target, top=False)
        elif os.path.lexists(target) or (top and STALE_WEIGHTS.fullmatch(entry.name)):
            continue
        elif entry.is_dir(follow_symlinks=False):
            target.mkdir()
            _carry_over(Path(entry.path), target, top=False)
        else:
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(entry.path, target, follow_symlinks=False)


def _replace_files(staging: Path, directory: Path) -> None:
    """Each by itself: a reader may see some of them old and some new."""
    paths = [path for path in staging.rglob("*") if not path.is_dir()]
    for path in paths:
        target = directory / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    new = {path.name for path in paths}
    for path in directory.iterdir():
        if STALE_WEIGHTS.fullmatch(path.name) and path.name not in new:
            path.unlink()
    _flush(directory)


def _is_working_directory(directory: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(directory)
    except OSError:
        return False


def _rename_new(staging: Path, directory: Path) -> None:
    """Raises FileExistsError if something has come there."""
    if not _renameat2(staging, directory, RENAME_NOREPLACE):
        try:
            os.rename(staging, directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(directory)) from None


def _exchange(staging: Path, directory: Path) -> None:
    if _renameat2(staging, directory, RENAME_EXCHANGE):
        return
    spare = staging.with_name(f"{staging.name}-old")
    os.rename(directory, spare)
    try:
        os.rename(staging, directory)
    except BaseException:
        os.rename(spare, directory)
        raise
    os.rename(spare, staging)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Whether the system could do that at all; OSError if it failed."""
    function = getattr(_libc(), "renameat2", None)
    if function is None:
        return False
    if not function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag):
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _flush(path: Path) -> None:
    """fsync a file, or on POSIX a directory."""
    if path.is_symlink() or (os.name != "posix" and path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

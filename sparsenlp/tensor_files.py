"""Files of a checkpoint, read with suspicion: JSON in one strict dialect, safetensors by copying, never by a map.

A tensor that is a map of its file changes with the file and takes the process down when the file shrinks, so nothing
read here is one. Errors are CheckpointError and name the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

LARGEST_JSON = 100 * 2**20
"""Bytes; safetensors has the same limit for its header."""

DEEPEST_JSON = 100
LARGEST_SIZE = 2**48
REPLACEMENTS = 100
"""A checkpoint may be replaced so often while it is opened, which takes no time."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors calls them."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted: corrupt, incomplete, inconsistent or of an unknown version."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in its file.

    offset  of its first byte in the file
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shape, self.dtype


class TensorFile:
    """One open safetensors file whose header was checked: names once, sizes without gaps, all within the file."""

    def __init__(self, path: str | os.PathLike, descriptor: int) -> None:
        """Takes over the descriptor."""
        self.path = str(path)
        self.descriptor = descriptor
        try:
            self.size = os.fstat(descriptor).st_size
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from that offset of the file; CheckpointError if the file has become shorter."""
        done = 0
        while done < len(memory):
            read = _pread_into(self.descriptor, memory[done:], offset + done)
            if not read:
                raise CheckpointError(
                    f"{self.path}: expected {self.size} bytes, got fewer; it changed while it was read"
                )
            done += read

    def read(self, name: str) -> Tensor:
        """A tensor with memory of its own."""
        stored = self.tensors[name]
        raw = torch.empty(stored.nbytes, dtype=torch.uint8, device="cpu")
        self.read_into(memory_of(raw), stored.offset)
        return raw.view(stored.dtype).view(stored.shape)

    def check(self, name: str, memory: memoryview, crc32: int) -> None:
        """Raise CheckpointError unless the bytes of a tensor, read before, have that checksum."""
        stored = self.tensors[name]
        if (got := checksum(stored.dtype, stored.shape, memory)) != crc32:
            raise CheckpointError(f"{self.path}: {name}: expected crc32 {crc32}, got {got}; the data is corrupt")

    def _read_header(self) -> dict[str, Stored]:
        start = bytearray(8)
        if self.size < 8:
            raise self._fault(f"got {self.size} bytes")
        self.read_into(memoryview(start), 0)
        length = int.from_bytes(start, "little")
        if length > min(LARGEST_JSON, self.size - 8):
            raise self._fault(f"got a header of {length} bytes in a file of {self.size}")
        text = bytearray(length)
        self.read_into(memoryview(text), 8)
        header = parse_json(bytes(text), self.path, "a safetensors file")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fault("got metadata other than text")
        tensors = {name: self._parse(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if stored.offset != end:
                raise self._fault(f"got {name!r} at byte {stored.offset} where {end} was due")
            end += stored.nbytes
        if end != self.size:
            raise self._fault(f"got {self.size} bytes where its header describes {end}")
        return tensors

    def _parse(self, name: str, entry: Any, start: int) -> Stored:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._fault(f"got {entry!r:.200} for tensor {name!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fault(f"got the unknown dtype {dtype!r:.50} of tensor {name!r}")
        sizes = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
        if len(offsets) != 2 or not all(type(size) is int and 0 <= size < LARGEST_SIZE for size in sizes):
            raise self._fault(f"got shape {shape!r:.200} and data_offsets {offsets!r:.200} of tensor {name!r}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != nbytes or len(shape) > 64:
            raise self._fault(f"got {offsets[1] - offsets[0]} bytes of tensor {name!r}, which has {nbytes}")
        return Stored(DTYPES[dtype], tuple(shape), start + offsets[0], nbytes)

    def _fault(self, got: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: expected a safetensors file, {got}; it is truncated or corrupt")


class TensorFiles:
    """The tensors of some open safetensors files, read one at a time. A name is in one of them only."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self.files = [*files]
        self.where = ", ".join(file.path for file in self.files)
        self._of: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._of:
                    raise CheckpointError(
                        f"{file.path}: expected {name!r} in one file, got it in {self._of[name].path}, too"
                    )
                self._of[name] = file

    def names(self) -> set[str]:
        return set(self._of)

    def stored(self, name: str) -> Stored:
        """Raises CheckpointError if there is no such tensor."""
        if name not in self._of:
            raise CheckpointError(f"{self.where}: expected a tensor {name}, got none")
        return self._of[name].tensors[name]

    def file_of(self, name: str) -> TensorFile:
        self.stored(name)
        return self._of[name]

    def read(self, name: str) -> Tensor:
        """A tensor with memory of its own. Raises CheckpointError if there is no such tensor."""
        return self.file_of(name).read(name)

    def read_checked(self, name: str, crc32: int) -> Tensor:
        """The same, of which the checksum must hold."""
        tensor = self.read(name)
        self.file_of(name).check(name, memory_of(tensor), crc32)
        return tensor


class OpenCheckpoint:
    """A checkpoint's config.json, parsed, and weights file, opened at one moment: they belong together.

    path   the directory, as it was given
    """

    def __init__(self, path: Path, folder: int | None) -> None:
        """Takes over the descriptor of the directory, None where the system has none."""
        self.path = path
        self._folder = folder
        self._weights: int | None = None
        try:
            self.config = read_json(path / CONFIG_FILE, folder)
            if WEIGHTS_FILE in os.listdir(path if folder is None else folder):
                self._weights = open_regular(path / WEIGHTS_FILE, "a safetensors file", folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in (self._folder, self._weights):
            if descriptor is not None:
                os.close(descriptor)
        self._folder = self._weights = None

    @contextmanager
    def weights(self) -> Iterator[TensorFiles]:
        """The tensors of the weights file; CheckpointError if there is none of this name."""
        if self._weights is None:
            raise CheckpointError(f"{self.path / WEIGHTS_FILE}: expected a safetensors file, got none of this name")
        with closing(TensorFile(self.path / WEIGHTS_FILE, os.dup(self._weights))) as file:
            yield TensorFiles([file])

    def has_weights(self) -> bool:
        """Whether the weights are in one file of the usual name."""
        return self._weights is not None

    def was_replaced(self) -> bool:
        """Whether another directory is in its place now."""
        if self._folder is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._folder), os.stat(self.path))
        except OSError:
            return True


@contextmanager
def open_checkpoint(path: Path) -> Iterator[OpenCheckpoint]:
    """Open a checkpoint, again if somebody replaces it at that very moment; CheckpointError if that cannot be done."""
    with closing(_open_checkpoint(path)) as checkpoint:
        yield checkpoint


def _open_checkpoint(path: Path) -> OpenCheckpoint:
    for left in reversed(range(REPLACEMENTS)):
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if hasattr(os, "O_DIRECTORY") else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"{path / CONFIG_FILE}: expected a readable JSON file, got {reason}") from None
        before = None if folder is None else os.fstat(folder)
        try:
            checkpoint = OpenCheckpoint(path, folder)
            if checkpoint.has_weights() or not left or not checkpoint.was_replaced():
                return checkpoint
            checkpoint.close()
        except CheckpointError:
            if not left or before is None or not path.is_dir() or os.path.samestat(before, os.stat(path)):
                raise
    raise AssertionError("unreachable")


@contextmanager
def open_tensors(files: Iterable[str | os.PathLike]) -> Iterator[TensorFiles]:
    """Open safetensors files; CheckpointError for one that is missing, truncated, corrupt or of another kind."""
    with ExitStack() as stack:
        opened = []
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path}: expected a .safetensors file; pickled weights are never loaded")
            file = TensorFile(path, open_regular(path, "a safetensors file"))
            stack.callback(file.close)
            opened.append(file)
        yield TensorFiles(opened)


def open_regular(path: Path, kind: str, folder: int | None = None) -> int:
    """A descriptor of a regular file, or CheckpointError; waits for no pipe, opens no device for longer than a look.

    folder  descriptor of the directory to take the last part of `path` from, None for the path as it is
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags) if folder is None else os.open(path.name, flags, dir_fd=folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: expected {kind}, got {type(error).__name__}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: expected {kind}, got a directory, pipe or device")
    return descriptor


def read_json(path: Path, folder: int | None = None) -> dict[str, Any]:
    """The object in a JSON file, or CheckpointError; `folder` is that of `open_regular`."""
    descriptor = open_regular(path, "a readable JSON file", folder)
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise CheckpointError(f"{path}: expected a readable JSON file of at most {LARGEST_JSON} bytes, got more")
    return parse_json(text, str(path), "a readable JSON file")


def parse_json(text: bytes, where: str, kind: str) -> dict[str, Any]:
    """A JSON object in which no key comes twice, no number is NaN or infinite and nothing is nested too deeply."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise CheckpointError(f"{where}: expected {kind}, got JSON that is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: expected {kind}, got {type(error).__name__}: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected {kind} with a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        level = [inner for outer in level if isinstance(outer, list | dict) for inner in _values(outer)]
        if not level:
            return value
    raise CheckpointError(f"{where}: expected {kind}, got JSON that is nested too deeply")


def checksum(dtype: torch.dtype, shape: Iterable[int], memory: memoryview) -> int:
    """CRC-32 of dtype, shape and bytes of a tensor."""
    return zlib.crc32(memory, zlib.crc32(f"{dtype} {[*shape]}".encode()))


def crc32_of(tensors: Iterable[Tensor], crc: int = 0) -> int:
    """CRC-32 of the bytes of some contiguous tensors, one after the other."""
    for tensor in tensors:
        crc = zlib.crc32(memory_of(tensor), crc)
    return crc


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _pread_into(descriptor: int, memory: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory[: 2**30]], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, min(len(memory), 2**24))
    memory[: len(data)] = data
    return len(data)


def _values(container: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"the number {constant}")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text:.50}, which is too large")
    return number

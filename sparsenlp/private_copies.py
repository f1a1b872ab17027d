"""Checked tensors for a reader that insists on opening files itself, as transformers does.

It is given paths of copies in memory which nobody else can change: what was checked is what it reads, whatever becomes
of the files meanwhile.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .tensor_files import TensorFile, TensorFiles

MEMORY_MAPS = Path("/proc/self/maps")


class PrivateCopies:
    """Copies of safetensors files, of the same layout.

    paths  of the copies, which are gone when `close` was called or nothing refers to this object

    checksums  {name: crc32} that tensors must have
    leave_out  names of tensors that are zeros in the copies, as somebody else puts them in
    """

    def __init__(self, files: TensorFiles, checksums: Mapping[str, int], leave_out: Collection[str]) -> None:
        """Raises CheckpointError for a tensor whose checksum is another."""
        folder = Path(tempfile.mkdtemp(prefix="sparsenlp-"))
        descriptors: list[int] = []
        self._memory: dict[int, mmap.mmap] = {}
        self._clean = weakref.finalize(self, _clean, folder, descriptors)
        self.paths = []
        for file in files.files:
            path = folder / f"{len(descriptors)}-{Path(file.path).name}"
            descriptors.append(_create(path))
            os.ftruncate(descriptors[-1], file.size)
            memory = mmap.mmap(descriptors[-1], file.size)
            _fill(memory, file, checksums, leave_out)
            self._memory[os.fstat(descriptors[-1]).st_ino] = memory
            self.paths.append(str(path))

    def close(self) -> None:
        """Forget the copies; tensors that are still maps of them stay as they are."""
        self._memory.clear()
        self._clean()

    def release_(self, model: nn.Module) -> None:
        """Give tensors that are maps of the copies memory of their own, one by one, and free what they mapped."""
        maps = _maps_of(self._memory)
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
        mapped = [(place, tensor) for tensor in tensors if (place := _place(tensor, maps)) is not None]
        mapped.sort(key=lambda found: found[0])
        for index, (place, tensor) in enumerate(mapped):
            own_(model, tensor)
            if not any(place.overlaps(other) for other, _ in mapped[index + 1 :][:1]):
                _free(self._memory[place.inode], place)


def own_(model: nn.Module, tensor: Tensor) -> None:
    """Give a parameter memory of its own, or put a copy in for a buffer, which may be a view of another tensor."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.detach().clone()
        return
    copy = tensor.detach().clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is tensor:
                module._buffers[name] = copy


class _Place(NamedTuple):
    """Some bytes of a copy."""

    inode: int
    start: int
    end: int

    def overlaps(self, other: _Place) -> bool:
        return self.inode == other.inode and self.start < other.end and other.start < self.end


class _Map(NamedTuple):
    """Where this process has a copy mapped.

    start, end  addresses
    offset      in the copy
    """

    inode: int
    start: int
    end: int
    offset: int


def _create(path: Path) -> int:
    """A descriptor of an empty file in memory, reached by `path`; where there is no such thing, of one at `path`."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("sparsenlp")
        path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
        return descriptor
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)


def _fill(memory: mmap.mmap, file: TensorFile, checksums: Mapping[str, int], leave_out: Collection[str]) -> None:
    with memoryview(memory) as view:
        header = min((stored.offset for stored in file.tensors.values()), default=file.size)
        file.read_into(view[:header], 0)
        for name, stored in file.tensors.items():
            if name in leave_out:
                continue
            part = view[stored.offset : stored.offset + stored.nbytes]
            file.read_into(part, stored.offset)
            if name in checksums:
                file.check(name, part, checksums[name])


def _maps_of(inodes: Collection[int]) -> list[_Map]:
    if not MEMORY_MAPS.exists():
        return []
    maps = []
    for line in MEMORY_MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
        if int(inode) in inodes:
            start, end = (int(address, 16) for address in addresses.split("-"))
            maps.append(_Map(int(inode), start, end, int(offset, 16)))
    return maps


def _place(tensor: Tensor, maps: Iterable[_Map]) -> _Place | None:
    """What a tensor maps of a copy, None if it has memory of its own."""
    if tensor.device.type != "cpu":
        return None
    storage = tensor.untyped_storage()
    for found in maps:
        if found.start <= storage.data_ptr() < found.end:
            start = storage.data_ptr() - found.start + found.offset
            return _Place(found.inode, start, start + storage.nbytes())
    return None


def _free(memory: mmap.mmap, place: _Place) -> None:
    """Give back the whole pages of a place."""
    if not hasattr(mmap, "MADV_REMOVE"):
        return
    start = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = place.end // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        memory.madvise(mmap.MADV_REMOVE, start, length)


def _clean(folder: Path, descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)

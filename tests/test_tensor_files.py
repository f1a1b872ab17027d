"""Strict reading of safetensors and JSON, and copies in memory for readers that insist on a path."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsenlp.checkpoint import CheckpointError
from sparsenlp.private_copies import PrivateCopies
from sparsenlp.tensor_files import DTYPES, checksum, memory_of, open_tensors, read_json

TENSORS = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
    "bool": torch.tensor([True, False]),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "long": torch.arange(20_000).view(2, -1),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def header_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_reads_what_safetensors_wrote(file):
    with open_tensors([file]) as files:
        assert files.names() == set(TENSORS)
        for name, tensor in TENSORS.items():
            got = files.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got, tensor)


def test_every_dtype_of_safetensors(tmp_path):
    for name, dtype in DTYPES.items():
        save_file({"x": torch.zeros(3, dtype=dtype)}, tmp_path / f"{name}.safetensors")
        with open_tensors([tmp_path / f"{name}.safetensors"]) as files:
            assert files.stored("x").kind == ((3,), dtype)


HEADER_FAULTS = {
    "unknown dtype": lambda h: h["half"].update(dtype="F13"),
    "dtype of another size": lambda h: h["half"].update(dtype="F64"),
    "negative size": lambda h: h["half"].update(shape=[-3, -5]),
    "size as bool": lambda h: h["half"].update(shape=[True, 15]),
    "size beyond all bounds": lambda h: h["half"].update(shape=[2**62, 4]),
    "offsets beyond the file": lambda h: h["long"]["data_offsets"].__setitem__(1, 2**40),
    "overlap": lambda h: h["half"].update(data_offsets=[0, 30]),
    "missing field": lambda h: h["half"].pop("shape"),
    "more fields": lambda h: h["half"].update(x=1),
    "no object": lambda h: h.update(half=3),
    "a gap": lambda h: h.pop("half"),
    "metadata": lambda h: h.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_wrong_header_is_refused(file, fault):
    header, data = header_of(file)
    HEADER_FAULTS[fault](header)
    write(file, header, data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected a safetensors file"), open_tensors([file]):
        pass


@pytest.mark.parametrize(
    ("header", "length"), [(b"{}", 2**63), (b"[]", 2), (b'{"a"', 4), (b'{"x": {}, "x": {}}', 18), (b"[" * 9999, 9999)]
)
def test_no_header_is_refused(file, header, length):
    write(file, header, b"", length)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected a safetensors file"), open_tensors([file]):
        pass


def test_a_name_is_in_one_file(file, tmp_path):
    save_file({"half": torch.ones(1)}, tmp_path / "y.safetensors")
    with (
        pytest.raises(CheckpointError, match="expected 'half' in one file"),
        open_tensors([file, tmp_path / "y.safetensors"]),
    ):
        pass


def test_a_file_that_shrinks_while_it_is_open(file):
    with open_tensors([file]) as files:
        os.truncate(file, 1000)
        with pytest.raises(CheckpointError, match="it changed while it was read"):
            files.read("long")


JSON_FAULTS = {
    "twice": '{"a": {"b": 1, "b": 2}}',
    "not a number": '{"a": NaN}',
    "infinite": '{"a": [-Infinity]}',
    "too large": '{"a": 1e999}',
    "too long": '{"a": ' + "9" * 9999 + "}",
    "deep lists": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "deep objects": '{"a": ' * 100_000,
    "no object": "[1]",
    "no text": "\x00",
    "nothing": "",
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_in_one_dialect(tmp_path, fault):
    (tmp_path / "a.json").write_text(JSON_FAULTS[fault])
    with pytest.raises(CheckpointError, match=r"a\.json: expected a readable JSON file") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="a readable JSON file"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files(tmp_path, make):
    make(tmp_path / "x.safetensors")
    with (
        pytest.raises(CheckpointError, match="got a directory, pipe or device"),
        open_tensors([tmp_path / "x.safetensors"]),
    ):
        pass


def checksums(tensors):
    return {name: checksum(tensor.dtype, tensor.shape, memory_of(tensor)) for name, tensor in tensors.items()}


def test_the_checksum_covers_dtype_and_shape():
    x = torch.zeros(2, 6)
    others = [x.view(6, 2), x.view(torch.int32), torch.zeros(2, 6).add(1)]
    found = checksums(dict(enumerate([x, *others])))
    assert len(set(found.values())) == 4


def test_copies_do_not_change_with_the_file(file):
    with open_tensors([file]) as files:
        copies = PrivateCopies(files, checksums(TENSORS), {"half"})
    file.write_bytes(b"")
    loaded = load_file(copies.paths[0])
    assert torch.equal(loaded.pop("half"), torch.zeros(3, 5).half())
    for name, tensor in loaded.items():
        assert torch.equal(tensor, TENSORS[name])
    paths = copies.paths
    del copies
    assert not any(map(os.path.lexists, paths))


def test_copies_are_checked(file):
    with open_tensors([file]) as files, pytest.raises(CheckpointError, match=r"x\.safetensors: long: expected crc32 1"):
        PrivateCopies(files, {**checksums(TENSORS), "long": 1}, ())


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
def test_released_tensors_free_the_copy(file):
    with open_tensors([file]) as files:
        copies = PrivateCopies(files, checksums(TENSORS), ())
    model = nn.Module()
    for name, tensor in load_file(copies.paths[0]).items():
        model.register_buffer(f"of_{name}", tensor)
    model.rows = nn.ParameterList([nn.Parameter(row, requires_grad=False) for row in model.of_long])  # of one storage
    del tensor
    before = os.stat(copies.paths[0]).st_blocks
    copies.release_(model)
    assert os.stat(copies.paths[0]).st_blocks < before / 4
    for name, tensor in TENSORS.items():
        assert torch.equal(getattr(model, f"of_{name}"), tensor)
    assert torch.equal(torch.stack([*model.rows]), TENSORS["long"])
    copies.close()
    with open("/proc/self/maps") as maps:
        assert "memfd:sparsenlp" not in maps.read()

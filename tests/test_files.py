import os

import pytest

from sparsenlp.data import load_table, load_word_vectors, word_tokenizer
from sparsenlp.files import open_regular, read_regular

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "table.csv"
    os.mkfifo(path)
    return path


def test_a_regular_file_is_read_through_a_link_too(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 4) == b"text"
    with open_regular(tmp_path / "a", None, encoding="utf-8") as file:
        assert file.read() == "text"


def test_a_larger_file_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    with pytest.raises(ValueError, match="a: expected at most 3 bytes, got 4"):
        read_regular(tmp_path / "a", 3)


def test_devices_and_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="/dev/zero: expected a regular file, got a device"):
        read_regular("/dev/zero", 10)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 10)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 10)


@needs_pipes
@pytest.mark.parametrize(
    "read", [load_table, lambda p: load_word_vectors(p, word_tokenizer(["a a"])), lambda p: read_regular(p, 9)]
)
def test_a_pipe_is_refused_and_not_waited_for(pipe, read):
    with pytest.raises(ValueError, match=r"table\.csv: expected a regular file, got a pipe"):
        read(pipe)


def test_no_descriptor_is_left_open(tmp_path):
    descriptors = len(os.listdir("/dev/fd"))
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises((ValueError, OSError)):
            read_regular(path, 1)
    assert len(os.listdir("/dev/fd")) == descriptors

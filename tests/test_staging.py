"""Directories that are replaced as a whole."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest

from sparsenlp import staging
from sparsenlp.staging import replacing

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")


def save(directory, **files):
    with replacing(directory) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def old(tmp_path):
    save(tmp_path / "ck", a="1", b="1")
    return tmp_path / "ck"


def nothing_left(directory):
    return [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_new_directory_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").mkdir()
    save(tmp_path / "deep" / "ck", a="1")
    assert contents(tmp_path / "deep" / "ck") == {"a": "1"}
    assert (tmp_path / "deep" / "ck").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert nothing_left(tmp_path / "deep" / "ck")


@linux
def test_a_reader_keeps_the_old_directory(old):
    folder = os.open(old, os.O_RDONLY)
    with replacing(old) as new:
        (new / "a").write_text("2")
        assert contents(old) == {"a": "1", "b": "1"}
        before = os.stat(old).st_ino
    assert os.stat(old).st_ino != before == os.fstat(folder).st_ino
    os.close(folder)


def test_other_files_go_along(old):
    (old / "tokenizer").mkdir()
    (old / "tokenizer" / "vocab.txt").write_text("a")
    (old / "link").symlink_to("a")
    (old / "dangling").symlink_to("nowhere")
    old.chmod(0o750)
    save(old, a="2")
    assert contents(old) == {"a": "2", "b": "1", "link": "2"}
    assert (old / "tokenizer" / "vocab.txt").read_text() == "a"
    assert os.readlink(old / "dangling") == "nowhere"
    assert old.stat().st_mode & 0o777 == 0o750
    assert nothing_left(old)


def test_weights_of_an_earlier_save_do_not(old):
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin",
    ):
        (old / name).write_text("stale")
    (old / "work" / "dense").mkdir(parents=True)
    (old / "work" / "dense" / "model.safetensors").write_text("another model's")
    save(old, **{"model.safetensors": "new"})
    assert (old / "work" / "dense" / "model.safetensors").read_text() == "another model's"
    shutil.rmtree(old / "work")
    assert contents(old) == {"a": "1", "b": "1", "model.safetensors": "new", "pytorch_model.bin": "stale"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(old, error):
    def save_half():
        with replacing(old) as new:
            (new / "a").write_text("2")
            raise error

    with pytest.raises(error):
        save_half()
    assert contents(old) == {"a": "1", "b": "1"}
    assert nothing_left(old)


@linux
def test_what_a_dead_process_left_is_removed(old):
    dead = old.parent / f".{old.name}.saving-1-dead"
    dead.mkdir()
    (dead / "a").write_text("half")
    with replacing(old) as live:
        (live / "a").write_text("2")
        assert not dead.exists()
        save(old, a="3")  # another save meanwhile: this one is alive
        assert live.exists()
    assert contents(old) == {"a": "2", "b": "1"}
    assert nothing_left(old)


def test_two_renames_where_there_is_no_exchange(old, monkeypatch):
    monkeypatch.setattr(staging, "_renameat2", lambda *_: False)
    save(old, a="2")
    assert contents(old) == {"a": "2", "b": "1"}
    save(old.parent / "new", a="1")
    assert contents(old.parent / "new") == {"a": "1"}
    assert sorted(path.name for path in old.parent.iterdir()) == ["ck", "new"]


def test_a_directory_that_cannot_be_renamed_gets_its_files(old, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "mounted")

    monkeypatch.setattr(staging, "_exchange", busy)
    before = old.stat().st_ino
    (old / "model-00001-of-00002.safetensors").write_text("stale")
    save(old, a="2")
    assert contents(old) == {"a": "2", "b": "1"}
    assert old.stat().st_ino == before
    assert nothing_left(old)


def test_the_working_directory_stays(old, monkeypatch):
    monkeypatch.chdir(old)
    save(old, a="2")
    assert os.listdir(".") == os.listdir(old)
    assert contents(old) == {"a": "2", "b": "1"}


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="got a file"), replacing(tmp_path / "file"):
        pass


@linux
def test_many_writers_of_one_directory(tmp_path):
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(5):
                    save(tmp_path / "ck", **{"all": str(number), f"own{number}": "x"})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert set(contents(tmp_path / "ck")) == {"all", *(f"own{number}" for number in range(6))}
    assert nothing_left(tmp_path / "ck")

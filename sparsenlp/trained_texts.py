"""What a model was trained on, as short hashes of the texts beside its weights, so that none is taken for a test text.

TEXTS_FILE holds eight bytes for each text, or pair of texts: the first of the BLAKE2b digest of the text without regard
to case, white space and Unicode's compatible forms. Of more than MOST texts the smallest hashes are kept, a sample that
does not depend on their order. Who has a text can tell by the file whether the model was trained on it.

A text of the training side that stands on the test side of the same run, too, is a duplicate. It is counted and told
when that run begins, and left out here, so that whoever judges the model by the same test texts later finds none.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_regular
from .layer_entries import CheckpointError

TEXTS_FILE = "training_texts.json"
FORMAT_VERSION = 1
MOST = 2**21
"""Hashes that are kept: 16 MiB."""
MOST_RUNS = 1000
_LARGEST_FILE = 2**25
_EVERYTHING = 2**64 - 1

DUPLICATES = 0.01
"""Share of the test texts that may have been trained on before: so many count as duplicates, more as a mistake."""
REPEATED = 0.5
"""Share of the given test texts that may stand among the training texts of the same run."""


def hashes_of(texts: Sequence[str], others: Sequence[str] | None = None) -> np.ndarray:
    """(texts,) uint64; others are the second ones of pairs."""
    rows = texts if others is None else map("\x1f".join, zip(map(_plain, texts), map(_plain, others), strict=True))
    digests = (blake2b(_plain(row).encode("utf-8", "replace"), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _plain(text: str) -> str:
    """Without differences that no model of words sees; the separator of pairs stays."""
    return "\x1f".join(" ".join(part.split()) for part in unicodedata.normalize("NFKC", text).casefold().split("\x1f"))


@dataclass(frozen=True)
class TrainedTexts:
    """hashes   sorted, each once
    bound    the largest that is kept; of a text with a larger one nothing is known
    runs     what each training run was made of, such as its file and seed
    """

    hashes: np.ndarray
    bound: int = _EVERYTHING
    runs: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, hashes: np.ndarray, bound: int = _EVERYTHING, runs: Sequence[Mapping[str, Any]] = ()) -> TrainedTexts:
        """Sorted, and cut to MOST."""
        unique = np.unique(hashes[hashes <= np.uint64(bound)])
        if len(unique) > MOST:
            unique, bound = unique[:MOST], int(unique[MOST - 1])
        return cls(unique, bound, tuple(runs)[-MOST_RUNS:])

    def joined(self, other: TrainedTexts | None) -> TrainedTexts:
        """What a model knows that was trained on these and then on the others."""
        if other is None:
            return self
        runs = [*self.runs, *(run for run in other.runs if run not in self.runs)]
        return self.of(np.concatenate([self.hashes, other.hashes]), min(self.bound, other.bound), runs)

    def known(self, hashes: np.ndarray) -> np.ndarray:
        """Which of them were trained on, as far as is known."""
        return np.isin(hashes, self.hashes)

    def share(self, hashes: np.ndarray) -> float:
        """Of the hashes that were trained on among those that something is known of."""
        told = hashes[hashes <= np.uint64(self.bound)]
        return float(self.known(told).mean()) if len(told) else 0.0

    def as_text(self) -> str:
        """The content of TEXTS_FILE."""
        content = self.hashes.astype("<u8").tobytes()
        data = {"format_version": FORMAT_VERSION, "bound": self.bound, "runs": [dict(run) for run in self.runs]}
        data["hashes"] = base64.b64encode(content).decode()
        return json.dumps(data | {"crc32": _checksum(data)}, indent=1) + "\n"


def read_trained_texts(directory: str | Path) -> TrainedTexts | None:
    """What stands beside a model; None for one that has no TEXTS_FILE, such as one from elsewhere.

    Raises CheckpointError for a file that is damaged or of another version.
    """
    path = Path(directory, TEXTS_FILE)
    try:
        data = json.loads(read_regular(path, _LARGEST_FILE))
        return _parsed(data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected what the model was trained on, got {error or type(error).__name__}; remove the file to "
            "go on without knowing"
        ) from None


def _parsed(data: Any) -> TrainedTexts:
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"no format_version {FORMAT_VERSION}")
    types = {"format_version": int, "bound": int, "runs": list, "hashes": str, "crc32": int}
    if {name: type(value) for name, value in data.items()} != types or not 0 <= data["bound"] <= _EVERYTHING:
        raise ValueError(f"other fields than {', '.join(types)}")
    if data.pop("crc32") != _checksum(data):
        raise ValueError("another checksum")
    runs = data["runs"]
    if len(runs) > MOST_RUNS or not all(isinstance(run, dict) for run in runs):
        raise ValueError("runs that are none")
    try:
        content = base64.b64decode(data["hashes"], validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    hashes = np.frombuffer(content, dtype="<u8") if len(content) % 8 == 0 else np.zeros(2, "<u8")
    if len(hashes) > MOST or (hashes[1:] <= hashes[:-1]).any() or (hashes > np.uint64(data["bound"])).any():
        raise ValueError("hashes out of order")
    return TrainedTexts(hashes, data["bound"], tuple(runs))


def _checksum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


@dataclass(frozen=True)
class Split:
    """The two sides of a run's texts, as `hashes_of` them.

    given   whether the test texts are files of their own, not rows that were held out
    facts   what the run is made of
    """

    train: np.ndarray
    test: np.ndarray
    given: bool
    facts: Mapping[str, Any]

    @property
    def duplicates(self) -> int:
        """Test texts that stand among the training texts."""
        return int(np.isin(self.test, self.train).sum())

    @property
    def trained(self) -> TrainedTexts:
        """What a model is trained on by this run, without duplicates, if that is what they are."""
        same = self.given and self.duplicates > REPEATED * len(self.test)
        return TrainedTexts.of(self.train if same else np.setdiff1d(self.train, self.test), runs=[self.facts])

    def trained_before(self, earlier: TrainedTexts | None) -> np.ndarray:
        """The test texts that the model was trained on in earlier runs, duplicates of this one left out."""
        if earlier is None:
            return self.test[:0]
        others = self.test[~np.isin(self.test, self.train)]
        return others[earlier.known(others)]

    def remarks(self, earlier: TrainedTexts | None) -> list[str]:
        """What is to be said about the test texts before training, a line each."""
        lines, count = [], len(self.test)
        if self.duplicates:
            lines.append(
                f"warning: {self.duplicates} of the {count} test texts are among the training texts, too; as such "
                "duplicates are known by heart, they make the figures better than they are"
            )
        if before := len(self.trained_before(earlier)):
            lines.append(f"warning: {before} of the {count} test texts were trained on before: {told_runs(earlier)}")
        return lines

    def withheld(self, earlier: TrainedTexts | None) -> str:
        """Why figures on the test texts are not reported; "" if they are."""
        count, before = len(self.test), self.trained_before(earlier)
        if self.given and self.duplicates > REPEATED * count:
            return f"{self.duplicates} of {count} test texts are training texts"
        if earlier is not None and len(before) > DUPLICATES * count:
            return f"{len(before)} of {count} test texts were trained on"
        return ""


def told_runs(texts: TrainedTexts | None) -> str:
    """The last run that a model went through, for a message."""
    runs = texts.runs if texts is not None else ()
    facts = ", ".join(f"{name} {value}" for name, value in runs[-1].items()) if runs else ""
    return f"the model comes from {facts}"[:400] if facts else "by the model's earlier training"


@dataclass(frozen=True)
class Companions:
    """Files that are saved in one with a model and its tokenizer, in whose place this is handed on."""

    tokenizer: Any
    files: Mapping[str, str]

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        for name, text in self.files.items():
            Path(directory, name).write_text(text, encoding="utf-8")


def with_texts(tokenizer: Any, texts: TrainedTexts | None, files: Mapping[str, str] | None = None) -> Companions:
    """A tokenizer together with what the model was trained on and perhaps other files."""
    return Companions(tokenizer, {**(files or {}), **({TEXTS_FILE: texts.as_text()} if texts is not None else {})})

"""Labelled texts: read them from a file, encode the labels, split them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import TABLE_BYTES, open_regular


@dataclass(frozen=True)
class TextDataset:
    """Texts (or pairs of texts) with one class each.

    labels       index into label_names, one per text
    label_names  class names in the order of the model's outputs
    text_pairs   second texts, for matching tasks; None for single texts
    """

    texts: list[str]
    labels: list[int]
    label_names: list[str]
    text_pairs: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.texts):
            raise ValueError(f"TextDataset: expected {len(self.texts)} labels, got {len(self.labels)}")
        if self.text_pairs is not None and len(self.text_pairs) != len(self.texts):
            raise ValueError(f"TextDataset: expected {len(self.texts)} text_pairs, got {len(self.text_pairs)}")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> TextDataset:
        """The rows at `indices`, in that order."""
        pairs = None if self.text_pairs is None else [self.text_pairs[i] for i in indices]
        return TextDataset([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.label_names, pairs)

    def split(self, test_fraction: float = 0.2, seed: int = 0) -> tuple[TextDataset, TextDataset]:
        """(train, test), each class divided in the same proportion; the same seed gives the same split.

        Raises ValueError for a fraction outside (0, 1), or one that leaves a side empty or a class
        without a training text.
        """
        if not 0 < test_fraction < 1:
            raise ValueError(f"split: expected a test_fraction in (0, 1), got {test_fraction}")
        rng = random.Random(seed)
        test: list[int] = []
        for label in sorted(set(self.labels)):
            rows = [i for i, other in enumerate(self.labels) if other == label]
            rng.shuffle(rows)
            test += rows[: round(test_fraction * len(rows))]
        chosen = set(test)
        train = [i for i in range(len(self)) if i not in chosen]
        if not train or not test:
            raise ValueError(f"split: expected rows on both sides, got {len(train)} for training, {len(test)} for test")
        sides = self.select(train), self.select(sorted(test))
        check_split(*sides)
        return sides

    def sample(self, count: int, seed: int = 0) -> TextDataset:
        """`count` rows drawn without replacement, in file order; all of them if there are no more."""
        if count >= len(self):
            return self
        return self.select(sorted(random.Random(seed).sample(range(len(self)), count)))


def check_split(train: TextDataset, test: TextDataset) -> None:
    """Raise ValueError if a class of the test texts has no training text; both must have the same label_names."""
    missing = sorted(set(test.labels) - set(train.labels))
    if missing:
        names = ", ".join(train.label_names[label] for label in missing)
        raise ValueError(f"labels: expected training texts of every class, got none of {names}")


def load_table(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    label_names: Sequence[str] | None = None,
) -> TextDataset:
    """Read a .csv or .tsv file with a header, or a .jsonl file with one object per line (UTF-8).

    label_names  the classes of a trained model, to encode the labels by; by default the file's own
                 labels, sorted (as numbers if they all are)

    Raises OSError for a file that cannot be read, and ValueError for a pipe or device, another format, malformed or no
    rows, missing columns, an empty text or label (with its line), or a label not in label_names.
    """
    values = load_columns(path, [text_column, label_column] + ([text_pair_column] if text_pair_column else []))
    names = list(label_names) if label_names is not None else _sorted_labels(set(values[1]))
    labels = encode_labels(values[1], names)
    return TextDataset(values[0], labels, names, values[2] if text_pair_column else None)


def load_columns(path: str | Path, columns: Sequence[str]) -> list[list[str]]:
    """These columns of a table, each as long as it has rows. Files and errors as for `load_table`."""
    path = Path(path)
    values: list[list[str]] = [[] for _ in columns]
    try:
        for line, row in _rows(path):
            for column, kept in zip(columns, values, strict=True):
                kept.append(_cell(row, column, f"{path}, line {line}"))
    except OSError as error:
        raise type(error)(f"load_table: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_table: expected UTF-8 text in {path}, got byte {error.object[error.start]:#x}"
        ) from None
    if not values[0]:
        raise ValueError(f"load_table: expected rows in {path}, got none")
    return values


def encode_labels(labels: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """Index of each label in `label_names`. Raises ValueError for a label that is not there."""
    index = {name: i for i, name in enumerate(label_names)}
    for row, label in enumerate(labels, start=1):
        if label not in index:
            known = ", ".join(list(label_names)[:10]) + (", ..." if len(label_names) > 10 else "")
            raise ValueError(f'labels: expected one of {known}, got "{label}" in row {row}')
    return [index[label] for label in labels]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each row; a blank line of a .jsonl file is none."""
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"load_table: expected a .csv, .tsv or .jsonl file, got {path}")
    with open_regular(path, TABLE_BYTES, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, _json_object(text, f"{path}, line {line}")
            return
        reader = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"load_table: expected {len(reader.fieldnames or ())} columns in {path}, "
                        f"line {reader.line_num}, got {len(row) - 1 + len(row[None])}"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"load_table: malformed row in {path}, line {reader.line_num}: {error}") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"load_table: malformed JSON in {where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"load_table: expected a JSON object in {where}, got {type(row).__name__}")
    return row


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(f'load_table: expected a column "{column}" in {where}, got {", ".join(map(str, row))}')
    value = row[column]
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f'load_table: expected a nonempty "{column}" in {where}, got none')
    return text


def _sorted_labels(labels: set[str]) -> list[str]:
    if all(label.lstrip("-").isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)

"""Labelled texts: read them from a file, encode the labels, split them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .labels import check_classes, class_names, encode_labels, match_labels
from .tables import load_columns


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

    def with_classes(self, names: Sequence[str]) -> TextDataset:
        """The same texts, labels indexing `names`, among which all of its classes are (see `match_labels`).

        Raises ValueError for a class that is not.
        """
        places = match_labels(self.label_names, names).places
        if None in places:
            raise ValueError(f"labels: expected one of {', '.join(names)}, got {self.label_names[places.index(None)]}")
        labels = [place for label in self.labels if (place := places[label]) is not None]
        return replace(self, labels=labels, label_names=[*names])

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
            raise ValueError(
                f"split: expected rows on both sides, got {len(train)} for training, {len(test)} for test; "
                "give more rows of each class, or test texts of their own"
            )
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

    label_names  the classes of a trained model, to encode the labels by (see `encode_labels`); by default the file's
                 own labels (see `class_names`)

    Raises OSError for a file that cannot be read, and ValueError for a pipe or device, another format, malformed or no
    rows, columns that are missing, there twice or the same, an empty text or label, or one that is a list or object
    (with its line), labels that are no classes, and a label not in label_names.
    """
    values = load_columns(path, [text_column, label_column] + ([text_pair_column] if text_pair_column else []))
    names = [*label_names] if label_names is not None else _sorted_labels(values[1])
    labels = encode_labels(values[1], names)
    return TextDataset(values[0], labels, names, values[2] if text_pair_column else None)


def _sorted_labels(labels: Iterable[str]) -> list[str]:
    """The classes of a file that no model has named yet. Raises as `check_classes`."""
    names = class_names(labels)
    check_classes(names)
    return names

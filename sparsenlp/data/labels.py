"""Labels as they stand in files, and which class of a model each of them is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

NUMBER = re.compile(r"[+-]?(?:\d{1,64}(?:\.\d{0,64})?|\.\d{1,64})(?:[eE][+-]?\d{1,3})?", re.ASCII)
LIST = re.compile(r"""\[\s*['"\d].*\]""", re.DOTALL)
"""A list as Python or JSON writes it."""
BOOLEANS = {"false": Decimal(0), "true": Decimal(1)}
GENERIC = "LABEL_"
"""What transformers calls a class that nobody named, with the number of its output."""
MOST_FRACTIONS = 10
"""Different numbers with fractions that may still be classes, such as the half stars of a rating."""


def number_of(label: str) -> Decimal | None:
    """The number that a label spells ("1", "1.0", "+1", "01", "1e0"; "true" and "false" are 1 and 0), None for text."""
    if NUMBER.fullmatch(label):
        return Decimal(label)
    return BOOLEANS.get(label.casefold())


def class_names(labels: Iterable[str]) -> list[str]:
    """Different labels, each once: sorted as numbers if all of them are, else as text.

    Spellings of one number are one class under the shortest of them, which is said in a warning.
    """
    spellings = sorted({*labels}, key=lambda label: (len(label), label))
    numbers = {label: number for label in spellings if (number := number_of(label)) is not None}
    if len(numbers) < len(spellings):
        return sorted(spellings)
    classes: dict[Decimal, str] = {}
    for label, number in numbers.items():
        first = classes.setdefault(number, label)
        if first != label:
            warnings.warn(f'labels: "{label}" and "{first}" are one number, so they are one class', stacklevel=4)
    return [classes[number] for number in sorted(classes)]


def check_classes(names: Sequence[str]) -> None:
    """Raise ValueError for names that are no classes.

    These are "nan", a list that was written as text, and so many numbers with fractions that they must be a regression
    target.
    """
    for name in names:
        if name.casefold() == "nan":
            raise ValueError(
                f'labels: expected a class in every row, got "{name}"; remove these rows, or rename the class'
            )
        if LIST.fullmatch(name):
            raise ValueError(f"labels: expected one class per row, got {name:.60}; several labels are not served")
    numbers = {name: number for name in names if (number := number_of(name)) is not None}
    fractions = [name for name, number in numbers.items() if number != number.to_integral_value()]
    if fractions and len(numbers) > MOST_FRACTIONS:
        raise ValueError(
            f"labels: expected classes, got {len(numbers)} different numbers such as {fractions[0]}, as of a "
            "regression, which is not served; sort them into a few classes, with names, first"
        )


@dataclass(frozen=True)
class Matched:
    """Which class each label is.

    places   index into the names, None for a label that is none of them
    remarks  what is to be said about it, "" if nothing
    """

    places: list[int | None]
    remarks: str


def match_labels(labels: Sequence[str], names: Sequence[str]) -> Matched:
    """Find each label among the names of classes.

    A label is a class if it has its name; else if both spell the same number; else if nothing but upper and lower
    case differs; each where that leaves one class alone. Among LABEL_0, LABEL_1, ... a number is that of an output.
    """
    exact = _unique((name, place) for place, name in enumerate(names))
    generic = is_generic(names)
    numbers = _unique((Decimal(i) if generic else number_of(name), i) for i, name in enumerate(names))
    folded = _unique((name.casefold(), i) for i, name in enumerate(names))
    places: list[int | None] = []
    unlike, as_outputs = [], False
    for label in labels:
        place, number = exact.get(label), number_of(label)
        if place is None and number is not None:
            place = numbers.get(number)
            as_outputs |= generic and place is not None
        if place is None and (place := folded.get(label.casefold())) is not None:
            unlike.append(f"{label} is {names[place]}")
        places.append(place)
    remarks = []
    if as_outputs:
        remarks.append("the model's classes have no names; numbers in the data are taken for those of its outputs")
        there = {place for place in places if place is not None}
        if len(there) < len(names):
            remarks.append(f"the data has {len(there)} of the {len(names)} classes")
    if unlike:
        remarks.append(f"labels are compared without regard to case: {', '.join(unlike)}")
    return Matched(places, "; ".join(remarks))


def encode_labels(labels: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """Index of each label in `label_names`, compared as in `match_labels`.

    Warns where case differs or numbers stand for unnamed classes. Raises ValueError for a label that is not there.
    """
    different = [*dict.fromkeys(labels)]
    matched = match_labels(different, label_names)
    index = dict(zip(different, matched.places, strict=True))
    for row, label in enumerate(labels, start=1):
        if index[label] is None:
            known = ", ".join(list(label_names)[:10]) + (", ..." if len(label_names) > 10 else "")
            raise ValueError(f'labels: expected one of {known}, got "{label}" in row {row}')
    if matched.remarks:
        warnings.warn(matched.remarks, stacklevel=2)
    return [place for label in labels if (place := index[label]) is not None]


def is_generic(names: Sequence[str]) -> bool:
    """Whether the classes are called LABEL_0, LABEL_1, ..., as transformers does when nobody named them."""
    return [*names] == [f"{GENERIC}{i}" for i in range(len(names))]


def _unique(pairs: Iterable[tuple[object, int]]) -> dict[object, int]:
    """{key: place} of the keys that occur once."""
    found: dict[object, list[int]] = {}
    for key, place in pairs:
        found.setdefault(key, []).append(place)
    return {key: places[0] for key, places in found.items() if len(places) == 1 and key is not None}

"""Columns of a table in a file, as text; what cannot be read without a doubt is refused with its line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..files import TABLE_BYTES, open_regular

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 2**31 - 1
UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that no tokenizer takes: NUL, which other encodings leave behind, and half a surrogate pair."""

Row = tuple[int, list[Any]]
"""(line number, the value of each wanted column)"""


def load_columns(path: str | Path, columns: Sequence[str]) -> list[list[str]]:
    """These columns of a table, each as long as it has rows, without white space around a value.

    Files are as for `load_table`. A row whose cells are all blank is none. Names of columns are compared without
    white space around them.

    Raises as `load_table`.
    """
    path = Path(path)
    if len({*columns}) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ValueError(f'load_table: expected different columns, got "{twice}" twice')
    values: list[list[str]] = [[] for _ in columns]
    try:
        with _long_cells():
            for line, row in _rows(path, columns):
                for column, value, kept in zip(columns, row, values, strict=True):
                    kept.append(_text(value, column, f"{path}, line {line}"))
    except OSError as error:
        raise type(error)(f"load_table: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_table: expected UTF-8 text in {path}, got byte {error.object[error.start]:#x}; "
            "save the file again as UTF-8"
        ) from None
    if not values[0]:
        raise ValueError(f"load_table: expected rows in {path}, got none")
    return values


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in (*SEPARATORS, ".jsonl"):
        remedies = {
            ".json": "; write one object per line into a .jsonl file",
            ".gz": "; decompress it first",
            ".txt": "; rename it after what separates its columns",
        }
        raise ValueError(
            f"load_table: expected a .csv, .tsv or .jsonl file, got {path}{remedies.get(suffix, '; convert it first')}"
        )
    with open_regular(path, TABLE_BYTES, encoding="utf-8-sig", newline="") as file:
        if suffix == ".jsonl":
            yield from _json_rows(file, path, columns)
        else:
            yield from _separated_rows(file, path, columns, SEPARATORS[suffix])


def _separated_rows(file: Any, path: Path, columns: Sequence[str], separator: str) -> Iterator[Row]:
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places: list[int] = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if all(not cell.strip() for cell in row):
                continue
            places = places or _places(header, columns, where, separator)
            if len(row) > len(header):
                raise ValueError(f"load_table: expected {len(header)} columns in {where}, got {len(row)}")
            if separator == "\t" and any("\t" in cell and "\n" in cell for cell in row):
                raise ValueError(
                    f"load_table: expected no cell of several lines in {where}, got one that a quotation mark began; "
                    "double the quotation marks of a cell and put it between two more"
                )
            yield reader.line_num, [row[place] if place < len(row) else None for place in places]
    except csv.Error as error:
        why = "a quotation mark that is not closed" if "end of data" in str(error) else error
        raise ValueError(f"load_table: malformed row in {path}, line {reader.line_num}: {why}") from None


def _places(header: Sequence[str], columns: Sequence[str], where: str, separator: str) -> list[int]:
    """Where the columns are. Raises ValueError for one that is missing or there twice."""
    for column in columns:
        count = header.count(column.strip())
        if count > 1:
            raise ValueError(f'load_table: expected one column "{column}" in {where}, got {count} of that name')
        if count == 0:
            _refuse_column(column, header, where, separator)
    return [header.index(column.strip()) for column in columns]


def _refuse_column(column: str, names: Sequence[str], where: str, separator: str = "") -> NoReturn:
    similar = [name for name in names if name.casefold() == column.strip().casefold()]
    hint = f'; did you mean "{similar[0]}"?' if similar else ""
    if separator and len(names) == 1 and any(other in names[0] for other in ",;\t|"):
        hint = f"; the columns of such a file are separated by {'commas' if separator == ',' else 'tabs'}"
    raise ValueError(f'load_table: expected a column "{column}" in {where}, got {", ".join(names)}{hint}')


def _json_rows(file: Any, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        row = _json_object(text, where)
        for column in columns:
            if column not in row:
                _refuse_column(column, [*row], where)
        yield line, [row[column] for column in columns]


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_once, parse_float=str, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"load_table: malformed JSON in {where}: {why}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"load_table: expected a JSON object in {where}, got {type(row).__name__}; write one object per line"
        )
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'expected one value of "{next(n for n in names if names.count(n) > 1)}", got several')
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a number, got {name}")


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        raise ValueError(f'load_table: expected "{column}" in {where} to be text or a number, got {kind}')
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f'load_table: expected a nonempty "{column}" in {where}, got none')
    if not text.isprintable() and (found := UNUSABLE.search(text)):
        raise ValueError(f'load_table: expected UTF-8 text as "{column}" in {where}, got the character {found[0]!a}')
    return text


@contextmanager
def _long_cells() -> Iterator[None]:
    """No limit on the length of a cell, which csv keeps for the whole process, within the `with` block."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)

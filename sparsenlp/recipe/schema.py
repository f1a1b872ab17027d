"""Recipes as YAML: pydantic models made from the dataclasses of a recipe, and what is wrong with one in one line."""

from __future__ import annotations

import difflib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Optional

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model, model_validator

from ..files import read_regular
from ..prune import Pattern
from .config import Recipe, build, hidden, unwrapped

EXPECTED = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
"""pydantic's kinds of error, where it takes one thing for another."""

LARGEST_FILE, LONGEST_TEXT = 2**17, 2**12
"""Bytes of a recipe, and characters of one text in it."""
DEEPEST, MOST = 32, 2**14
"""Levels of lists and mappings in each other, and values in all, where an alias counts as what it repeats."""
LARGEST = {
    "epochs": 10**4,
    "batch_size": 10**6,
    "count": 10**9,
    "max_length": 10**6,
    "length": 10**6,
    "windows": 10**6,
    "test_windows": 10**6,
    "examples": 10**8,
    "token_counts": 10**6,
    "blocks": 10**6,
    "spliced": 100,
}
"""The largest number of a field, whichever section it is in: beyond it nobody's machine has the memory or time."""


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """See `load_recipe`."""
    path = Path(path)
    try:
        text = read_regular(path, LARGEST_FILE).decode("utf-8")
    except OSError as error:
        raise type(error)(f"recipe: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes") from None
    try:
        content = parse(text)
        for change in changes:
            change_(content, change)
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Recipe.of(content)


def change_(content: dict[str, Any], change: str) -> None:
    """Put the value of "section.key=value" in its place. Raises ValueError for other text, and where no section is."""
    place, equals, value = change.partition("=")
    *sections, key = place.strip().split(".")
    if not equals or not all((*sections, key)) or len(sections) >= DEEPEST:
        raise ValueError(f"expected a change such as recover.epochs=5, got {change}")
    for depth, name in enumerate(sections, 1):
        if content.get(name) is None:
            content[name] = {}
        content = content[name]
        if not isinstance(content, dict):
            raise ValueError(f"{'.'.join(sections[:depth])}: expected a mapping to change, got {_shown(content)}")
    content[key] = _plain(value)


def parse(text: str) -> dict[str, Any]:
    """Plain data from YAML 1.2. Raises ValueError for anything but a mapping of text, numbers, lists and mappings."""
    plain = _plain(text)
    if not isinstance(plain, dict):
        raise ValueError(f"expected a mapping with the key model, got {_shown(plain)}")
    return plain


def validate(content: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line that names the field, unless `Recipe.of` can build a recipe of this."""
    _check_sizes(content)
    try:
        model_of(Recipe).model_validate_json(json.dumps(content))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(_told(problems[0]) + more) from None


def _plain(text: str) -> Any:
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader)))
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML, got {' '.join(str(error).split())}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected text, numbers, lists and mappings, got {error}") from None


def _check_sizes(value: Any, place: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a number that exceeds LARGEST, and a text or key longer than LONGEST_TEXT or not Unicode."""
    where = f"{'.'.join(place)}: " if place else ""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_sizes(key, place)
            _check_sizes(each, (*place, key))
    elif isinstance(value, list):
        for each in value:
            _check_sizes(each, place)
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{where}expected text of at most {LONGEST_TEXT:,} characters, got {len(value):,}")
    elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}expected Unicode text, got a lone surrogate in it")
    elif isinstance(value, int | float) and place and value > LARGEST.get(place[-1], math.inf):
        raise ValueError(f"{where}expected at most {LARGEST[place[-1]]:,}, got {value}")


@cache
def model_of(cls: type) -> type[BaseModel]:
    """The pydantic model of a dataclass: strict about types, unknown keys refused, checked by the class itself.

    Whether a field is given counts, not its default, which stays the dataclass's.
    """
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {f.name: _field(hints[f.name], f) for f in fields(cls) if f.name not in _hidden(cls)}

    def check(self: BaseModel) -> BaseModel:
        build(cls, self.model_dump(exclude_unset=True))
        return self

    validators: dict[str, Any] = {"check": model_validator(mode="after")(check)}
    config = ConfigDict(extra="forbid", strict=True)
    return create_model(cls.__name__, __config__=config, __validators__=validators, **given)


def _hidden(cls: type) -> set[str]:
    return hidden(cls) | ({"content"} if cls is Recipe else set())


def _field(hint: Any, of: Field) -> tuple[Any, Any]:
    required = of.default is MISSING and of.default_factory is MISSING
    return _annotation(hint), ... if required else None


def _annotation(hint: Any) -> Any:
    """The hint of a pydantic field, with models for dataclasses and text for patterns."""
    bare = unwrapped(hint)
    arguments, origin = typing.get_args(bare), typing.get_origin(bare)
    if bare is Pattern:
        bare = str
    elif is_dataclass(bare):
        bare = model_of(typing.cast(type, bare))
    elif origin is tuple:
        bare = tuple[tuple(each if each is ... else _annotation(each) for each in arguments)]  # type: ignore[misc]
    elif origin is Sequence:
        bare = tuple[_annotation(arguments[0]), ...]  # type: ignore[misc]
    elif origin is Mapping:
        bare = dict[arguments[0], _annotation(arguments[1])]  # type: ignore[misc, valid-type]
    return Optional[bare] if unwrapped(hint) is not hint else bare  # noqa: UP045 (a run-time value)


def _told(problem: Mapping[str, Any]) -> str:
    """A pydantic error as `field: expected X, got Y`."""
    place, kind = [str(part) for part in problem["loc"]], problem["type"]
    where = ".".join(place)
    if kind == "extra_forbidden":
        return f"{where}: expected {_known_key(place)}, got {place[-1]}"
    if kind == "missing":
        return f"{where}: expected a value, got none"
    if kind == "value_error":
        return _joined(where, str(problem["ctx"]["error"]))
    expected = EXPECTED.get(kind) or problem.get("ctx", {}).get("expected") or problem["msg"].lower()
    return f"{where}: expected {expected}, got {_shown(problem['input'])}"


def _joined(where: str, message: str) -> str:
    """A dataclass's own message behind the place of its section."""
    if not where:
        return message
    name, _, rest = message.partition(": ")
    if not re.fullmatch(r"\w+", name):
        return f"{where}: {message}"
    return f"{where}: {rest}" if name[0].isupper() else f"{where}.{message}"


def _known_key(place: Sequence[str]) -> str:
    """What an unknown key may have meant: the same name in another section, a similar one here, or any here."""
    key, section = place[-1], ".".join(part for part in place[:-1] if not part.isdecimal())
    elsewhere = [path for path in _paths(Recipe) if path.rpartition(".")[2] == key]
    here = [path.rpartition(".")[2] for path in _paths(Recipe) if path.rpartition(".")[0] == section]
    if elsewhere:
        return f"a known key such as {elsewhere[0]}"
    if near := difflib.get_close_matches(key, here, 1):
        return f"a known key such as {near[0]}"
    return f"one of {', '.join(here)}" if here else "no key"


def _paths(cls: type, before: str = "") -> Iterator[str]:
    """Dotted names of all fields of a recipe; positions in lists left out."""
    hints = typing.get_type_hints(cls)
    for name in (f.name for f in fields(cls) if f.name not in _hidden(cls)):
        yield before + name
        hint = unwrapped(hints[name])
        for part in (hint, *typing.get_args(hint)):
            if is_dataclass(part):
                yield from _paths(typing.cast(type, part), f"{before}{name}.")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, where PyYAML has 1.1's: `2:4` and `no` are text, 3e-4 is a number. No key twice.

    Lists and mappings are DEEPEST levels deep and MOST values large at most, with aliases in full.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}
    yaml_constructors: typing.ClassVar[dict[str | None, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag in (None, "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._measured: dict[int, tuple[int, int]] = {}  # node -> (values in it, levels)

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, line = self.check_event(yaml.AliasEvent), self.peek_event().start_mark.line + 1
        too_many = f"more than {MOST:,} values or {DEEPEST} levels of them in line {line}"
        self._values += 1
        if self._values > MOST or self._depth == DEEPEST:
            raise ValueError(too_many)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inside = [self._measured[id(n)] for part in parts for n in (part if isinstance(part, tuple) else (part,))]
            levels = 1 + max((levels for _, levels in inside), default=0)
            self._measured[id(node)] = 1 + sum(values for values, _ in inside), levels
        elif id(node) not in self._measured:
            raise ValueError(f"an alias of what it stands in, in line {line}")
        values, levels = self._measured[id(node)]
        if values > MOST or self._depth + levels > DEEPEST:
            raise ValueError(too_many)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r}, no text", node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"an integer of more than 64 bits, {text[:20]}...")
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"a number that is not finite, {text[:20]}")
    return value


_CORE: dict[str, tuple[str, list[str], Any]] = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""], lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"], lambda text: text[0] in "tT"),
    "int": (r"[-+]?[0-9]+", [*"-+0123456789"], _integer),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"], _number),
}
"""Tag -> (what plain text looks like, how it begins, its value), the first that fits."""


def _constructor(tag: str, pattern: re.Pattern[str], read: Any) -> Any:
    """What makes a value of a scalar node; one that was tagged may hold any text."""

    def construct(loader: Any, node: Any) -> Any:
        text = loader.construct_scalar(node)
        if not pattern.match(text):
            raise ValueError(f"{text[:20]!r} tagged as {tag}")
        return read(text)

    return construct


for _tag, (_pattern, _starts, _read) in _CORE.items():
    _rule = re.compile(f"(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _rule, _starts)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor(_tag, _rule, _read))

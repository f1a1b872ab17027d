"""The option that takes every model class, and the table that ends a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from registry.registry_checks import Outcome

ALL_MODELS = "--all-models"
OUTCOMES = pytest.StashKey[list[tuple[str, str, str, list[str]]]]()


@pytest.fixture
def record(pytestconfig) -> Callable[[Outcome], None]:
    """Notes what came of a class, for the table."""
    rows = pytestconfig.stash.setdefault(OUTCOMES, [])
    return lambda outcome: rows.append((outcome.name, outcome.verdict, outcome.reason, outcome.notes))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(ALL_MODELS, action="store_true", help="every model class of transformers, and a table of outcomes")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a worker of pytest-xdist
        session.config.workeroutput["outcomes"] = session.config.stash.get(OUTCOMES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """What a worker of pytest-xdist found."""
    rows = [tuple(row) for row in getattr(node, "workeroutput", {}).get("outcomes", [])]
    node.config.stash.setdefault(OUTCOMES, []).extend(rows)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash.get(OUTCOMES, [])
    if rows and config.getoption(ALL_MODELS, default=False):
        terminalreporter.section("model classes of transformers")
        terminalreporter.write_line("\n".join(table(rows)))


def table(rows: list[tuple[str, str, str, list[str]]]) -> list[str]:
    """Markdown: how many classes came to what, alike reasons together, with an example."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, status, reason, notes in rows:
        groups.setdefault((status, _alike(reason)), []).append(name)
        for note in notes:
            groups.setdefault(("in transformers too", _alike(note)), []).append(name)
    lines = [f"{len(rows)} classes", "", "| outcome | reason | classes | such as |", "|---|---|---|---|"]
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1])))
    return lines + [f"| {what} | {why} | {len(names)} | {names[0]} |" for (what, why), names in ordered]


def _alike(reason: str) -> str:
    """Without what differs from class to class."""
    short = re.sub(r"/\S+/|'[^']*'|\b\w+\.\w[\w.]*", "…", reason)
    return re.sub(r"\d[\d,.]*", "N", short)[:120].replace("|", "/")

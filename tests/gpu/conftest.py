"""What the tests of GPU code share, and the table of caught bugs that ends a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

CATCHES = pytest.StashKey[list[tuple[str, str, dict[str, str | None]]]]()


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory) -> Iterator[None]:
    """A cache of compiled kernels of this run's own: an earlier one may hold what another compiler made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        yield


@pytest.fixture(scope="session")
def record_catches(pytestconfig) -> Callable[[str, str, dict[str, str | None]], None]:
    """record(kernel, bug, {check: what it said, None where it noticed nothing}) adds a row to the table."""
    rows = pytestconfig.stash.setdefault(CATCHES, [])
    return lambda kernel, bug, catches: rows.append((kernel, bug, catches))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if rows := config.stash.get(CATCHES, []):
        terminalreporter.section("bugs on purpose, and which check catches them")
        terminalreporter.write_line("\n".join(table(rows)))


def table(rows: list[tuple[str, str, dict[str, str | None]]]) -> list[str]:
    """Markdown, with an x where a check noticed the bug."""
    checks = list(dict.fromkeys(check for _, _, catches in rows for check in catches))
    lines = [["kernel", "bug", *checks]]
    lines += [[kernel, bug, *("x" if catches.get(c) else "" for c in checks)] for kernel, bug, catches in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]

"""What the tests of GPU code share, and the table of caught bugs that ends a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

ALL_CHECKS = "--all-checks"
CATCHES = pytest.StashKey[list[tuple[str, str, dict[str, str | None]]]]()


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory) -> Iterator[None]:
    """A cache of compiled kernels of this run's own: an earlier one may hold what another compiler made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton_cache")))
        yield


@pytest.fixture
def assert_caught(pytestconfig) -> Callable[[str, str, dict[str, Callable[[], str | None]]], None]:
    """assert_caught(kernel, bug, {name: check}): some check says something, where others may return None or "".

    Checks after the first that notices are left out, but for --all-checks, which fills the table.
    """
    rows = pytestconfig.stash.setdefault(CATCHES, [])

    def run(kernel: str, bug: str, checks: dict[str, Callable[[], str | None]]) -> None:
        catches: dict[str, str | None] = {}
        for name, check in checks.items():
            catches[name] = check()
            if catches[name] and not pytestconfig.getoption(ALL_CHECKS, default=False):
                return
        rows.append((kernel, bug, catches))
        assert any(catches.values()), f"no check catches {bug!r} in {kernel}"

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(ALL_CHECKS, action="store_true", help="try every check on every bug on purpose, print a table")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a worker of pytest-xdist
        session.config.workeroutput["catches"] = session.config.stash.get(CATCHES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """What a worker of pytest-xdist found."""
    rows = [tuple(row) for row in getattr(node, "workeroutput", {}).get("catches", [])]
    node.config.stash.setdefault(CATCHES, []).extend(rows)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash.get(CATCHES, [])
    if rows and config.getoption(ALL_CHECKS, default=False):
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

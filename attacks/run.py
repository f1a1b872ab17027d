"""Run every attack in a process of its own and keep the table of outcomes in README.md.

    python attacks/run.py                 run all, rewrite the table
    python attacks/run.py --check         run all, fail if an outcome differs from the table
    python attacks/run.py checkpoint      run those whose name begins so, print their outcomes

An attack is a file <kind>_<name>.py in this folder. Its docstring says in one sentence what it tries, and it prints one
line, its outcome. One that ends by a signal, with a traceback or after 60 seconds has broken something: the run fails,
whatever the table says. Attacks also run by themselves: python attacks/<kind>_<name>.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import faulthandler
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TABLE = FOLDER / "README.md"
SECONDS = 60
HEAD = """# Attacks

Each script of this folder tries to make sparsenlp read what it must not, run what was not checked, hang, or answer
wrongly without an error. `make attacks` runs them all and fails if one ends by a signal, with a traceback, or in
another way than this table says; `python attacks/run.py` writes the table. `fuzz_*.py` do the same at random.

| attack | what it tries | outcome |
|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """How an attack ended.

    line     what it printed, or what became of the process
    broken   it ended by a signal, with a traceback, too late, or printed something else than one line
    """

    name: str
    purpose: str
    line: str
    broken: bool = False

    @property
    def row(self) -> str:
        cells = (f"`{self.name}`", self.purpose, self.line)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def scripts(beginning: str = "", folder: Path = FOLDER) -> list[Path]:
    """The attacks, by name; fuzzers take their time and are run by themselves."""
    files = sorted(folder.glob("*_*.py"))
    return [file for file in files if file.name.startswith(beginning) and not file.name.startswith("fuzz_")]


def purpose_of(script: Path) -> str:
    """The first sentence of its docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def run(script: Path, seconds: float = SECONDS) -> Outcome:
    """Run one attack in a forked child, which shares the imports of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            _be_the_attack(script, output.fileno(), errors.fileno())
        status = _wait(child, seconds)
        output.seek(0)
        errors.seek(0)
        lines, complaint = output.read().strip().splitlines(), errors.read().strip().splitlines()
    ended = f"{lines[-1] if lines else ''} {complaint[-1] if complaint else ''}".strip()
    purpose = purpose_of(script)
    if status is None:
        return Outcome(script.name, purpose, f"HANGS: no end after {seconds:g} s", broken=True)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Outcome(script.name, purpose, f"SIGNAL {name} after: {ended}", broken=True)
    if os.WEXITSTATUS(status) or len(lines) != 1:
        return Outcome(script.name, purpose, f"FAILS with exit code {os.WEXITSTATUS(status)}: {ended}", broken=True)
    return Outcome(script.name, purpose, lines[0])


def _be_the_attack(script: Path, output: int, errors: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        faulthandler.disable()  # a test runner's: the run itself says how an attack ended
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [str(script)]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """The status of a child, or None if it had to be killed; whatever it started is killed, too."""
    end = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < end:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
        if status is None:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def prepare() -> None:
    """Import once what all attacks need."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(FOLDER))
    import common
    import transformers  # noqa: F401

    common.quiet()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beginning", nargs="?", default="", help="run the attacks whose file name begins so")
    parser.add_argument("--check", action="store_true", help="fail if the table differs")
    arguments = parser.parse_args()
    prepare()
    outcomes = [run(script) for script in scripts(arguments.beginning)]
    for found in outcomes:
        print(f"{found.name}: {found.line}", flush=True)
    broken = [found for found in outcomes if found.broken]
    if arguments.beginning:
        return bool(broken)
    text = HEAD + "".join(f"{found.row}\n" for found in outcomes)
    if arguments.check:
        rows = set(TABLE.read_text(encoding="utf-8").splitlines())
        changed = [found.row for found in outcomes if found.row not in rows]
        gone = sorted(rows - set(text.splitlines()))
        for row in changed:
            print(f"attacks: not in README.md: {row}", file=sys.stderr)
        for row in gone:
            print(f"attacks: only in README.md: {row}", file=sys.stderr)
        if changed or gone:
            print(
                "attacks: expected the outcomes of README.md; python attacks/run.py writes the new ones",
                file=sys.stderr,
            )
            return 1
    elif not broken:
        TABLE.write_text(text, encoding="utf-8")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())

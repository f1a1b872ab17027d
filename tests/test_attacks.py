"""The runner of attacks/: it must see a crash, a hang and a traceback for what they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from attacks import run as runner  # needs the path above

FOLDER = runner.FOLDER

ENDS = {
    "says one line": ('"""Try it."""\nprint("refused | twice")', "refused | twice", False),
    "crashes": (
        '"""Try it."""\nimport os\nprint("so far", flush=True)\nos.abort()',
        "SIGNAL SIGABRT after: so far",
        True,
    ),
    "raises": ('"""Try it."""\nraise KeyError("x")', "FAILS with exit code 1: KeyError: 'x'", True),
    "exits": ('"""Try it."""\nprint("line")\nraise SystemExit(3)', "FAILS with exit code 1: line", True),
    "says nothing": ('"""Try it."""', "FAILS with exit code 0:", True),
    "hangs": ('"""Try it."""\nimport time\ntime.sleep(60)', "HANGS: no end after 0.3 s", True),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_attack_is_reported_as_it_ends(end, tmp_path):
    source, line, broken = ENDS[end]
    script = tmp_path / "kind_name.py"
    script.write_text(source)
    outcome = runner.run(script, seconds=0.3 if end == "hangs" else 30)
    assert (outcome.line.strip(), outcome.broken) == (line, broken)
    assert outcome.row.startswith("| `kind_name.py` | Try it | ")


def test_every_attack_has_a_purpose_and_a_row():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert runner.scripts("checkpoint")
    for script in runner.scripts():
        assert f"| `{script.name}` | {runner.purpose_of(script)} | " in table.replace("\\|", "|"), script.name

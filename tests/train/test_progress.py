import io

from rich.console import Console

from sparsenlp.train import progress as progress_module
from sparsenlp.train.progress import progress_bar


def drawn(monkeypatch, quiet, terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    monkeypatch.setattr(progress_module, "Console", lambda stderr: console)
    with progress_bar("Recover", total=8, done=3, quiet=quiet) as advance:
        advance("loss 0.123")
    return stream.getvalue()


def test_a_terminal_sees_title_count_and_note(monkeypatch):
    text = drawn(monkeypatch, quiet=False, terminal=True)
    assert all(part in text for part in ("Recover", "4/8", "loss 0.123"))


def test_nothing_is_drawn_when_quiet_or_redirected(monkeypatch):
    assert drawn(monkeypatch, quiet=True, terminal=True) == ""
    assert drawn(monkeypatch, quiet=False, terminal=False) == ""

import warnings

import pytest

from sparsenlp.cli.console import warnings_as_notes


def test_a_warning_is_one_line_for_the_user(capsys):
    with warnings_as_notes():
        for _ in range(3):
            warnings.warn("labels: case differs", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err == "warning: labels: case differs\nwarning: another\n"


def test_warnings_for_developers_go_where_they_went(capsys):
    with pytest.warns(DeprecationWarning, match="old"), warnings_as_notes():
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == ""

"""Every test of this folder runs on a GPU, or is skipped with the reason. `make gpu` runs them."""

from __future__ import annotations

import pytest
from on_gpu import why_no_gpu


@pytest.fixture(autouse=True)
def needs_gpu() -> None:
    if reason := why_no_gpu():
        pytest.skip(reason)

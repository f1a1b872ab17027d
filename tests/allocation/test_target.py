from __future__ import annotations

import pytest

from sparsenlp.allocation import Target


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2x faster", "speedup", 2.0),
        ("1.5x", "speedup", 1.5),
        ("latency <= 8 ms", "latency", 0.008),
        ("latency<=250us", "latency", 0.00025),
        ("sparsity 0.85", "sparsity", 0.85),
        ("sparsity 85 %", "sparsity", 0.85),
        ("accuracy drop <= 1 point", "drop", 0.01),
        ("drop <= 0.5 points", "drop", 0.005),
    ],
)
def test_targets_are_read(text, kind, value):
    target = Target.parse(text)
    assert target.kind == kind
    assert target.value == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "2 faster", "latency 8 ms", "latency <= 8", "sparsity", "drop <= 1"])
def test_other_targets_are_refused(text):
    with pytest.raises(ValueError, match='target: expected "2x faster", "latency <= 8 ms"'):
        Target.parse(text)


@pytest.mark.parametrize("text", ["1x faster", "0.5x", "latency <= 0 ms", "sparsity 1", "sparsity 0", "sparsity 100 %"])
def test_targets_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="expected a speed-up above 1"):
        Target.parse(text)

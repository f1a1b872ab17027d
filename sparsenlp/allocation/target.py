"""What a pruned model has to reach, as text."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a pruned model has to reach.

    kind   "speedup" (times the dense model's), "latency" (seconds), "sparsity" (fraction of zeros) or "drop"
           (of the metric, in its own units)
    """

    kind: str
    value: float

    FORMS = '"2x faster", "latency <= 8 ms", "sparsity 0.85" or "accuracy drop <= 1 point"'

    @classmethod
    def parse(cls, text: str) -> Target:
        """One of FORMS; "points" are hundredths. Raises ValueError for anything else, and for values out of range."""
        number = r"(\d+(?:\.\d+)?)"
        rules = {
            "speedup": (rf"{number}\s*x(?: faster)?", {"": 1.0}),
            "latency": (rf"latency\s*<=\s*{number}\s*(us|ms|s)", {"us": 1e-6, "ms": 1e-3, "s": 1.0}),
            "sparsity": (rf"sparsity\s*(?:>=)?\s*{number}\s*(%?)", {"": 1.0, "%": 0.01}),
            "drop": (
                rf"(?:accuracy )?drop\s*<=\s*{number}\s*(points?|%)",
                dict.fromkeys(("point", "points", "%"), 0.01),
            ),
        }
        for kind, (rule, units) in rules.items():
            if found := re.fullmatch(rule, text.strip().lower()):
                unit = found[2] if found.re.groups > 1 else ""
                target = cls(kind, float(found[1]) * units[unit])
                break
        else:
            raise ValueError(f"target: expected {cls.FORMS}, got {text!r}")
        least = {"speedup": target.value > 1, "latency": target.value > 0, "sparsity": 0 < target.value < 1}
        if not least.get(kind, True):
            raise ValueError(
                f"target: expected a speed-up above 1, a latency above 0, a sparsity in (0, 1), got {text!r}"
            )
        return target

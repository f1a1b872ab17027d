"""The demonstration: a real encoder pruned, recovered, converted, saved, reloaded, judged and timed."""

from .config import DemoConfig, full, quick
from .run import run_demo
from .table import footer, markdown, table

__all__ = ["DemoConfig", "footer", "full", "markdown", "quick", "run_demo", "table"]

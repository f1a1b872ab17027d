"""Recipes: what is done to a model, from dense to sparse, as one file that can be run, hashed and kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..sequences import Answers, Perplexity
from .config import Data, FinetuneStage, OneShot, PruneRule, Recipe, Structured
from .new import train_new
from .run import RESULT_FILE, Job, Outcome, prepare, run
from .tasks import UntrainedHead

__all__ = [
    "RESULT_FILE",
    "Answers",
    "Data",
    "FinetuneStage",
    "Job",
    "OneShot",
    "Outcome",
    "Perplexity",
    "PruneRule",
    "Recipe",
    "Structured",
    "UntrainedHead",
    "load_recipe",
    "prepare",
    "run",
    "train_new",
]


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (1.2: `2:4` and `no` are text), checked in full.

    changes   such as "recover.epochs=5", whose values, YAML too, take the place of the file's

    Raises OSError for a file that cannot be read, ValueError in one line (field, expected, got) for anything wrong
    with it, and ModuleNotFoundError without pydantic and PyYAML.
    """
    try:
        from .schema import load
    except ModuleNotFoundError as error:
        if error.name not in ("pydantic", "yaml"):
            raise
        raise ModuleNotFoundError(
            f"recipe: expected the package {error.name}, got none; pip install 'sparsenlp[recipes]'"
        ) from None
    return load(path, changes)

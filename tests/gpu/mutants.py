"""Copies of the kernels' package with a bug in them."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

from problems import PACKAGE, Mutation


def import_mutant(mutation: Mutation, folder: Path) -> str:
    """Import a copy of the package, made in `folder`, that has the bug; returns the copy's name."""
    source = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    name = f"{PACKAGE}_{re.sub(r'[^a-z0-9]+', '_', mutation.name.lower())}"
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / name / mutation.file
    text = file.read_text()
    if mutation.old not in text:
        raise LookupError(f"mutation {mutation.name!r}: expected its text in {mutation.file}, got none: {mutation.old}")
    file.write_text(text.replace(mutation.old, mutation.new))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    importlib.import_module(name)
    return name

"""A recipe that is a pipe nobody writes to, an endless device, or a file of a gigabyte."""

import os

from common import attempt, outcome, scratch

from sparsenlp.recipe import load_recipe

with scratch() as folder:
    os.mkfifo(folder / "pipe.yaml")
    with (folder / "large.yaml").open("wb") as file:
        file.truncate(2**30)
    paths = {"pipe": folder / "pipe.yaml", "device": "/dev/zero", "large": folder / "large.yaml"}
    outcome({name: attempt(lambda path=path: load_recipe(path), folder) for name, path in paths.items()})

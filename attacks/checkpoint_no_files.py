"""A pipe, a directory, a device and a dangling link where files should be."""

import os

from common import CONFIG, WEIGHTS, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    answers = {}
    for file in (CONFIG, WEIGHTS):
        content = (checkpoint / file).read_bytes()
        for kind, make in {
            "pipe": os.mkfifo,
            "directory": os.mkdir,
            "device": lambda path: os.symlink("/dev/zero", path),
            "dangling link": lambda path: os.symlink("nowhere", path),
        }.items():
            (checkpoint / file).unlink()
            make(checkpoint / file)
            answers[f"{kind} {file}"] = attempt(lambda: from_pretrained(checkpoint, mlp()), folder)
            os.rmdir(checkpoint / file) if kind == "directory" else os.unlink(checkpoint / file)
            (checkpoint / file).write_bytes(content)
    outcome(answers)

"""A weights file of 2^40 bytes that takes no room on the disk, whose header describes one tensor of that size."""

import json
import os

from common import WEIGHTS, attempt, bert, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    answers = {}
    for name, load in {"plain": lambda path: from_pretrained(path, mlp()), "transformers": from_pretrained}.items():
        checkpoint = saved(sparse(mlp() if name == "plain" else bert()), folder / name)
        tensor = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
        header = json.dumps({"x": tensor}).encode()
        (checkpoint / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(checkpoint / WEIGHTS, 8 + len(header) + 2**40)
        answers[name] = attempt(lambda load=load, checkpoint=checkpoint: load(checkpoint), folder)
    outcome(answers)

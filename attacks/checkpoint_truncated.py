"""Weights of which the second half is missing."""

import os

from common import WEIGHTS, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size // 2)
    outcome({"from_pretrained": attempt(lambda: from_pretrained(checkpoint, mlp()), folder)})

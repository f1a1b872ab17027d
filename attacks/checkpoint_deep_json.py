"""A config.json of 100,000 nested lists."""

from common import CONFIG, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    (checkpoint / CONFIG).write_text("[" * 100_000)
    outcome({"from_pretrained": attempt(lambda: from_pretrained(checkpoint, mlp()), folder)})

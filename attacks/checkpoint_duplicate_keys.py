"""A config.json in which a key comes twice: readers differ in which one they take."""

from common import CONFIG, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    text = (checkpoint / CONFIG).read_text()
    (checkpoint / CONFIG).write_text(text.replace('"architectures"', '"architectures": [], "architectures"'))
    outcome({"from_pretrained": attempt(lambda: from_pretrained(checkpoint, mlp()), folder)})

"""Numbers in config.json that are none, infinite, too long, or true."""

from common import CONFIG, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    text = (checkpoint / CONFIG).read_text()
    answers = {}
    for number in ("NaN", "-Infinity", "1e999", "true", "9" * 10_000):
        (checkpoint / CONFIG).write_text(text.replace('"format_version": 2', f'"format_version": {number}'))
        answers[number[:10]] = attempt(lambda: from_pretrained(checkpoint, mlp()), folder, 110)
    outcome(answers)

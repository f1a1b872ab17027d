"""Layers whose names have control characters, half a surrogate pair, or a path."""

from common import attempt, edit_config, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained
from sparsenlp.checkpoint import seal

with scratch() as folder:
    answers = {}
    for name in ("\x1b[2J", "\ud800", "../../x", "0\n", "\u0660", "x" * 10_000):
        checkpoint = saved(sparse(mlp()), folder / str(len(answers)))

        def rename(config, name=name):
            block = config["quantization_config"]
            block["modules"][name] = block["modules"].pop("0")
            block["crc32"] = seal(block)

        edit_config(checkpoint, rename)
        answer = attempt(lambda checkpoint=checkpoint: from_pretrained(checkpoint, mlp()), folder, 110)
        answers[ascii(name)[1:12]] = answer.encode("ascii", "backslashreplace").decode()
    outcome(answers)

"""Tensors that overlap in the weights file, leave a gap, or run backwards."""

import json

from common import WEIGHTS, attempt, mlp, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained

with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    raw = (checkpoint / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    answers = {}
    for kind, shift in {
        "overlap": (-4, -4),
        "gap": (4, 4),
        "backwards": (8, -8),
        "beyond the end": (2**40, 2**40),
    }.items():
        header = json.loads(raw[8 : 8 + length])
        offsets = header["0.bias"]["data_offsets"]
        header["0.bias"]["data_offsets"] = [offset + by for offset, by in zip(offsets, shift, strict=True)]
        text = json.dumps(header).encode()
        (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        answers[kind] = attempt(lambda: from_pretrained(checkpoint, mlp()), folder, 110)
    outcome(answers)

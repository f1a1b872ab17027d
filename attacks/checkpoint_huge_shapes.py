"""Sizes of 2^40 in config.json, in the description and in the header of the weights."""

import json

from common import WEIGHTS, attempt, bert, copy_of, edit_config, outcome, saved, scratch, sparse

from sparsenlp import from_pretrained
from sparsenlp.checkpoint import seal


def description(config):
    block = config["quantization_config"]
    next(iter(block["modules"].values()))["shape"] = [2**40, 2**40]
    block["crc32"] = seal(block)


def header(checkpoint):
    raw = (checkpoint / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    content["classifier.bias"]["shape"] = [2**40]
    text = json.dumps(content).encode()
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    answers = {}
    for field in ("vocab_size", "num_hidden_layers", "intermediate_size", "hidden_size"):
        spoiled = copy_of(checkpoint, field)
        edit_config(spoiled, lambda config, field=field: config.update({field: 2**40}))
        answers[field] = attempt(lambda spoiled=spoiled: from_pretrained(spoiled), folder, 60)
    spoiled = copy_of(checkpoint, "shape")
    edit_config(spoiled, description)
    answers["shape of a layer"] = attempt(lambda: from_pretrained(spoiled), folder, 60)
    spoiled = copy_of(checkpoint, "header")
    header(spoiled)
    answers["header"] = attempt(lambda: from_pretrained(spoiled), folder, 60)
    outcome(answers)

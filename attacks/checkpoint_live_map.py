"""The weights file is overwritten and cut short after it was loaded."""

import os

from common import WEIGHTS, attempt, bert, outcome, saved, scratch, sparse, torch
from transformers import AutoModel

from sparsenlp import from_pretrained

IDS = torch.arange(3, 11)[None]


def spoil(load, checkpoint):
    model = load(checkpoint).eval()
    before = model(IDS)[0]
    size = (checkpoint / WEIGHTS).stat().st_size
    with open(checkpoint / WEIGHTS, "r+b") as file:
        file.write(b"\x7f" * size)
    os.truncate(checkpoint / WEIGHTS, 100)
    return "answers as before" if torch.equal(model(IDS)[0], before) else "ANSWERS OTHERWISE"


with scratch() as folder, torch.no_grad():
    doors = {}
    for name, load in {"from_pretrained": from_pretrained, "AutoModel": AutoModel.from_pretrained}.items():
        checkpoint = saved(sparse(bert()), folder / name)
        doors[name] = attempt(lambda load=load, checkpoint=checkpoint: spoil(load, checkpoint), folder)
    outcome(doors)

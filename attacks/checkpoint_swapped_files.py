"""The weights of another checkpoint of the same model."""

import shutil

from common import WEIGHTS, bert, doors, outcome, saved, scratch, sparse, torch

with scratch() as folder:
    first = saved(sparse(bert()), folder / "first")
    other = sparse(bert())
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.mul_(2)
    shutil.copy(saved(other, folder / "second") / WEIGHTS, first / WEIGHTS)
    outcome(doors(first, folder))

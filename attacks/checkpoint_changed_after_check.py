"""The weights file is cut short between the check and transformers' own reading of it."""

import os

from common import WEIGHTS, bert, doors, outcome, saved, scratch, sparse

from sparsenlp.models.hf import SparseNlpQuantizer

check = SparseNlpQuantizer._process_model_before_weight_loading


def then_cut(self, model, **kwargs):
    check(self, model, **kwargs)
    os.truncate(checkpoint / WEIGHTS, 4096)
    return model


with scratch() as folder:
    answers = {}
    for door in ("from_pretrained", "Auto with head", "AutoModel"):
        checkpoint = saved(sparse(bert()), folder / door.replace(" ", ""))
        SparseNlpQuantizer._process_model_before_weight_loading = then_cut
        answers[door] = doors(checkpoint, folder, only=door)[door]
    outcome(answers)

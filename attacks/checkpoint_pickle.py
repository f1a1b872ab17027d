"""A pickle that runs code, in the place of the weights and beside them."""

import os

from common import WEIGHTS, bert, copy_of, doors, outcome, saved, scratch, sparse, torch


class Bomb:
    def __reduce__(self):
        return os.abort, ()


with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    beside = copy_of(checkpoint, "beside")
    torch.save({"x": Bomb()}, beside / "pytorch_model.bin")
    torch.save({"x": Bomb()}, checkpoint / WEIGHTS)
    answers = {f"in place, {door}": answer for door, answer in doors(checkpoint, folder).items()}
    answers.update({f"beside, {door}": answer for door, answer in doors(beside, folder).items()})
    outcome(answers)

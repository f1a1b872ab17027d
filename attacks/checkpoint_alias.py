"""A second tensor for a layer whose own was checked, under a name that transformers takes for the same."""

from common import bert, doors, edit_tensors, outcome, saved, scratch, seal_all, sparse

NAME = "encoder.layer.0.output.dense.col_indices"

with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    edit_tensors(checkpoint, lambda tensors: tensors.update({NAME: tensors[f"bert.{NAME}"] + 30_000}))
    seal_all(checkpoint)
    outcome(doors(checkpoint, folder))

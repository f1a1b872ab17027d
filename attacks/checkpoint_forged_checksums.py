"""Columns beyond the matrix, with checksums that fit."""

from common import bert, doors, edit_tensors, outcome, saved, scratch, seal_all, sparse

NAME = "bert.encoder.layer.0.output.dense.col_indices"

with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    edit_tensors(checkpoint, lambda tensors: tensors[NAME].fill_(30_000))
    seal_all(checkpoint)
    outcome(doors(checkpoint, folder))

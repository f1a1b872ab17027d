"""Row pointers that go once round the 32-bit circle, with checksums that fit."""

from common import attempt, edit_config, edit_tensors, mlp, outcome, saved, scratch, seal_all, sparse, torch

from sparsenlp import from_pretrained


def wrap(tensors):
    for part in ("values", "col_indices"):
        tensors[f"0.{part}"] = tensors[f"0.{part}"][:0].clone()
    ring = torch.tensor([0, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    tensors["0.crow_indices"] = torch.cat([ring, torch.zeros(len(tensors["0.crow_indices"]) - 4, dtype=torch.int32)])


with scratch() as folder:
    checkpoint = saved(sparse(mlp()), folder)
    edit_tensors(checkpoint, wrap)
    edit_config(checkpoint, lambda config: config["quantization_config"]["modules"]["0"].update(nnz_blocks=0))
    seal_all(checkpoint)
    outcome({"from_pretrained": attempt(lambda: from_pretrained(checkpoint, mlp())(torch.ones(4, 16)), folder)})

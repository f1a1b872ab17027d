"""The state of a stopped training run with other tensors and a checksum that fits, or with a changed byte."""

import torch
from common import attempt, bert, outcome, scratch

from sparsenlp.data import TokenizedDataset
from sparsenlp.train import FinetuneConfig, finetune, state

data = TokenizedDataset({"input_ids": [[1, 2, 3]] * 8}, torch.arange(8) % 2, {"input_ids": 0})
config = FinetuneConfig(epochs=1)
changes = {
    "weight": {"model.classifier.weight": torch.zeros(1)},
    "optimizer": {"optimizer.0.exp_avg": torch.zeros(1)},
    "random state": {"random.cpu": torch.zeros(5, dtype=torch.uint8)},
    "stranger": {"system": torch.zeros(1)},
}
answers = {}
with scratch() as folder:
    path = folder / "state.safetensors"
    finetune(bert(), data, config, path, quiet=True)
    identity = state.identity_of((config, None), data, bert())
    saved, whole = state.read_state(path, identity), path.read_bytes()
    for name, change in changes.items():
        state.write_state(path, identity, state.SavedState(saved.step, saved.tensors | change))
        answers[name] = attempt(lambda: finetune(bert(), data, config, path, quiet=True), folder, 110)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    answers["byte"] = attempt(lambda: finetune(bert(), data, config, path, quiet=True), folder, 110)
outcome(answers)

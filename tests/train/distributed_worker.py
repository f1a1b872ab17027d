"""What each process that test_distributed.py starts does: run every job of a file, save what it ends with."""

import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification

from sparsenlp.train import RecoveryConfig, finetune, recover


def main(directory, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    jobs, results = torch.load(directory / "jobs.pt", weights_only=False), {}
    for name, job in jobs.items():
        model, config, data, options = make(directory), job["config"], job["data"], job["options"]
        stop, spoil = options.pop("stop", None), options.pop("spoil", False)
        if spoil and rank == 1:
            model.classifier.bias.data.fill_(7.0)
        if stop:
            options["on_step"] = lambda info, stop=stop: exit_at(info, stop)
        try:
            if isinstance(config, RecoveryConfig):
                log = recover(model, make(directory), data, config, quiet=True, **options)
            else:
                log = finetune(model, data, config, quiet=True, **options)
        except MemoryError:
            continue
        results[name] = {"state": model.state_dict(), "losses": log.losses, "steps": log.steps}
    torch.save(results, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def make(directory):
    return BertForSequenceClassification.from_pretrained(directory / "dense").eval()


def exit_at(info, stop):
    if info.step == stop:
        raise MemoryError


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

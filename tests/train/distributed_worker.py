"""What each process does that torchrun starts for test_distributed.py: every job of a file, and save its end."""

import sys
from pathlib import Path

import torch
from transformers import BertForSequenceClassification

from sparsenlp.prune import masked_layers
from sparsenlp.train import PruningConfig, RecoveryConfig, finetune, recover
from sparsenlp.train.gradual import GradualPruner


def main(directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
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
    results["statistics"] = masks_of_other_gradients(make(directory), rank)
    torch.save(results, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def make(directory):
    return BertForSequenceClassification.from_pretrained(directory / "dense").eval()


def masks_of_other_gradients(model, rank):
    """What processes prune that have seen different gradients."""
    pruner = GradualPruner(model, PruningConfig(ramp_fraction=0.0, sparsity=0.5), 2)
    generator = torch.Generator().manual_seed(rank)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    pruner.after_backward(0)
    pruner.before_step(1)
    return {name: layer.parametrizations.weight[0].mask for name, layer in masked_layers(model).items()}


def exit_at(info, stop):
    if info.step == stop:
        raise MemoryError


if __name__ == "__main__":
    main(Path(sys.argv[1]))

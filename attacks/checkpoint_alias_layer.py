"""One layer described twice, with its name's prefix and without, and other columns the second time."""

import copy

from common import bert, doors, edit_config, edit_tensors, outcome, saved, scratch, seal_all, sparse

NAME = "encoder.layer.0.output.dense"


def twice(tensors):
    for name in [*tensors]:
        if name.startswith(f"bert.{NAME}."):
            tensors[name.removeprefix("bert.")] = tensors[name].clone()


def described_twice(config):
    modules = config["quantization_config"]["modules"]
    modules[NAME] = copy.deepcopy(modules[f"bert.{NAME}"])


with scratch() as folder:
    checkpoint = saved(sparse(bert()), folder)
    edit_tensors(checkpoint, twice)
    edit_config(checkpoint, described_twice)
    seal_all(checkpoint)
    outcome(doors(checkpoint, folder))

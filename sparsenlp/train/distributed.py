"""Training in several processes: each takes a share of every batch, and all make the same step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**22
"""Elements that are summed over processes in one message."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together; with one of them every method leaves things as they are.

    rank   of this process
    count  of all of them
    """

    rank: int = 0
    count: int = 1

    def shard(self, batch: Sequence[int]) -> Sequence[int]:
        """The examples of a batch that are this process's; all of them where there are fewer than processes."""
        return batch if len(batch) < self.count else batch[self.rank :: self.count]

    def weight(self, batch: Sequence[int]) -> float:
        """Of this process's mean over its shard in the mean over the batch."""
        return 1 / self.count if len(batch) < self.count else len(self.shard(batch)) / len(batch)

    def total(self, value: float) -> float:
        """The sum over processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item()

    def any(self, flag: bool) -> bool:
        return self.total(float(flag)) > 0

    def same(self, value: float) -> bool:
        """Whether all processes have the value of the first."""
        if self.count == 1:
            return True
        first = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(first, 0)
        return not self.any(first.item() != value)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over processes."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over processes."""
        self.sum_(tensors)
        if self.count > 1:
            for tensor in tensors:
                tensor.div_(self.count)

    def normalizer(self, value: Tensor, examples: int) -> Tensor:
        """What to divide by, in place of `value`, in a loss that is a sum over examples divided by another such sum.

        value     this process's divisor, or several
        examples  of this process

        The mean of the processes' losses, each with its weight, is then that of the whole batch.
        """
        if self.count == 1:
            return value
        summed = torch.cat([value.flatten(), value.new_tensor([examples])])
        dist.all_reduce(summed)
        return (summed[:-1] * (examples / summed[-1])).view_as(value)

    @torch.no_grad()
    def copy_from_first(self, model: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""
        if self.count > 1:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor, 0)

    def seed(self, seed: int, step: int) -> None:
        """Random numbers for this step that differ between processes and do not depend on earlier steps."""
        if self.count > 1:
            torch.manual_seed(hash((seed, step, self.rank)) & (2**63 - 1))


ALONE = Processes()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors together until they have BUCKET elements: one message for each would take many times longer."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(tensor.numel() for tensor in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def current_processes() -> Processes:
    """Those of the default process group, one if there is none.

    Raises RuntimeError under torchrun before init_process_group, where each process would train alone.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "distributed: expected a process group, as torchrun started several processes, got none; "
            'call torch.distributed.init_process_group("gloo") first'
        )
    return ALONE

"""Kill processes that save over a checkpoint, at random moments; read it beside them; save from several at once.

    python attacks/fuzz_kills.py [--kills 100] [--seed 0]

After every kill the checkpoint must load and be one of the two that were saved, whole. Prints what it counted, and
ends with 1 if anything was lost or left behind.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import bert, mlp, scratch, sparse

from sparsenlp import from_pretrained, save_pretrained

Counts = collections.Counter


class Pair:
    """Two states of one model, and which of them a directory holds."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.models = [sparse(mlp() if kind == "mlp" else bert()) for _ in range(2)]
        with torch.no_grad():
            for parameter in self.models[1].parameters():
                parameter.mul_(2)
        self.expected = [self._answer(model) for model in self.models]

    def save(self, which: int, directory: Path) -> None:
        save_pretrained(self.models[which], directory)

    def held(self, directory: Path) -> str:
        """ "whole", or what is wrong."""
        try:
            loaded = from_pretrained(directory, mlp()) if self.kind == "mlp" else from_pretrained(directory)
        except Exception as error:
            return f"LOST, {type(error).__name__}: {str(error)[:200]}"
        answer = self._answer(loaded)
        return "whole" if any(torch.equal(answer, expected) for expected in self.expected) else "MIXED"

    @torch.no_grad()
    def _answer(self, model: Any) -> torch.Tensor:
        if self.kind == "mlp":
            answer: torch.Tensor = model(torch.ones(2, 16))
            return answer
        return model.eval()(torch.arange(1, 9)[None]).logits


def fork(work: Callable[[], Any]) -> int:
    """A child that does `work` and ends with 0, or with 1 and a line on stderr."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def keep_saving(pair: Pair, directory: Path) -> None:
    while True:
        for which in (1, 0):
            pair.save(which, directory)


def kills(pair: Pair, directory: Path, times: int, moments: random.Random) -> Counts[str]:
    """What the directory held after each kill."""
    found: Counts[str] = Counts()
    for _ in range(times):
        child = fork(lambda: keep_saving(pair, directory))
        time.sleep(moments.uniform(0.001, 0.05))
        end(child)
        found[pair.held(directory)] += 1
    return found


def beside_a_writer(pair: Pair, directory: Path, reads: int) -> Counts[str]:
    child = fork(lambda: keep_saving(pair, directory))
    found = Counts(pair.held(directory) for _ in range(reads))
    end(child)
    return found


def writers(pair: Pair, directory: Path, processes: int, saves: int) -> Counts[str]:
    """How several processes ended that saved to one directory."""

    def work(which: int) -> None:
        for _ in range(saves):
            pair.save(which, directory)

    children = [fork(lambda which=which: work(which % 2)) for which in range(processes)]  # type: ignore[misc]
    ends = Counts("whole" if os.waitpid(child, 0)[1] == 0 else "FAILED" for child in children)
    ends[pair.held(directory)] += 1
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    total: Counts[str] = Counts()
    moments = random.Random(arguments.seed)
    for kind, share in (("mlp", 0.7), ("bert", 0.3)):
        pair = Pair(kind)
        times = round(arguments.kills * share)
        with scratch() as folder:
            directory = folder / "checkpoint"
            pair.save(0, directory)
            stages = {
                f"{times} kills": kills(pair, directory, times, moments),
                "reads beside a writer": beside_a_writer(pair, directory, max(times // 5, 10)),
                "2 writers": writers(pair, directory, 2, max(times // 10, 5)),
                "4 writers of a new directory": writers(pair, folder / "new", 4, 1),
            }
            pair.save(0, directory)
            stages["left behind"] = Counts(f"LEFT {path.name}" for path in folder.iterdir() if path.name[0] == ".")
        for stage, found in stages.items():
            print(f"{kind}, {stage}: {dict(found) or 'nothing'}", flush=True)
            total += found
    broken = sum(total.values()) - total["whole"]
    print(f"{'FAILED' if broken else 'passed'}: {total['whole']} times whole, {broken} times not")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())

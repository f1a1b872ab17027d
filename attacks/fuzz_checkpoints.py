"""Load checkpoints that were changed at random, and run what loads.

    python attacks/fuzz_checkpoints.py [--loads 500] [--seed 0] [--jobs 1]

A changed checkpoint must be refused with CheckpointError, or answer as before, or legitimately have other weights: its
checksums were made to fit, or its configuration says otherwise. Anything else (another exception, a signal, a hang,
other numbers without a reason) is a failure, printed with its seed: `--seed N --loads 1` repeats it. Seeds go up from
the first, so a run continues where another stopped. Ends with 1 after a failure.
"""

from __future__ import annotations

import argparse
import collections
import copy
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import bert, mlp, quiet, scratch, sparse
from mutations import mutate
from torch import nn

from sparsenlp import CheckpointError, NMLinear, SparseLinear, from_pretrained, save_pretrained
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_

IDS = torch.arange(3, 11)[None]
SECONDS = 20
MEMORY = 12 * 2**30
BATCH = 50
MISMATCH = "You set `ignore_mismatched_sizes` to `False`"
"""What transformers says of a tensor of another shape; whoever loads may have asked it to go on."""

FAILURES = ("raw exception", "wrong numbers", "does not run", "signal or hang")


class Recurrent(nn.Module):
    """LSTM, GRU and convolution, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gru(self.lstm(x)[0])[0]
        y: torch.Tensor = self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return y


@dataclass(frozen=True)
class Case:
    """A checkpoint, how to load it, and what it answers.

    skeleton  None for a transformers model
    """

    directory: Path
    skeleton: nn.Module | None
    doors: dict[str, Callable[[Path], Any]]
    answers: dict[str, Any]


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    model.eval()
    if isinstance(model, Recurrent):
        y: torch.Tensor = model(torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16))
        return y
    if isinstance(model, nn.Sequential):
        y = model(torch.linspace(-1, 1, 32).view(2, 16))
        return y
    extra = {"decoder_input_ids": IDS[:, :4]} if "Conditional" in type(model).__name__ else {}
    outputs: torch.Tensor = model(IDS, **extra)[0]
    return outputs


def _int8(model: Any) -> Any:
    for name, module in [*model.named_modules()]:
        if isinstance(module, SparseLinear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.quantize())
    return model


def _two_of_four(model: Any) -> Any:
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and "encoder" in name:
            groups = module.weight.data.view(len(module.weight), -1, 4)
            groups.scatter_(2, groups.abs().argsort(2)[..., :2], 0)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, NMLinear.from_dense(module))
    return model


def models() -> Iterator[tuple[str, Any]]:
    """(name, sparse model), a dozen of them."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from sparsenlp.models.decoders import conv1d_to_linear_
    from sparsenlp.models.rnn_seq2seq import RnnForConditionalGeneration, RnnSeq2SeqConfig
    from sparsenlp.models.textcnn import TextCnnConfig, TextCnnForSequenceClassification
    from sparsenlp.prune import remove_heads_, remove_neurons_

    yield "mlp", sparse(mlp(), (4, 1))
    yield "mlp_int8", _int8(sparse(mlp(), (8, 4)))
    torch.manual_seed(0)
    recurrent = sparse(Recurrent())
    yield "recurrent", recurrent
    recurrent = copy.deepcopy(recurrent)
    recurrent.lstm, recurrent.gru, recurrent.conv = (
        layer.quantize() for layer in (recurrent.lstm, recurrent.gru, recurrent.conv)
    )
    yield "recurrent_int8", recurrent
    yield "bert", sparse(bert())
    plain = sparse(bert())
    unfuse_encoders_(plain)
    yield "bert_unfused", plain
    int8 = _int8(copy.deepcopy(plain))
    fuse_encoders_(int8)
    yield "bert_int8", int8
    yield "bert_2_4", _two_of_four(bert())
    fewer = bert()
    remove_heads_(fewer, {0: [0]})
    remove_neurons_(fewer, {0: [*range(8)]})
    yield "bert_fewer_heads", sparse(fewer)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    yield "llama", sparse(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
    gpt2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    yield "gpt2", sparse(conv1d_to_linear_(GPT2LMHeadModel(gpt2)))
    textcnn = TextCnnConfig(vocab_size=60, embedding_size=16, filters=16, pad_token_id=0, num_labels=3)
    yield "textcnn", sparse(TextCnnForSequenceClassification(textcnn))
    words = {"vocab_size": 60, "decoder_vocab_size": 40, "embedding_size": 16, "hidden_size": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    yield "seq2seq", sparse(RnnForConditionalGeneration(RnnSeq2SeqConfig(**words, **tokens)))


def build(folder: Path) -> list[Case]:
    import transformers

    cases = []
    for name, model in models():
        directory = save_pretrained(model, folder / name)
        skeleton = {"mlp": mlp, "recurrent": Recurrent}.get(name.split("_")[0])
        doors: dict[str, Callable[[Path], Any]] = {"from_pretrained": from_pretrained}
        if skeleton is not None:
            dense = skeleton()
            doors = {"from_pretrained": lambda path, dense=dense: from_pretrained(path, copy.deepcopy(dense))}
        elif name.startswith("bert"):
            doors["AutoModel"] = transformers.AutoModel.from_pretrained
            doors["Auto, head"] = transformers.AutoModelForSequenceClassification.from_pretrained
        elif name in ("llama", "gpt2"):
            doors["AutoModel"] = transformers.AutoModel.from_pretrained
            doors["Auto, head"] = transformers.AutoModelForCausalLM.from_pretrained
        answers = {door: answer(load(directory)) for door, load in doors.items()}
        cases.append(Case(directory, dense if skeleton is not None else None, doors, answers))
    return cases


def attempt(case: Case, others: list[Path], seed: int, folder: Path) -> tuple[str, str]:
    """(outcome, what was done) of one changed checkpoint."""
    random_ = random.Random(seed)
    door = random_.choice([*case.doors])
    target = folder / f"seed{seed}"
    shutil.copytree(case.directory, target)
    changes = mutate(target, others, random_, any_field=door == "from_pretrained")
    what = f"seed {seed}, {case.directory.name} by {door}, {changes}"
    try:
        model = case.doors[door](target)
    except CheckpointError as error:
        named = str(target) in str(error) or "config.json" in str(error)
        return ("refused", what) if named else ("raw exception", f"{what}: no file named: {error}")
    except ValueError as error:
        if str(error).startswith("from_pretrained: expected model="):
            return "refused", what
        return "raw exception", f"{what}: ValueError: {error}"
    except Exception as error:
        if door != "from_pretrained" and str(error).startswith(MISMATCH):
            return "refused by transformers", what
        return "raw exception", f"{what}: {type(error).__name__}: {str(error)[:300]}"
    finally:
        shutil.rmtree(target, ignore_errors=True)
    may_differ = changes.startswith("sealed") or "config " in changes or "config.json" in changes
    try:
        now = answer(model)
    except Exception as error:
        return ("does not run" if not may_differ else "other configuration, does not run"), f"{what}: {error!r:.300}"
    if now.shape == case.answers[door].shape and torch.equal(now, case.answers[door]):
        return "equal", what
    return ("other weights" if may_differ else "wrong numbers"), what


def batch(cases: list[Case], seeds: range, folder: Path) -> list[tuple[str, str]]:
    """Outcomes of some seeds, in a child that may crash; what comes after a crash goes to another child."""
    outcomes: list[tuple[str, str]] = []
    others = [case.directory for case in cases]
    while len(outcomes) < len(seeds):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(cases, others, seeds[len(outcomes) :], folder, writer)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                outcome, _, what = line.rstrip("\n").partition("\t")
                outcomes.append((outcome, what))
        status = os.waitpid(child, 0)[1]
        if status:
            seed = seeds[len(outcomes)]
            name = cases[seed % len(cases)].directory.name
            ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {status >> 8}"
            outcomes.append(("signal or hang", f"seed {seed}, {name}: {ended}"))
    return outcomes


def _work(cases: list[Case], others: list[Path], seeds: range, folder: Path, writer: int) -> None:
    """Never returns."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with os.fdopen(writer, "w", encoding="utf-8", errors="backslashreplace") as output:
            for seed in seeds:
                signal.alarm(SECONDS)
                outcome, what = attempt(cases[seed % len(cases)], others, seed, folder)
                print(outcome, " ".join(what.split()), sep="\t", file=output, flush=True)
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments = parser.parse_args()
    quiet()
    counts: collections.Counter[str] = collections.Counter()
    last = arguments.seed + arguments.loads
    with scratch() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        cases = build(folder)
        ranges = [range(first, min(first + BATCH, last)) for first in range(arguments.seed, last, BATCH)]
        for number, outcomes in enumerate(pool.map(lambda seeds: batch(cases, seeds, folder), ranges), 1):
            counts.update(outcome for outcome, _ in outcomes)
            for outcome, what in outcomes:
                if outcome in FAILURES:
                    print(f"{outcome}: {what}", flush=True)
            if number % 20 == 0:
                print(f"up to seed {ranges[number - 1][-1]}: {dict(counts)}", flush=True)
    failures = sum(counts[outcome] for outcome in FAILURES)
    print(f"{'FAILED' if failures else 'passed'}: {arguments.loads} loads: {dict(sorted(counts.items()))}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

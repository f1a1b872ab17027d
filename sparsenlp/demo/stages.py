"""The stages: each reads what earlier ones wrote, writes its own, and returns its result as JSON data."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..benchmark import BASELINES, bench
from ..checkpoint import WEIGHTS_FILE
from ..classifiers import judge, load_model, load_tokenizer, save_model
from ..convert import SparsifyConfig, sparsify_
from ..data import TextDataset, TokenizedDataset, load_table, minilm_directory, rotten_tomatoes, tokenize
from ..measure import machine
from ..prune import Block, finalize_, prunable, sparsity_of
from ..report import cosine_similarity
from ..train import FinetuneConfig, RecoveryConfig, StepInfo, finetune, predict, recover
from .config import DemoConfig, percent

PATTERN = Block(8, 1)
LOGITS_FILE = "logits.safetensors"

OnProgress = Callable[[int, int, str], None]
"""(steps done, of how many, a few words)"""


@dataclass(frozen=True)
class Context:
    """Where a stage works, and whom it tells how far it is.

    state   file for resuming, which the stage may leave behind
    """

    directory: Path
    config: DemoConfig
    state: Path
    progress: OnProgress

    def path(self, name: str) -> Path:
        return self.directory / name

    def on_step(self, step: StepInfo) -> None:
        self.progress(step.step, step.total, f"loss {step.loss:.3f}  {step.note}")


@dataclass(frozen=True)
class Stage:
    """One step of the demonstration.

    title     for people
    run       does the work; its result goes into the record
    needs     stages that it builds on: if one of them is done again, so is this
    outputs   files below the directory without which it counts as not done
    settings  what else decides the result
    """

    name: str
    title: str
    run: Callable[[Context], dict[str, Any]]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: dict[str, Any]


def stages_of(config: DemoConfig) -> dict[str, Stage]:
    """All stages by name, in an order in which they can be done."""
    c = config
    data = {"data": c.data, "train": c.train_examples, "test": c.test_examples, "seed": c.seed}
    dense = {"model": c.model, "epochs": c.finetune_epochs, "rate": c.finetune_rate, "length": c.max_length}
    here = {**machine(), "threads": c.threads}
    counts = {"tokens": c.token_counts, "seconds": c.measure_seconds, **here}
    latency = {"settings": [str(s) for s in c.settings], "baselines": c.baselines, "seconds": c.seconds, **here}
    names = [percent(target) for target in c.targets]
    files = ("data/train.jsonl", "data/test.jsonl")
    stages = [
        Stage("data", "Data", split_data, (), files, data),
        Stage("dense", "Fine-tune the dense model", train_dense, ("data",), (f"dense/{WEIGHTS_FILE}",), dense),
    ]
    for target, name in zip(c.targets, names, strict=True):
        run, settings = partial(prune_to, target=target), {"target": target, "epochs": c.recover_epochs}
        output = f"work/pruned{name}/{WEIGHTS_FILE}"
        stages.append(Stage(f"prune-{name}", f"Prune to {name} %", run, ("dense",), (output,), settings))
    for name in names:
        run, output = partial(convert, name=name), f"sparse{name}/{WEIGHTS_FILE}"
        stages.append(Stage(f"convert-{name}", f"Convert {name} %", run, (f"prune-{name}",), (output,), counts))
    stages.append(
        Stage("judge-dense", "Evaluate dense", judge_dense, ("dense",), (LOGITS_FILE,), {"baselines": c.baselines})
    )
    for name in names:
        run, pair = partial(judge_sparse, name=name), (f"convert-{name}", "judge-dense")
        stages.append(Stage(f"judge-{name}", f"Evaluate {name} %", run, pair, (), {}))
    models = ("dense", *(f"convert-{name}" for name in names))
    stages.append(Stage("latency", "Latency", measure_latency, models, (), latency))
    return {stage.name: stage for stage in stages}


def split_data(context: Context) -> dict[str, Any]:
    """Write the training and test texts as JSONL, for the other stages and for the user."""
    config = context.config
    if config.data is None:
        train, test = rotten_tomatoes(seed=config.seed)
    else:
        train, test = load_table(config.data).split(seed=config.seed)
    train = train.sample(config.train_examples or len(train), config.seed)
    test = test.sample(config.test_examples or len(test), config.seed)
    context.path("data").mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("test", test)):
        rows = zip(texts.texts, texts.labels, strict=True)
        lines = [json.dumps({"text": text, "label": texts.label_names[label]}) for text, label in rows]
        context.path(f"data/{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": len(train), "test": len(test), "labels": train.label_names}


def train_dense(context: Context) -> dict[str, Any]:
    """Fine-tune the encoder on the labels."""
    config = context.config
    source = config.model or str(minilm_directory())
    tokenizer, data = _tokenized(context, "train", source)
    model = load_model(source, _labels(context))
    settings = FinetuneConfig(epochs=config.finetune_epochs, learning_rate=config.finetune_rate, seed=config.seed)
    log = finetune(model, data, settings, context.state, quiet=True, on_step=context.on_step)
    save_model(model, context.path("dense"), tokenizer)
    return {"steps": len(log.losses), "epochs": config.finetune_epochs}


def prune_to(context: Context, target: float) -> dict[str, Any]:
    """Prune a copy of the dense model to `target` gradually while the dense model teaches it; masks burned in."""
    config = context.config
    source = str(context.path("dense"))
    tokenizer, data = _tokenized(context, "train", source)
    dense = load_model(source)
    model = copy.deepcopy(dense)
    settings = RecoveryConfig(pattern=PATTERN, sparsity=target, epochs=config.recover_epochs, seed=config.seed)
    log = recover(model, dense, data, settings, state_path=context.state, quiet=True, on_step=context.on_step)
    save_model(finalize_(model), context.path(f"work/pruned{percent(target)}"), tokenizer)
    return {"steps": len(log.losses), "epochs": config.recover_epochs, "sparsity": sparsity_of(model)}


def convert(context: Context, name: str) -> dict[str, Any]:
    """Measure each layer on this machine, convert those that gain, and save the checkpoint."""
    config = context.config
    source = str(context.path(f"work/pruned{name}"))
    model = load_model(source)
    sparsity, layers = sparsity_of(model), tuple(prunable(model))
    settings = SparsifyConfig(token_counts=config.token_counts, seconds=config.measure_seconds, threads=config.threads)
    plan = sparsify_(model, settings)
    save_model(model, context.path(f"sparse{name}"), load_tokenizer(source))
    sizes = {kind: _file_bytes(context.path(kind), layers) for kind in ("dense", f"sparse{name}")}
    dense, sparse = sizes.values()
    return {
        "sparsity": sparsity,
        "layers": len(plan.rows),
        "converted": len(plan.converted),
        "bytes": {"dense": dense[0], "sparse": sparse[0]},
        "layer_bytes": {"dense": dense[1], "sparse": sparse[1]},
        "plan": plan.as_dict(),
    }


def judge_dense(context: Context) -> dict[str, Any]:
    """Accuracy of the dense model, in fp32 and in each lower precision that a baseline runs it in."""
    _, data = _tokenized(context, "test", str(context.path("dense")))
    model = load_model(str(context.path("dense")))
    names = [*dict.fromkeys(eager(name) for name in context.config.baselines)]
    reference = predict(model, data)
    save_file({"logits": reference}, context.path(LOGITS_FILE))
    results = {"eager fp32": judge(reference, data.labels, reference).as_dict()}
    for done, name in enumerate(names, start=1):
        context.progress(done, len(names) + 1, name)
        if name not in results:
            built: Any = BASELINES[name].build(model)
            results[name] = judge(predict(built, data), data.labels, reference).as_dict()
    return results


def judge_sparse(context: Context, name: str) -> dict[str, Any]:
    """Accuracy through the sparse layers, and how far logits and weights have moved from the dense model's."""
    source = str(context.path(f"sparse{name}"))
    _, data = _tokenized(context, "test", source)
    model = load_model(source)
    quality = judge(predict(model, data), data.labels, load_file(context.path(LOGITS_FILE))["logits"])
    similarity = cosine_similarity(load_model(str(context.path("dense"))), model)
    return {**quality.as_dict(), "weight_cosine": similarity.overall}


def measure_latency(context: Context) -> dict[str, Any]:
    """All checkpoints and all dense baselines in one process, interleaved."""
    config = context.config
    names = [percent(target) for target in config.targets]
    sparse = {sparse_name(name): load_model(str(context.path(f"sparse{name}"))) for name in names}
    dense = load_model(str(context.path("dense")))
    report = bench(dense, sparse, config.settings, config.baselines, config.threads, config.seconds, context.progress)
    return report.as_dict()


def eager(name: str) -> str:
    """The baseline that predicts the same as a compiled one, but for rounding."""
    return name.replace("compiled", "eager")


def sparse_name(name: str) -> str:
    """What the rows of a target begin with."""
    return f"{name} % sparse"


def _labels(context: Context) -> list[str]:
    return load_table(context.path("data/train.jsonl")).label_names


def _tokenized(context: Context, part: str, source: str) -> tuple[Any, TokenizedDataset]:
    """The tokenizer of a model, and the texts of data/<part>.jsonl in its tokens."""
    tokenizer = load_tokenizer(source)
    texts: TextDataset = load_table(context.path(f"data/{part}.jsonl"), label_names=_labels(context))
    return tokenizer, tokenize(texts, tokenizer, context.config.max_length)


def _file_bytes(directory: Path, layers: tuple[str, ...]) -> tuple[int, int]:
    """(size of the weights file, bytes in it that belong to `layers`)."""
    file = directory / WEIGHTS_FILE
    prefixes = tuple(f"{layer}." for layer in layers)
    with safe_open(file, framework="pt") as tensors:
        inside = [tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118
    return file.stat().st_size, sum(t.numel() * t.element_size() for t in inside)

"""sparsenlp prune"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import native
from ..measure import use_threads
from .console import note, output_directory, print_table, resumable, say
from .evaluate import quality_cells
from .options import LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads

if TYPE_CHECKING:
    from torch import nn

    from ..classifiers import Head
    from ..data import TextDataset, TokenizedDataset
    from ..plan import Plan
    from ..train import FinetuneConfig, RecoveryConfig

HELD_OUT = 0.1
"""Share of the rows that is kept for testing where there is no test file."""
FINETUNE_EPOCHS = 3
"""Where the model needs fine-tuning and the user does not say how much."""
RESULT_FILE = "sparsenlp.json"


def prune(
    model: Annotated[
        str, typer.Argument(help="Dense sequence classifier or encoder: directory or hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Directory for the sparse checkpoint.", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Training texts: CSV, TSV or JSONL.", show_default=False)] = None,
    test: Annotated[
        Path | None, typer.Option(help="Test texts. (default: a tenth of --data)", show_default=False)
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    text_pair_column: TextPairColumn = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of the encoder's weights to remove.")] = 0.9,
    pattern: Annotated[str, typer.Option(help="Blocks of rows x columns, 2:4, or unstructured.")] = "8x1",
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What goes first: magnitude, relative or random; with --data also taylor, fisher, gradient, snip, "
            "movement or wanda. (default: taylor with --data)",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="global: one ranking of all weights; local: each layer alike; row: each row of each layer alike. "
            "(default: what suits the criterion, global for taylor)",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data while pruning and recovering.")] = 3,
    finetune_epochs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Passes of dense training first. (default: 3 if the model needs it)", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per training step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the recovery.")] = 3e-4,
    max_length: MaxLength = 256,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens per batch to be fast for; repeatable. (default: 128)", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the batches, a new head and random pruning.")] = 0,
    threads: Threads = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where an interrupted run waits. (default: OUTPUT/work)", show_default=False)
    ] = None,
) -> None:
    """Prune a transformers classifier, win its accuracy back, and convert it to fast sparse layers.

    A model without a trained head, or with other classes than the data, is fine-tuned first. Then
    weights are removed little by little while the dense model teaches what remains. At the end every
    layer becomes sparse where that is faster on this machine. After Ctrl-C the same
    command goes on where it stopped. Without --data the weights are removed at once and accuracy is
    not recovered.

    \b
    sparsenlp prune bert-base-uncased out --data train.csv --test test.csv
    sparsenlp prune my-model out --data train.csv --sparsity 0.8 --tokens 16 --tokens 2048
    sparsenlp prune my-model out --data pairs.tsv --text-column question --text-pair-column answer
    sparsenlp prune my-model out --sparsity 0.5 --criterion magnitude
    """
    from ..classifiers import is_sparse_checkpoint, load_config, load_tokenizer, max_tokens

    _check_paths(model, output)
    if is_sparse_checkpoint(model):
        raise ValueError(f"model: expected a dense model, got a sparse checkpoint: {model}")
    counts = tuple(tokens or (128,))
    with use_threads(threads):
        if data is None:
            _one_shot(model, output, pattern, sparsity, criterion or "magnitude", scope, counts, seed)
            return
        recovery = _recovery_config(pattern, sparsity, criterion or "taylor", scope)
        recovery = replace(recovery, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
        config, tokenizer = load_config(model), load_tokenizer(model)
        columns = (text_column, label_column, text_pair_column)
        head, train_texts, test_texts = _read(data, test, columns, config, bool(finetune_epochs), seed)
        finetuning = _finetune_config(head, finetune_epochs, batch_size, seed)
        limit = min(max_length, max_tokens(config, tokenizer) or max_length)
        job = _Job(output, work_dir or output / "work", tokenizer, train_texts, test_texts, limit, counts)
        with resumable():
            _train_and_convert(model, head, job, finetuning, recovery)


@dataclass(frozen=True)
class _Job:
    """What is read and written."""

    output: Path
    work: Path
    tokenizer: Any
    train: TextDataset
    test: TextDataset
    max_length: int
    token_counts: tuple[int, ...]

    def tokenized(self, texts: TextDataset) -> TokenizedDataset:
        from ..data import tokenize

        return tokenize(texts, self.tokenizer, self.max_length)


def _train_and_convert(
    name: str, head: Head, job: _Job, finetuning: FinetuneConfig | None, recovery: RecoveryConfig
) -> None:
    """Fine-tune if needed, prune and recover, convert, save, and say what it cost."""
    from ..classifiers import judge, load_model, save_model
    from ..prune import finalize_
    from ..train import finetune, predict, recover

    train, test = job.tokenized(job.train), job.tokenized(job.test)
    dense = load_model(name, head.names)
    _check_pattern(dense, recovery)
    states = [job.work / "finetune.safetensors", job.work / "recover.safetensors"]
    if finetuning is not None:
        note(f"fine-tuning the dense model first: {head.why or 'as asked'} ({finetuning.epochs} epochs)")
        finetune(dense, train, finetuning, states[0])
        save_model(dense, job.work / "dense", job.tokenizer)
    elif head.why:
        note(head.why)
    reference = predict(dense, test)
    pruned = copy.deepcopy(dense)
    recover(pruned, dense, train, recovery, state_path=states[1])
    plan = _convert(finalize_(pruned), recovery.sparsity, job.token_counts)
    logits = predict(pruned, test)
    qualities = {"dense": judge(reference, test.labels), "sparse": judge(logits, test.labels, reference)}
    save_model(pruned, job.output, job.tokenizer)
    _write_result(job.output, plan, {name: quality.as_dict() for name, quality in qualities.items()})
    for state in states:
        state.unlink(missing_ok=True)
    if finetuning is None and job.work.is_dir() and not any(job.work.iterdir()):
        job.work.rmdir()
    print_table(quality_cells(qualities), f"{len(test)} test examples")
    _summarize(pruned, plan, job.output)
    if finetuning is not None:
        say(f"dense model: {job.work / 'dense'}")


def _one_shot(
    name: str,
    output: Path,
    pattern: str,
    sparsity: float,
    criterion: str,
    scope: str | None,
    counts: tuple[int, ...],
    seed: int,
) -> None:
    """Prune by the weights alone at once, convert and save."""
    import torch

    from ..classifiers import load_model, load_tokenizer, save_model
    from ..prune import finalize_, find_criterion, parse_pattern, prune_

    rule = find_criterion(criterion)
    if rule.needs:
        raise ValueError(
            f"criterion: expected --data for {criterion}, which needs gradients or inputs, got none; or use magnitude"
        )
    tokenizer, model = load_tokenizer(name), load_model(name)
    _check_sparsity(sparsity)
    torch.manual_seed(seed)
    prune_(model, parse_pattern(pattern), sparsity, criterion, scope or rule.scope)
    note("warning: no --data, so the accuracy that pruning costs is neither recovered nor measured")
    plan = _convert(finalize_(model), sparsity, counts)
    save_model(model, output, tokenizer)
    _write_result(output, plan, {})
    _summarize(model, plan, output)


def _check_paths(model: str, output: Path) -> None:
    output_directory(output)
    if output.is_dir() and Path(model).is_dir() and output.samefile(model):
        raise ValueError(f"output: expected another directory than the model's, got {output}")


def _check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a fraction between 0 and 1, got {sparsity}")


def _check_pattern(model: nn.Module, recovery: RecoveryConfig) -> None:
    """Find out before any training whether the pattern fits every layer; the model stays as it is."""
    from ..prune import finalize_, prune_

    prune_(model, recovery.pattern, 0.0)
    finalize_(model)


def _recovery_config(pattern: str, sparsity: float, criterion: str, scope: str | None) -> RecoveryConfig:
    from ..prune import find_criterion, parse_pattern
    from ..train import RecoveryConfig

    _check_sparsity(sparsity)
    scope = scope or find_criterion(criterion).scope
    return RecoveryConfig(pattern=parse_pattern(pattern), sparsity=sparsity, criterion=criterion, scope=scope)


def _finetune_config(head: Head, epochs: int | None, batch_size: int, seed: int) -> FinetuneConfig | None:
    """None where the dense model can be used as it is."""
    from ..train import FinetuneConfig

    if head.trained:
        return None
    if epochs == 0:
        raise ValueError(f"finetune-epochs: expected at least 1, as {head.why}, got 0")
    return FinetuneConfig(epochs=epochs or FINETUNE_EPOCHS, batch_size=batch_size, seed=seed)


def _read(
    data: Path, test: Path | None, columns: tuple[str, str, str | None], config: Any, retrain: bool, seed: int
) -> tuple[Head, TextDataset, TextDataset]:
    """(classes, training texts, test texts), both with labels that index the classes."""
    from ..classifiers import choose_head
    from ..data import check_split, load_table

    head = choose_head(config, load_table(data, *columns).label_names, retrain)
    texts = load_table(data, *columns, label_names=head.names)
    if test is not None:
        test_texts = load_table(test, *columns, label_names=head.names)
        check_split(texts, test_texts)
        return head, texts, test_texts
    train, held_out = texts.split(HELD_OUT, seed)
    note(f"no --test: {len(held_out)} of the {len(texts)} rows are held out for testing")
    return head, train, held_out


def _convert(model: nn.Module, sparsity: float, counts: tuple[int, ...]) -> Plan:
    """Sparse layers where they are faster; if few zeros were asked for, layers with few are considered too."""
    from ..convert import SparsifyConfig, sparsify_

    if not native.available:
        note(f"{native.why_unavailable}: without it no sparse layer is faster than a dense one")
    note("choosing for every layer by what is fast on this machine; the first time takes some seconds more")
    least = min(SparsifyConfig.min_sparsity, 0.9 * sparsity)
    return sparsify_(model, SparsifyConfig(token_counts=counts, min_sparsity=least))


def _write_result(output: Path, plan: Plan, qualities: dict[str, Any]) -> None:
    """Quality and plan as JSON beside the checkpoint."""
    partial = output / f"{RESULT_FILE}.partial"
    partial.write_text(json.dumps({"quality": qualities, "plan": plan.as_dict()}, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, output / RESULT_FILE)


def _summarize(model: nn.Module, plan: Plan, output: Path) -> None:
    from ..report import report

    sizes = report(model)
    weights = {row.name: row.shape[0] * row.shape[1] for row in plan.rows if row.sparsity > 0}
    zeros = sum(row.sparsity * weights[row.name] for row in plan.rows if row.name in weights) / sum(weights.values())
    say(
        f"{zeros:.1%} of the weights of {len(weights)} pruned layers are zero; {len(plan.converted)} of them are sparse"
    )
    if not plan.converted:
        say("every layer stays dense, because that is faster here: expect no speed-up")
    say(f"memory: {sizes.dense_bytes / 1e6:.1f} MB dense, {sizes.stored_bytes / 1e6:.1f} MB now")
    say(f"saved: {output}; layer by layer: {output / RESULT_FILE}")
    say(f"next: sparsenlp bench {output}")

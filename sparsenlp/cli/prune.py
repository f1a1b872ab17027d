"""sparsenlp prune"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..measure import use_threads
from .console import note, print_table, resumable, say
from .evaluate import quality_cells, quality_title
from .options import DATA, Count, LabelColumn, MaxLength, TextColumn, TextPairColumn, Threads, WordNet, data_section

if TYPE_CHECKING:
    from ..plan import Plan
    from ..recipe import Job, Outcome, Recipe

BESIDE_RECIPE = ("model", "output", "recipe", "changes", "threads", "work_dir")
"""Parameters that a recipe leaves open."""
PLACES = {
    "data": ("data.train",),
    "test": ("data.test",),
    "text_column": ("data.text_column",),
    "label_column": ("data.label_column",),
    "text_pair_column": ("data.text_pair_column",),
    "wordnet": ("data.path",),
    "count": ("data.count",),
    "max_length": ("data.max_length",),
    "sparsity": ("prune.sparsity",),
    "pattern": ("prune.pattern",),
    "criterion": ("prune.criterion",),
    "scope": ("prune.scope",),
    "epochs": ("recover.epochs",),
    "batch_size": ("recover.batch_size", "finetune.batch_size"),
    "learning_rate": ("recover.learning_rate",),
    "finetune_epochs": ("finetune.epochs",),
    "tokens": ("convert.token_counts",),
    "seed": ("seed",),
    "target": ("target",),
}
"""Where in a recipe an option belongs."""
PHASES = {
    "epochs": ("rounds.growing.epochs", "rounds.recovering.epochs"),
    "batch_size": ("rounds.growing.batch_size", "rounds.recovering.batch_size", "finetune.batch_size"),
    "learning_rate": ("rounds.recovering.learning_rate",),
}
"""The same for a target that is met in rounds."""


def prune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Dense model, directory or hub id: a sequence classifier, an encoder or language model to make one "
            "of, or a model of `train`; without --data any model of transformers. Left out with --recipe.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(help="Directory for the sparse checkpoint.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file that says all of this, see examples/; only OUTPUT beside it.", show_default=False),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help='Of --recipe, in place of what it says, as in --set seed=1 --set "target=sparsity 0.8"; repeatable.',
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=DATA,
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Test texts. (default: a tenth of --data)", show_default=False)
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    text_pair_column: TextPairColumn = None,
    wordnet: WordNet = None,
    count: Count = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of the encoder's weights to remove.")] = 0.9,
    target: Annotated[
        str | None,
        typer.Option(
            help='Instead of --sparsity: "2x faster" or "latency <= 8 ms" (of a forward pass with --tokens tokens, on '
            'this machine), or "accuracy drop <= 1 point".',
            show_default=False,
        ),
    ] = None,
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
    command goes on where it stopped. Without --data the weights are removed at once, whatever the model is
    for, and accuracy is not recovered. Models of `sparsenlp train` have defaults of their own: 80 % zeros, a learning
    rate of 2e-3.

    \b
    sparsenlp prune bert-base-uncased out --data train.csv --test test.csv
    sparsenlp prune my-model out --data train.csv --sparsity 0.8 --tokens 16 --tokens 2048
    sparsenlp prune my-model out --data train.csv --target "2x faster"
    sparsenlp prune --recipe examples/rotten_tomatoes.yaml out
    sparsenlp prune --recipe examples/rotten_tomatoes.yaml --set "target=sparsity 0.8" --set seed=1 out
    sparsenlp prune my-model out --data pairs.tsv --text-column question --text-pair-column answer
    sparsenlp prune my-model out --sparsity 0.5 --criterion magnitude
    """
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if recipe is not None:
        chosen, where = _from_file(recipe, changes or [], model, output, given)
    else:
        if changes:
            raise ValueError("set: expected --recipe beside it, got none")
        for name, value in (("model", model), ("output", output)):
            if value is None:
                raise ValueError(f"Missing argument '{name}'. (see {context.command_path} --help)")
        chosen, where = _from_options({name: context.params[name] for name in given}), Path(str(output))
    _prune(chosen, where, work_dir, threads, from_options=recipe is None)


def _prune(recipe: Recipe, output: Path, work_dir: Path | None, threads: int | None, from_options: bool) -> None:
    from ..recipe import UntrainedHead, prepare, run

    with use_threads(threads):
        try:
            job = prepare(recipe, output, work_dir)
        except UntrainedHead as error:
            if not from_options:
                raise
            raise ValueError(f"finetune-epochs: expected at least 1, as {error.why}, got 0") from None
        held_out = getattr(job.task, "held_out", None)
        if held_out is not None:
            option = "--test" if from_options else "data.test"
            note(f"no {option}: {held_out[0]} of the {held_out[1]} rows are held out for testing")
        if recipe.data is None:
            lacking = "--data" if from_options else "data"
            note(f"warning: no {lacking}, so the accuracy that pruning costs is neither recovered nor measured")
        with resumable():
            outcome = run(job, note)
    _report(job, outcome)


def _from_file(
    path: Path, changes: list[str], model: str | None, output: Path | None, given: list[str]
) -> tuple[Recipe, Path]:
    """The recipe, and OUTPUT, which comes alone."""
    from ..recipe import load_recipe

    others = [name for name in given if name not in BESIDE_RECIPE]
    if others:
        raise ValueError(f"recipe: expected no other options of pruning, got --{others[0].replace('_', '-')}")
    if model is None or output is not None:
        got = "none" if model is None else f"{model} {output}"
        raise ValueError(f"recipe: expected OUTPUT alone, as the recipe says the model, got {got}")
    return load_recipe(path, changes), Path(model)


def _from_options(options: dict[str, Any]) -> Recipe:
    """The recipe that options stand for; those that were not given are left out."""
    from ..allocation import Target
    from ..prune import find_criterion
    from ..recipe import Recipe

    content: dict[str, Any] = {"model": options["model"]}
    rounds = "target" in options and Target.parse(options["target"]).kind == "drop"
    for name, value in options.items():
        plain = str(value) if isinstance(value, Path) else [*value] if isinstance(value, (list, tuple)) else value
        for place in (PHASES.get(name) if rounds else None) or PLACES.get(name, ()):
            *sections, key = place.split(".")
            if "data" in options or sections not in (["data"], ["recover"], ["finetune"]):
                _section(content, sections)[key] = plain
    if "data" in options:
        content["data"].update(data_section(content["data"].pop("train")))
    if "finetune_epochs" in options and "data" in options:
        content["finetune"]["when"] = "always"
        if options["finetune_epochs"] == 0:
            del content["finetune"]["epochs"]
            content["finetune"]["when"] = "never"
    if "data" not in options:
        criterion = options.get("criterion", "magnitude")
        if find_criterion(criterion).needs:
            raise ValueError(
                f"criterion: expected --data for {criterion}, which needs gradients or inputs, got none; "
                "or use magnitude"
            )
        content["one_shot"] = {}
    try:
        return Recipe.of(content)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from None


def _in_options(message: str) -> str:
    """A message about fields of a recipe as one about options."""
    for option, places in PLACES.items():
        for place in places:
            message = message.replace(f"{place}:", f"{option.replace('_', '-')}:") if "." in place else message
    return message


def _section(content: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        content = content.setdefault(name, {})
    return content


def _report(job: Job, outcome: Outcome) -> None:
    """What it cost, what it brought, and where it is."""
    from ..recipe import RESULT_FILE
    from ..report import report

    output = job.output
    if outcome.qualities:
        print_table(quality_cells(outcome.qualities), quality_title(outcome.qualities["dense"]))
    elif outcome.withheld:
        say(f"accuracy: not reported: {outcome.withheld}")
    sizes = report(outcome.model)
    if outcome.plan is not None:
        _report_plan(outcome.plan, outcome.pruned)
    if outcome.speedup is not None:
        say(f"{outcome.speedup:.2f} times as fast as the dense model, for {job.recipe.target}")
    say(f"memory: {sizes.dense_bytes / 1e6:.1f} MB dense, {sizes.stored_bytes / 1e6:.1f} MB now")
    say(f"saved: {output}; layer by layer: {output / RESULT_FILE}")
    say(f"next: sparsenlp bench {output}")
    if outcome.dense is not None:
        say(f"dense model: {outcome.dense}")


def _report_plan(plan: Plan, pruned: Sequence[str]) -> None:
    """How many zeros the pruned layers have; other layers may have a few, too, such as those of a padding token."""
    names = {*pruned, *(name.rpartition(".")[0] for name in pruned)}  # a matrix is part of a recurrent layer
    rows = [row for row in plan.layers if row.sparsity > 0 and row.name in names]
    zeros = sum(row.sparsity * row.weights for row in rows) / sum(row.weights for row in rows)
    say(f"{zeros:.1%} of the weights of {len(rows)} pruned layers are zero; {len(plan.converted)} of them are sparse")
    if not plan.converted:
        say("every layer stays dense, because that is faster here: expect no speed-up")

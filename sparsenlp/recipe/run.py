"""Running a recipe: everything that can be wrong with it is found before the first step of training."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import native
from .. import train as training
from ..classifiers import is_sparse_checkpoint, load_config, save_model
from ..convert import sparsify_
from ..data import minilm_directory
from ..files import read_regular
from ..layers.composite import splitting
from ..measure import interleave
from ..models.own import OWN
from ..plan import Plan
from ..prune import (
    LayerTarget,
    Removal,
    exact_obs_,
    finalize_,
    parse_pattern,
    prunable,
    prune_,
    prune_layers_,
    prune_structures_,
    remove_layers_,
    sparsegpt_,
    sparsity_of,
    wanda_,
)
from ..prune.layers import FilterFn
from ..prune.structured import find_stack
from ..trained_texts import TEXTS_FILE, Split, TrainedTexts, read_trained_texts, with_texts
from .calibrate import allocate_layers, collect, inputs_of
from .config import OneShot, Recipe, Structured
from .tasks import Classification, Judgement, Task, Trained, read_task

RESULT_FILE = "sparsenlp.json"
PACKAGED = {"minilm": minilm_directory}
"""Models that come as Python packages, by the name that a recipe may give."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A recipe that has been checked against its model and data.

    model   dense, in eval mode; `run` changes it
    work    where an interrupted run waits and the fine-tuned dense model is kept
    earlier what the model was trained on before, if that is known
    """

    recipe: Recipe
    model: nn.Module
    task: Task
    output: Path
    work: Path
    earlier: TrainedTexts | None = None

    @property
    def finetunes(self) -> bool:
        return isinstance(self.task, Classification) and not self.task.head.trained

    @property
    def split(self) -> Split | None:
        return self.task.split if isinstance(self.task, Trained) else None

    @property
    def remarks(self) -> list[str]:
        """What is to be said about the texts before training, a line each."""
        return [*self.task.remarks, *(self.split.remarks(self.earlier) if self.split is not None else ())]

    @property
    def withheld(self) -> str:
        """Why figures on the test texts will not be reported; "" if they will."""
        return self.split.withheld(self.earlier) if self.split is not None else ""

    @property
    def trained(self) -> TrainedTexts | None:
        """What the model will have been trained on, by others and by this recipe."""
        if self.split is None:
            return self.earlier
        return self.split.trained if self.earlier is None else self.earlier.joined(self.split.trained)


@dataclass(frozen=True)
class Outcome:
    """qualities   "dense" and "sparse" on the test texts; empty without data, and if they are withheld
    plan        what became sparse; None where only structures went, and the model stays dense
    pruned      names of the layers that were pruned
    removals    of whole structures
    layer_targets   chosen for a target of time
    speedup     measured on the final model, where the target is a time
    rounds      where there were some
    dense       directory of the fine-tuned dense model, None if it came trained
    withheld    why there are no qualities: the model was trained on test texts
    """

    model: nn.Module
    plan: Plan | None
    qualities: Mapping[str, Judgement]
    pruned: tuple[str, ...] = ()
    removals: tuple[Removal, ...] = ()
    layer_targets: Mapping[str, LayerTarget] | None = None
    speedup: float | None = None
    rounds: training.IncrementalLog | None = None
    dense: Path | None = None
    withheld: str = ""


def prepare(recipe: Recipe, output: str | Path, work: str | Path | None = None) -> Job:
    """Load the model and texts of a recipe and check all that can be checked before training.

    output   directory for the sparse checkpoint
    work     directory for interrupted runs; by default output/work

    For one of our own models (models.own) what the recipe leaves open is as that table says.

    Raises ValueError for a sparse model, an output that is the model, labels that do not fit, and a recipe for another
    architecture: layers or structures that the model does not have, patterns that do not divide its weights. Raises as
    `read_task`, `load_model` and `read_trained_texts` too.
    """
    output = Path(output)
    name = str(PACKAGED[recipe.model]()) if recipe.model in PACKAGED else recipe.model
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output: expected a directory, got a file: {output}")
    if output.is_dir() and Path(name).is_dir() and output.samefile(name):
        raise ValueError(f"output: expected another directory than the model's, got {output}")
    if is_sparse_checkpoint(name):
        raise ValueError(f"model: expected a dense model, got a sparse checkpoint: {name}")
    own = OWN.get(load_config(name).model_type)
    if own is not None:
        recipe = recipe.with_defaults(own.pruning)
    earlier = read_trained_texts(name)
    task = read_task(recipe, name)
    model = task.load(name)
    _check_architecture(recipe, model)
    return Job(recipe, model, task, output, Path(work) if work is not None else output / "work", earlier)


def run(job: Job, note: Note = lambda text: None) -> Outcome:
    """Do what a recipe says, save the result in job.output, and tell what it cost.

    note    called with a line for the user here and there

    Beside the checkpoint stands RESULT_FILE: the recipe, its SHA-256, the qualities and the plan; the SHA-256 is also
    `recipe_sha256` in config.json. Running it again after an interruption goes on where fine-tuning or recovery
    stopped, or after the last round that was done.

    Raises ValueError for a target that cannot be met, saying the best that can, and as the stages do.
    """
    recipe, task, model = job.recipe, job.task, job.model
    files = ("finetune.safetensors", "recover.safetensors", "layer_targets.json", "rounds.safetensors")
    states = [job.work / name for name in files]
    removals, layer_targets, rounds = [], None, None
    for remark in job.remarks:
        note(remark)
    if job.withheld:
        note(f"test figures will not be reported: {job.withheld}; test by others, or hold out the same rows as before")
    if job.finetunes:
        _finetune(job, states[0], note)
    elif isinstance(task, Classification) and task.head.why:
        note(task.head.why)
    reference = task.outputs(model)
    dense = copy.deepcopy(model) if recipe.trains else model
    for stage in recipe.structured:
        removals.append(_remove(job, stage))
        note(str(removals[-1]))
    filter_fn = recipe.prune.filter_fn(model)
    if recipe.one_shot is not None:
        _prune_at_once(job, recipe.one_shot, filter_fn)
    elif recipe.in_rounds:
        rounds = _prune_in_rounds(job, dense, filter_fn, states[3], note)
    else:
        if recipe.allocates:
            layer_targets = _allocated(job, filter_fn, states[2], note)
        _trained(task).recover(model, dense, recipe, filter_fn, states[1], layer_targets)
    sparsity = sparsity_of(finalize_(model), filter_fn)
    pruned = tuple(prunable(model, filter_fn))
    plan = _convert(recipe, model, sparsity, note) if sparsity > 0 else None
    outputs = task.outputs(model)
    judged = {"dense": task.judge(reference), "sparse": task.judge(outputs, reference)}
    outcome = Outcome(
        model,
        plan,
        {name: quality for name, quality in judged.items() if quality is not None and not job.withheld},
        pruned,
        tuple(removals),
        layer_targets,
        _measure(recipe, dense, model) if recipe.allocates else None,
        rounds,
        job.work / "dense" if job.finetunes else None,
        job.withheld,
    )
    _save(job, outcome)
    for state in states:
        state.unlink(missing_ok=True)
    if outcome.dense is None and job.work.is_dir() and not any(job.work.iterdir()):
        job.work.rmdir()
    return outcome


def _check_architecture(recipe: Recipe, model: nn.Module) -> None:
    """Take away and mask as the recipe will, where nothing is lost by it: the model stays as it is."""
    trial = copy.deepcopy(model) if recipe.structured else model
    for stage in recipe.structured:
        _remove_from(trial, stage, "magnitude", None)
    filter_fn = recipe.prune.filter_fn(trial)
    if recipe.prune.layer_targets is None:
        prune_(trial, recipe.prune.pattern, 0.0, filter_fn=filter_fn)
    else:
        prune_layers_(trial, {name: replace(t, sparsity=0.0) for name, t in recipe.prune.layer_targets.items()})
    finalize_(trial)


def _finetune(job: Job, state: Path, note: Note) -> None:
    task, config = job.task, replace(job.recipe.finetune, seed=job.recipe.seed)
    assert isinstance(task, Classification)
    note(f"fine-tuning the dense model first: {task.head.why or 'as asked'} ({config.epochs} epochs)")
    task.finetune(job.model, config, state)
    save_model(job.model, job.work / "dense", with_texts(task.tokenizer, job.trained))


def _remove(job: Job, stage: Structured) -> Removal:
    criterion = stage.criterion or "magnitude"
    statistics = None
    if isinstance(job.task, Trained):
        statistics = collect(job.model, job.task.train, prunable(job.model), criterion, job.recipe.seed)
    return _remove_from(job.model, stage, criterion, statistics)


def _remove_from(model: nn.Module, stage: Structured, criterion: str, statistics: Any) -> Removal:
    if stage.layers is not None:
        before, units = sum(p.numel() for p in model.parameters()), len(find_stack("structured", model).layers)
        remove_layers_(model, stage.layers)
        after = sum(p.numel() for p in model.parameters())
        return Removal(stage.kind, dict.fromkeys(stage.layers, ()), units, (before, after))
    options = {name: value for name in ("scope", "reduction") if (value := getattr(stage, name)) is not None}
    assert stage.fraction is not None
    return prune_structures_(model, stage.kind, stage.fraction, criterion=criterion, statistics=statistics, **options)


def _prune_at_once(job: Job, stage: OneShot, filter_fn: FilterFn | None) -> None:
    recipe, model = job.recipe, job.model
    rule = recipe.prune
    if stage.solver == "prune":
        torch.manual_seed(recipe.seed)
        statistics = None
        if isinstance(job.task, Trained):
            with splitting(model):
                layers = prunable(model, filter_fn)
                statistics = collect(model, job.task.train, layers, recipe.criterion, recipe.seed)
        if rule.layer_targets is not None:
            prune_layers_(model, rule.layer_targets, recipe.criterion, statistics)
        else:
            prune_(model, rule.pattern, recipe.sparsity, recipe.criterion, recipe.scope, filter_fn, statistics)
        return
    solver = {"sparsegpt": sparsegpt_, "exact_obs": exact_obs_, "wanda": wanda_}[stage.solver]
    names = ("dampening", "block_size", "refine_steps")
    options = {name: value for name in names if (value := getattr(stage, name)) is not None}
    batches = job.task.calibration(stage)
    solver(model, batches, rule.pattern, recipe.sparsity, filter_fn=filter_fn, **options)  # type: ignore[operator]


def _allocated(job: Job, filter_fn: FilterFn | None, file: Path, note: Note) -> dict[str, LayerTarget]:
    """A target for each layer, kept in `file`: measured again they would be others, and recovery could not go on."""
    digest = job.recipe.sha256
    try:
        if (kept := _kept_targets(file, digest)) is not None:
            return kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        note(f"{file} is not used, choosing again: {error!r:.200}")
    note(f"choosing a sparsity for each layer: {job.recipe.target}")
    targets = allocate_layers(job.recipe, job.model, _trained(job.task).train, filter_fn).targets
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = _plain(targets)
    _write_json(file, {"recipe_sha256": digest, "layer_targets": plain, "crc32": _checksum(plain)})
    return targets


def _kept_targets(file: Path, digest: str) -> dict[str, LayerTarget] | None:
    """What an earlier run of the same recipe chose; None if there was none. Raises for a file that is broken."""
    try:
        kept = json.loads(read_regular(file, 2**24))
    except FileNotFoundError:
        return None
    if kept["recipe_sha256"] != digest:
        return None
    if kept["crc32"] != _checksum(kept["layer_targets"]):
        raise ValueError("another checksum")
    return {n: LayerTarget(parse_pattern(t["pattern"]), t["sparsity"]) for n, t in kept["layer_targets"].items()}


def _checksum(targets: Any) -> int:
    return zlib.crc32(json.dumps(targets, sort_keys=True).encode())


def _prune_in_rounds(
    job: Job, dense: nn.Module, filter_fn: FilterFn | None, state: Path, note: Note
) -> training.IncrementalLog:
    recipe, model, task, wanted = job.recipe, job.model, job.task, job.recipe.wanted
    assert isinstance(task, Classification)
    validation = task.validation
    assert validation is not None

    def metric(candidate: nn.Module) -> float:
        return training.accuracy(training.predict(candidate, validation), validation.labels)

    before = metric(dense)
    least = None if wanted is None else before - wanted.value - 1e-6
    note(f"dense: accuracy {before:.1%} of {len(validation)} validation texts")
    log = training.prune_incrementally(
        model,
        dense,
        task.train,
        metric,
        recipe.incremental(least),
        filter_fn,
        on_round=lambda r: note(f"{r.sparsity:.1%} zeros: accuracy {r.metric:.1%}" + ("" if r.kept else ", undone")),
        state_path=state,
    )
    note(f"rounds ended: {log.reason}")
    if log.last_kept is None:
        tried = f"; the best was {log.rounds[0].metric:.1%} at {log.rounds[0].sparsity:.1%} zeros" if log.rounds else ""
        floor = recipe.incremental(least).least_metric
        expected = "a round that ends" if floor is None else f"a round that keeps {floor:.1%}"
        raise ValueError(f"target: expected {expected}, of {before:.1%} before, got none{tried}")
    return log


def _convert(recipe: Recipe, model: nn.Module, sparsity: float, note: Note) -> Plan:
    """Sparse layers where they are faster; if few zeros were asked for, layers with few are considered too."""
    if not native.available:
        note(f"{native.why_unavailable}: without it no sparse layer is faster than a dense one")
    note("choosing for every layer by what is fast on this machine; the first time takes some seconds more")
    return sparsify_(model, replace(recipe.convert, min_sparsity=min(recipe.convert.min_sparsity, 0.9 * sparsity)))


def _measure(recipe: Recipe, dense: nn.Module, model: nn.Module) -> float:
    inputs = inputs_of(dense, recipe.convert.token_counts[0])
    with torch.no_grad():
        times = interleave({"dense": lambda: dense(**inputs), "sparse": lambda: model(**inputs)})
    return times["dense"].median / times["sparse"].median


def _save(job: Job, outcome: Outcome) -> None:
    """Checkpoint and, in one with it, RESULT_FILE and what the model was trained on."""
    recipe = job.recipe
    outcome.model.config.recipe_sha256 = recipe.sha256  # type: ignore[union-attr]
    record: dict[str, Any] = {
        "recipe": recipe.content,
        "recipe_sha256": recipe.sha256,
        "quality": {name: quality.as_dict() for name, quality in outcome.qualities.items()},
    }
    if outcome.withheld:
        record |= {"quality": None, "quality_withheld": outcome.withheld}
    if outcome.plan is not None:
        record["plan"] = outcome.plan.as_dict()
    if outcome.removals:
        record["removals"] = [asdict(removal) for removal in outcome.removals]
    if outcome.layer_targets is not None:
        record["layer_targets"] = _plain(outcome.layer_targets)
        record["speedup"] = outcome.speedup
    if outcome.rounds is not None:
        record["rounds"] = asdict(outcome.rounds)
    if job.trained is None:
        Path(job.output, TEXTS_FILE).unlink(missing_ok=True)  # of another model that was there
    companions = with_texts(job.task.tokenizer, job.trained, {RESULT_FILE: json.dumps(record, indent=2) + "\n"})
    save_model(outcome.model, job.output, companions)


def _trained(task: Task) -> Trained:
    assert isinstance(task, Trained)
    return task


def _plain(targets: Mapping[str, LayerTarget]) -> dict[str, Any]:
    """As a recipe gives prune.layer_targets."""
    return {name: {"pattern": str(t.pattern), "sparsity": t.sparsity} for name, t in targets.items()}


def _write_json(file: Path, data: Any) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)

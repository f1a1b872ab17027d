"""What must hold for every model class of transformers: prune, convert, save and load it as a user would."""

from __future__ import annotations

import copy
import math
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto

from sparsenlp import SparsifyConfig, from_pretrained, save_pretrained, sparsify_
from sparsenlp.prune import Block, finalize_, prune_

from .dummy_inputs import inputs
from .tiny_configs import model_class, tiny_config_for

HEADS = (
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
)
MOST_PARAMETERS = 3_000_000
MOST_SECONDS = 10
TOLERANCE = 1e-4
"""Largest error beside the largest magnitude of an output."""
ROUTERS = re.compile(r"(^|\.)(router|gate|wg|shared_expert_gate)(\.|$)")
EMBEDDINGS = re.compile(r"(^|\.)(embeddings|embed_tokens|word_embeddings|wte|lm_head|adapter_\w+|lora_[AB])(\.|$)")
Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """What came of a class.

    status   "equal", "refused" by one of our ValueErrors, "not built" or "no inputs" by this test
    reason   why, for all but "equal"
    faults   what must not be
    notes    faults that transformers has without us too
    """

    name: str
    status: str = "equal"
    reason: str = ""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "FAULT" if self.faults else self.status


def every_class() -> list[str]:
    """Names of the base classes and the text heads of all model types, in transformers' order, each once."""
    names: dict[str, None] = {}
    for model_type, base in modeling_auto.MODEL_MAPPING_NAMES.items():
        heads = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").get(model_type) for head in HEADS]
        for found in (base, *heads):
            if found is not None:
                names[found if isinstance(found, str) else found[0]] = None
    return [*names]


def check(name: str) -> Outcome:
    """Everything below, on a tiny random model of the class."""
    outcome = Outcome(name)
    try:
        with time_limit():
            _check(outcome)
    except TimeoutError:
        outcome.status, outcome.reason = "not built", f"takes longer than {MOST_SECONDS} s"
    return outcome


def _check(outcome: Outcome) -> None:
    model = _build(outcome)
    if model is None:
        return
    try:
        calls = list(inputs(model))
        run(model, calls[0][1])
    except Exception as error:
        outcome.status, outcome.reason = "no inputs", _first_line(error)
        return
    if not _prune(outcome, model):
        return
    dense = copy.deepcopy(model)
    wanted = [(kind, given, mask, answer) for kind, given, mask in calls if (answer := _answer(dense, given))]
    if difference(run(dense, calls[0][1]), wanted[0][3], None):
        outcome.notes.append("answers at random")
        return
    try:
        plan = sparsify_(model, SparsifyConfig(measure="off"))
    except ValueError as error:
        outcome.status, outcome.reason = "refused", _first_line(error)
        return
    except Exception as error:
        outcome.faults.append(f"sparsify_: {_first_line(error)}")
        return
    _check_plan(outcome, dense, str(plan))
    for kind, given, mask, expected in wanted:
        _expect(outcome, f"mask: {kind}", lambda given=given: run(model, given), expected, mask)
    _, given, mask, expected = wanted[-1]
    _expect(outcome, "with gradients", lambda: run(model, given, gradients=True), expected, mask)
    if not outcome.faults:
        _check_doors(outcome, model, dense, wanted[0][1])


def _build(outcome: Outcome) -> PreTrainedModel | None:
    cls = None
    try:
        cls, config = model_class(outcome.name), tiny_config_for(outcome.name)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            outcome.status, outcome.reason = "not built", "more than 3 million parameters"
            return None
        torch.manual_seed(0)
        return randomize(cls(config).eval())
    except TimeoutError:
        raise
    except Exception as error:
        outcome.status, outcome.reason = "not built", _first_line(error)
        return None


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Weights large enough for every part of a layer to matter."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            module.weight.normal_(std=1 / math.sqrt(max(module.in_features, 1)))
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.5)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            module.bias.normal_(std=0.1)
    return model


def _prune(outcome: Outcome, model: Any) -> bool:
    """Prune by the default filter, in blocks that divide every layer; whether that was not refused."""
    chosen: Mapping[str, float] = {}
    for block in ((8, 1), (4, 1), (2, 1), (1, 1)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = prune_(model, Block(*block), 0.8)
            break
        except ValueError as error:
            if "divisible" not in str(error):
                outcome.status, outcome.reason = "refused", _first_line(error)
                return False
        except Exception as error:
            outcome.faults.append(f"prune_: {_first_line(error)}")
            return False
    finalize_(model)
    modules = dict(model.named_modules())
    for name in chosen:
        layer = modules.get(name)
        if EMBEDDINGS.search(name) or (layer is not None and layer is _output_of(model)):
            outcome.faults.append(f"prune_ selects {name}")
        if ROUTERS.search(name) and layer is not None and layer.out_features < 8:
            outcome.faults.append(f"prune_ selects {name}, which chooses among experts")
    return True


def _output_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _check_plan(outcome: Outcome, dense: nn.Module, plan: str) -> None:
    """Weights of which no layer can be sparse are told of, if they are most of the model."""
    total = sum(p.numel() for p in dense.parameters())
    for module in dense.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and 20 * parameter.numel() > total:
                kind = type(module).__name__
                if kind != "Conv1d" and min(parameter.shape) > 1 and f" {kind} " not in plan:
                    outcome.faults.append(f"the plan says nothing of {kind}.{name}")


def _check_doors(outcome: Outcome, model: Any, dense: Any, given: dict[str, Any]) -> None:
    expected = run(model, given)
    for door, save, load in DOORS:
        with tempfile.TemporaryDirectory() as directory:
            fault = _through(model, Path(directory) / "ours", save, load, given, expected)
            if fault is None:
                continue
            without = _through(dense, Path(directory) / "plain", DOORS[1][1], DOORS[1][2], given, run(dense, given))
            (outcome.faults if without is None else outcome.notes).append(f"{door}: {fault}")
    base = model.base_model
    if base is not model and not outcome.faults:
        fault = _base_fault(model, base)
        if fault is not None and _base_fault(dense, dense.base_model) is None:
            outcome.faults.append(f"AutoModel: {fault}")


DOORS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("save_pretrained", save_pretrained, lambda cls, path: from_pretrained(path)),
    (
        "model.save_pretrained",
        lambda model, path: model.save_pretrained(path),
        lambda cls, path: cls.from_pretrained(path),
    ),
)


def _through(model: Any, path: Path, save: Any, load: Any, given: dict[str, Any], expected: Tensors) -> str | None:
    """What is wrong after saving and loading."""
    try:
        save(model, path)
        loaded = load(type(model), path).eval()
        return different_tensor(loaded, model) or difference(run(loaded, given), expected, None)
    except TimeoutError:
        raise
    except Exception as error:
        return _first_line(error)


def _base_fault(model: Any, base: Any) -> str | None:
    """What is wrong with the base model that AutoModel reads from the checkpoint of one with a head."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            model.save_pretrained(directory)
            loaded = AutoModel.from_pretrained(directory).eval()
        except TimeoutError:
            raise
        except Exception as error:
            return _first_line(error)
    if type(loaded) is not type(base):
        return None
    return different_tensor(loaded, base, beside=True)


def run(model: nn.Module, given: dict[str, Any], gradients: bool = False) -> Tensors:
    """Every floating-point tensor in the output, by where it is."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        return dict(_flat("", model(**given)))


def _answer(model: nn.Module, given: dict[str, Any]) -> Tensors:
    """Empty where the model itself takes no such mask."""
    try:
        return run(model, given)
    except TimeoutError:
        raise
    except Exception:
        return {}


def _flat(where: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield where, value.detach().float()
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{where}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _flat(f"{where}[{i}]", item)


def difference(got: Tensors, expected: Tensors, mask: Tensor | None) -> str | None:
    """Where and how far they differ; of a sequence its real positions count, of other outputs everything."""
    if got.keys() != expected.keys():
        return f"outputs {sorted(got.keys() ^ expected.keys())}"
    for name, y in expected.items():
        x = got[name]
        if x.shape != y.shape:
            return f"{name}: {tuple(x.shape)} for {tuple(y.shape)}"
        if mask is not None and y.dim() >= 2 and y.shape[:2] == mask.shape:
            x, y = x[mask.bool()], y[mask.bool()]
        finite = torch.isfinite(y)
        if not torch.equal(finite, torch.isfinite(x)):
            return f"{name}: other values are infinite or NaN"
        if finite.any():
            error, size = (x - y)[finite].abs().max().item(), y[finite].abs().max().item()
            if error > TOLERANCE * size + 1e-6:
                return f"{name}: {error:.1e} beside {size:.1e}"
    return None


def different_tensor(loaded: nn.Module, saved: nn.Module, beside: bool = False) -> str | None:
    """A parameter or buffer, persistent or not, that is not the same; `beside`: the loaded model may have more."""
    got, expected = _tensors(loaded), _tensors(saved)
    if missing := expected.keys() - got.keys() if beside else expected.keys() ^ got.keys():
        return f"tensors {sorted(missing)[:3]}"
    for name, y in expected.items():
        x = got[name]
        if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x.nan_to_num(7), y.nan_to_num(7)):
            return f"{name} is another"
    return None


def _tensors(model: nn.Module) -> Tensors:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _expect(outcome: Outcome, what: str, answer: Callable[[], Tensors], expected: Tensors, mask: Tensor | None) -> None:
    try:
        wrong = difference(answer(), expected, mask)
    except TimeoutError:
        raise
    except Exception as error:
        wrong = _first_line(error)
    if wrong:
        outcome.faults.append(f"{what}: {wrong}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:300]


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError after MOST_SECONDS of this process's own time."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

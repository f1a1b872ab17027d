"""End-to-end latency of sparse models against the dense ways to run the same model, interleaved in one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .classifiers import max_positions
from .layers.composite import join_composites_, replace_modules
from .layers.compressed_linear import CompressedLinear
from .measure import Ratio, Timing, interleave, machine, ratio, use_threads

EXACT_TOLERANCE = 1e-3  # largest difference of float32 logits, relative to the largest logit

Inputs = dict[str, Tensor]
OnProgress = Callable[[int, int, str], None]
"""(steps done, of how many, what comes next)"""


@dataclass(frozen=True, order=True)
class Setting:
    """An input: `batch` sequences of `tokens` tokens, none of them padding."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if min(self.batch, self.tokens) < 1:
            raise ValueError(f"Setting: expected batch and tokens of at least 1, got {self.batch} and {self.tokens}")

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}"


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    build  takes the float32 model in eval mode, returns what is called with the inputs
    exact  computes in float32, so that its logits must match
    """

    build: Callable[[nn.Module], Callable[..., Any]]
    exact: bool = False


def bf16(model: nn.Module) -> nn.Module:
    """A copy in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy whose linear and recurrent layers hold int8 weights and quantize their inputs on the fly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announces torch.ao's move to another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM, nn.GRU}, dtype=torch.qint8)


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model under torch.compile, for one input shape; `bench` freezes the weights into the graph."""
    return torch.compile(model, dynamic=False)


BASELINES: dict[str, Engine] = {
    "eager fp32": Engine(lambda model: model, exact=True),
    "eager bf16": Engine(bf16),
    "compiled fp32": Engine(compiled, exact=True),
    "compiled bf16": Engine(lambda model: compiled(bf16(model))),
    "dynamic int8": Engine(dynamic_int8),
}
"""Ways to run a dense model."""

SPARSE_ENGINES = ("eager fp32", "compiled fp32")
"""Those of them that sparse models run on, too."""


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    sparse       whether it is a sparse model or a dense baseline
    timings      seconds per forward pass, by setting
    differences  largest difference of its logits from those of float32 in dense form, by setting
    missing      why a setting could not be timed
    """

    name: str
    sparse: bool
    timings: dict[Setting, Timing] = field(default_factory=dict)
    differences: dict[Setting, float] = field(default_factory=dict)
    missing: dict[Setting, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyReport:
    """Latency of each row at each setting; `machine` as `measure.machine()`."""

    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    machine: dict[str, Any]

    def best_dense(self, setting: Setting) -> Row | None:
        """The fastest baseline at a setting by its median, None if none could run."""
        timed = [row for row in self.rows if not row.sparse and setting in row.timings]
        return min(timed, key=lambda row: row.timings[setting].median, default=None)

    def speedup(self, row: Row, setting: Setting) -> Ratio | None:
        """Time of the best dense baseline over that of `row`, round by round; None if either is missing."""
        best = self.best_dense(setting)
        if best is None or setting not in row.timings:
            return None
        return ratio(best.timings[setting], row.timings[setting])

    @property
    def spread(self) -> float:
        """Largest (p80 - p20) / median of the timings; 0 without any."""
        return max((t.spread for row in self.rows for t in row.timings.values()), default=0.0)

    def verdict(self, row: Row) -> str:
        """One sentence on a sparse row. It counts as faster or slower only where 80 % of the rounds agree."""
        speedups = {s: r for s in self.settings if (r := self.speedup(row, s)) is not None}
        if not speedups:
            return f"{row.name}: not compared with a dense baseline"
        faster = [f"{s} ({r.median:.2f}x)" for s, r in speedups.items() if r.p20 > 1]
        slower = [f"{s} ({r.median:.2f}x)" for s, r in speedups.items() if r.p80 < 1]
        even = [f"{s} ({r.median:.2f}x)" for s, r in speedups.items() if r.p20 <= 1 <= r.p80]
        parts = [("faster than the best dense baseline at", faster), ("slower at", slower), ("no clear gain at", even)]
        return f"{row.name}: " + "; ".join(f"{words} {', '.join(at)}" for words, at in parts if at)

    def as_dict(self) -> dict[str, Any]:
        """JSON data; times in seconds, throughput in sequences per second by the median."""
        return {
            "machine": self.machine,
            "spread": self.spread,
            "settings": [{"batch": s.batch, "tokens": s.tokens} for s in self.settings],
            "rows": [self._row_dict(row) for row in self.rows],
            "verdicts": [self.verdict(row) for row in self.rows if row.sparse],
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        cells: dict[str, dict[str, Any]] = {}
        for setting in self.settings:
            speedup = self.speedup(row, setting)
            if setting in row.missing:
                cells[str(setting)] = {"missing": row.missing[setting]}
            else:
                timing = row.timings[setting]
                cells[str(setting)] = {
                    **timing.as_dict(),
                    "p99": timing.percentile(99),
                    "throughput": setting.batch / timing.median,
                    "speedup": None if speedup is None else speedup.as_dict(),
                    "difference": row.differences[setting],
                }
        return {"name": row.name, "sparse": row.sparse, "seconds": cells}


def bench(
    dense: nn.Module,
    sparse: Mapping[str, nn.Module],
    settings: Sequence[Setting],
    baselines: Sequence[str] = tuple(BASELINES),
    threads: int | None = None,
    seconds: float = 5.0,
    on_progress: OnProgress | None = None,
) -> LatencyReport:
    """Time whole forward passes of transformers models that take input_ids and attention_mask.

    dense      float32 model that the baselines are made from
    sparse     models of the same architecture with sparse layers, by a name for their rows; each runs
               eagerly, and compiled if "compiled fp32" is among the baselines
    settings   inputs: random token ids, all of full length
    baselines  names in BASELINES; one that cannot run becomes a row that says why
    threads    torch threads, None for the present number
    seconds    budget of timing for each setting, beside at least 5 rounds

    Before it is timed, each sparse model is compared with its own weights in dense form. Raises
    RuntimeError if their logits differ, ValueError for unknown baselines, no setting, or more tokens
    than the model takes.
    """
    check(dense, settings, baselines)
    ways = _ways(dense.eval(), {name: model.eval() for name, model in sparse.items()}, baselines)
    rows = {way.name: Row(way.name, way.sparse) for way in ways}
    total = len(settings) * (len(ways) + 1)
    notify = on_progress or (lambda done, total, what: None)
    done = 0
    with use_threads(threads), torch.inference_mode(), compiling(len(ways)):
        for setting in settings:
            torch._dynamo.reset()
            inputs = random_inputs(dense, setting)
            runs: dict[str, Callable[[], object]] = {}
            for way in ways:
                notify(done, total, f"{way.name} at {setting}")
                if (model := _checked(way, inputs, setting, rows[way.name])) is not None:
                    runs[way.name] = partial(model, **inputs)
                done += 1
            notify(done, total, f"timing {setting}")
            for name, timing in interleave(runs, seconds).items():
                rows[name].timings[setting] = timing
            done += 1
        notify(total, total, "")
        return LatencyReport(tuple(rows.values()), tuple(settings), machine())


def row_names(sparse: str, baselines: Sequence[str]) -> list[str]:
    """What `bench` calls the rows of a sparse model."""
    return [f"{sparse}, {engine}" for engine in SPARSE_ENGINES if engine == "eager fp32" or engine in baselines]


def check(dense: nn.Module, settings: Sequence[Setting], baselines: Sequence[str]) -> None:
    """Raise ValueError for what `bench` refuses."""
    if not settings:
        raise ValueError("bench: expected at least one setting, got none")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise ValueError(f"bench: expected baselines among {', '.join(BASELINES)}, got {unknown[0]}")
    limit = max_positions(dense)
    longest = max(setting.tokens for setting in settings)
    if limit is not None and longest > limit:
        raise ValueError(f"bench: expected at most {limit} tokens, which is what the model takes, got {longest}")


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with sparse linear layers written out as nn.Linear with zeros, and recurrent layers as torch's.

    Raises ValueError for a layer with a fused activation, which an nn.Linear cannot hold.
    """
    twin = copy.deepcopy(model)
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, CompressedLinear)}
    for name, layer in layers.items():
        if layer.activation != "none":
            raise ValueError(f"dense_twin: expected {name} without an activation, got {layer.activation}")
    replace_modules(twin, {layer: layer.to_dense() for layer in layers.values()})
    return join_composites_(twin)


def random_inputs(model: nn.Module, setting: Setting) -> Inputs:
    """Token ids, the same at every call, and a mask of ones, each (batch, tokens) int64.

    An encoder-decoder gets as many of the target, too.
    """
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 1000))
    shape = (setting.batch, setting.tokens)
    inputs = {
        "input_ids": torch.randint(vocabulary, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
    }
    if getattr(config, "is_encoder_decoder", False):
        targets = int(getattr(config, "decoder_vocab_size", vocabulary))
        inputs["decoder_input_ids"] = torch.randint(targets, shape, generator=generator)
    return inputs


@contextmanager
def compiling(models: int) -> Iterator[None]:
    """While models compile and run: freeze weights, and let torch.compile hold so many models that share their code."""
    import torch._dynamo
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=models + 8):
        yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class _Way:
    """A row to be: `model` run by `engine`, and the dense float32 model whose logits it should have."""

    name: str
    sparse: bool
    model: nn.Module
    engine: str
    reference: nn.Module

    @property
    def must_run(self) -> bool:
        return self.sparse and self.engine == "eager fp32"


def _ways(dense: nn.Module, sparse: Mapping[str, nn.Module], baselines: Sequence[str]) -> list[_Way]:
    ways = [_Way(name, False, dense, name, dense) for name in baselines]
    for name, model in sparse.items():
        twin = dense_twin(model)
        ways += [
            _Way(row, True, model, engine, twin)
            for row, engine in zip(row_names(name, baselines), SPARSE_ENGINES, strict=False)
        ]
    return ways


def _checked(way: _Way, inputs: Inputs, setting: Setting, row: Row) -> Callable[..., Any] | None:
    """What to call, after a look at its logits; None, with the reason in `row`, if it cannot run."""
    engine = BASELINES[way.engine]
    try:
        model = engine.build(way.model)
        got = _logits(model, inputs)
    except Exception as error:  # whatever the toolchain raises becomes the row's reason
        if way.must_run:
            raise
        row.missing[setting] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return None
    expected = _logits(way.reference, inputs)
    difference = float((got - expected).abs().max())
    bound = EXACT_TOLERANCE * max(float(expected.abs().max()), 1e-30)
    if engine.exact and not difference <= bound:
        reason = f"expected logits within {bound:.1e} of eager fp32, dense, got a difference of {difference:.1e}"
        if way.must_run:
            raise RuntimeError(f"bench: {way.name}: {reason}")
        row.missing[setting] = reason
        return None
    row.differences[setting] = difference
    return model


def _logits(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The first output in float32: logits, or a base model's hidden states."""
    output = model(**inputs)
    return (output.logits if hasattr(output, "logits") else output[0]).float()

"""The results as one table: a column for each way to run the model, a row for each quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..measure import machine_line

Results = Mapping[str, Any]


def table(results: Results) -> list[list[str]]:
    """Cells; the first row is the header. Latency in ms, with the ratio to the best dense baseline at that setting."""
    variants = results["variants"]
    qualities = [variant["quality"] for variant in variants]
    cells = [
        ["", *(variant["name"] for variant in variants)],
        ["accuracy", *(_percent(quality["accuracy"]) for quality in qualities)],
        ["agrees with dense", *(_percent(quality["agreement"]) for quality in qualities)],
        ["zeros in the encoder", *(_percent(variant["sparsity"]) for variant in variants)],
        ["cosine of weights", *(_number(variant["weight_cosine"]) for variant in variants)],
        ["cosine of logits", *(_number(quality["cosine"]) for quality in qualities)],
        ["checkpoint, MB", *(_megabytes(variant["bytes"]) for variant in variants)],
        ["its pruned layers, MB", *(_megabytes(variant["layer_bytes"]) for variant in variants)],
    ]
    for setting in results["settings"]:
        cells.append([f"{setting} tokens, ms", *(_latency(variant["latency"][setting]) for variant in variants)])
    return cells


def footer(results: Results) -> list[str]:
    """What the numbers mean, and what follows from them."""
    data, majority = results["data"], results["variants"][0]["quality"]["majority"]
    lines = [
        f"{data['test']} test texts, {data['train']} training texts; always the majority class: {_percent(majority)}",
        "latency: median of a whole forward pass, batch x tokens without padding, interleaved; in brackets times as "
        f"fast as the best dense baseline; largest spread (p80 - p20) {results['spread']:.0%}",
        *results["verdicts"],
    ]
    if results["subset"]:
        lines.insert(1, "a quick run: trained and tested on a subset, so its accuracy says little")
    for variant in results["variants"]:
        reasons = {cell["missing"] for cell in variant["latency"].values() if "missing" in cell}
        lines += [f"{variant['name']} cannot run: {reason}" for reason in sorted(reasons)]
        if variant.get("converted") == 0:
            lines.append(f"{variant['name']}: every layer stays dense, because that is faster on this machine")
    return [*lines, machine_line(results["machine"]), f"time taken: {sum(results['seconds'].values()):.0f} s of work"]


def markdown(results: Results) -> str:
    """Table and footer for a README."""
    header, *rows = table(results)
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows), ""]
    return "\n".join([*lines, *(f"- {line}" for line in footer(results))]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latency(cell: Mapping[str, Any]) -> str:
    if "missing" in cell:
        return "-"
    text = f"{1e3 * cell['median']:.2f}"
    return text if cell["speedup"] is None else f"{text} ({cell['speedup']['median']:.2f}x)"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"

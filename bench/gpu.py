"""Build, test, sanitize and time the GPU kernels on a machine with a GPU, within ten minutes: `make gpu`.

    python bench/gpu.py [--only TEXT] [--output bench/results/gpu.json]

Nothing is installed or downloaded: the running Python brings torch, Triton, pytest and setuptools, the machine nvcc, a
C++ compiler and compute-sanitizer. Each part is a process of its own with a deadline: one that fails, crashes or takes
too long is recorded, and the next begins. Writes one JSON and prints tables. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPS = ("bsr_linear", "nm_linear", "block_sparse_attention", "sparse_lstm")
SECONDS = 590.0
TAIL = 40  # lines of its output that a failed part leaves in the record
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def why_not() -> str:
    """Why nothing can be done on this machine, "" if it can."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}): make gpu PYTHON=... names a Python that has"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "expected a GPU of compute capability 8.0 or later, got {}.{}".format(*capability)
    return ""


def read_tests(log: str) -> dict[str, Any]:
    """Outcomes by pytest -v, of an interrupted run too."""
    outcomes = OUTCOME.findall(log)
    counts = {kind.lower(): sum(found == kind for _, found in outcomes) for kind in ("PASSED", "FAILED", "SKIPPED")}
    errors = [name for name, found in outcomes if found in ("FAILED", "ERROR")]
    return {"tests": counts, **({"failures": errors} if errors else {})}


def read_rows(log: str) -> dict[str, Any]:
    """The lines of bench/gpu_timings.py; a last one that was cut off is left out."""
    lines = [line for line in log.splitlines() if line.startswith('{"op"') and line.endswith("}")]
    return {"timings": [json.loads(line) for line in lines]}


@dataclass(frozen=True)
class Part:
    """A command with the seconds that are kept for it; what earlier parts leave of theirs comes on top."""

    name: str
    seconds: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[str], dict[str, Any]] = lambda log: {}
    why_skipped: str = ""


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where the toolkit usually is."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which(name) or shutil.which(
        name, path=os.pathsep.join(f"{folder}/bin" for folder in folders if folder)
    )


def parts() -> list[Part]:
    python, setup = [sys.executable], [sys.executable, "setup.py", "-q"]
    test = [*python, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    nvcc, sanitizer = find_tool("nvcc"), find_tool("compute-sanitizer")
    no_nvcc, no_sanitizer = ("" if tool else "not found" for tool in (nvcc, sanitizer))
    without_cpu = {"SPARSENLP_NATIVE": "0", "SPARSENLP_CUDA": "1", "NVCC": nvcc or ""}
    check = [sanitizer or "", "--error-exitcode", "9", "--tool"]
    small = [*test, "-m", "sanitizer", "tests/hardware"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a read beyond a tensor is within torch's pool
    timings = [*python, "bench/gpu_timings.py"]
    return [
        Part("build: CUDA library", 70, [*setup, "build_ext", "--inplace"], without_cpu, why_skipped=no_nvcc),
        *(Part(f"test: {op}", 48, [*test, f"tests/hardware/test_{op}_on_gpu.py"], read=read_tests) for op in OPS),
        *(Part(f"time: {op}", 38, [*timings, op], read=read_rows) for op in OPS),
        Part("memcheck", 45, [*check, "memcheck", *small], uncached, read_tests, no_sanitizer),
        Part("racecheck", 45, [*check, "racecheck", *small], {}, read_tests, no_sanitizer),
        Part("build: extension", 80, [*setup, "build_clib", "build_ext", "--inplace"], {"SPARSENLP_CUDA": "0"}),
    ]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """The record of a part: its status, its seconds, what `read` finds in its output, and the tail if it failed."""
    if part.why_skipped:
        return {"part": part.name, "status": "skipped", "why": part.why_skipped}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **part.environment}
    start, status = time.perf_counter(), "timed out"
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            return {"part": part.name, "status": "failed", "seconds": 0.0, "tail": [str(error)]}
        try:
            status = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it started
            process.wait()
        output.seek(0)
        log = output.read()
    record = {"part": part.name, "status": status, "seconds": time.perf_counter() - start, **part.read(log)}
    if status == "passed" and "tests" in record and not record["tests"]["passed"]:
        record["status"] = "skipped"
    return record if record["status"] == "passed" else record | {"tail": log.splitlines()[-TAIL:]}


def run_all(todo: list[Part], seconds: float) -> list[dict[str, Any]]:
    """Each in turn, with all the time but what is kept for those after it."""
    end, records = time.perf_counter() + seconds, []
    for index, part in enumerate(todo):
        kept = sum(later.seconds for later in todo[index + 1 :] if not later.why_skipped)
        record = run(part, max(end - time.perf_counter() - kept, 1.0))
        print(summary(record), flush=True)
        records.append(record)
    return records


def summary(record: dict[str, Any]) -> str:
    """A line, and the tail of one that failed."""
    details = [f"{count} {kind}" for kind, count in record.get("tests", {}).items() if count]
    details += [f"{len(record['timings'])} cells"] if "timings" in record else []
    details += [record["why"]] if "why" in record else []
    line = f"{record['part']}: {record['status']}"
    line += f" after {record['seconds']:.0f} s" if "seconds" in record else ""
    line += f" ({', '.join(details)})" if details else ""
    return "\n    ".join([line, *(record.get("tail", []) if record["status"] in ("failed", "timed out") else [])])


def table(op: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines for people: median microseconds of each candidate, and how often our time goes into the best other."""
    lines = []
    for row in rows:
        line = {name: value for name, value in row.items() if name not in ("op", "us", "errors")}
        if "sparsity" in line:
            line["sparsity"] = f"{line['sparsity']:.0%}"
        medians = {name: times["median"] for name, times in row["us"].items()}
        others = [median for name, median in medians.items() if not name.startswith(op)]
        line |= {f"{name}, us": f"{median:.1f}" for name, median in medians.items()}
        line |= {f"{name}, us": "error" for name in row.get("errors", {})}
        ratio = f"{min(others) / medians[op]:.2f}" if others and op in medians else ""
        lines.append(line | {"x best of the others": ratio})
    return lines


def gpu() -> dict[str, Any]:
    """What the times were taken on."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    question = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    driver = (
        subprocess.run(question, capture_output=True, text=True).stdout.strip() if shutil.which(question[0]) else ""
    )
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver, clock, power": driver,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"make gpu: {reason}")
    records = run_all([part for part in parts() if arguments.only in part.name], SECONDS)
    timings = [row for record in records for row in record.pop("timings", [])]

    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from harness import print_table, write_record  # of the built project

    write_record(arguments.output, gpu=gpu(), parts=records, timings=timings)
    for op in OPS:
        if rows := [row for row in timings if row["op"] == op]:
            print(f"\n## {op}\n")
            print_table(table(op, rows))
    print(f"\n{arguments.output}")
    if failed := [record["part"] for record in records if record["status"] in ("failed", "timed out")]:
        sys.exit(f"make gpu: {len(failed)} of {len(records)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""Other engines on whole models: ONNX Runtime, OpenVINO, zentorch and DeepSparse, in an environment of their own.

DeepSparse, which is no longer developed, wants Python 3.8 to 3.11, an old onnx and numpy 1 (with numpy 2 it runs
and is wrong); so each engine runs in a process of the interpreter that SPARSENLP_PEERS names:

    python3.11 -m venv peers
    peers/bin/pip install "numpy<2" onnx==1.16.2 onnxruntime openvino "torch==2.13.*" "zentorch==2.13.*" transformers
    peers/bin/pip install "numpy<2" "pandas<3" ml_dtypes requests tqdm py-machineid geocoder pydantic click pyyaml
    peers/bin/pip install --no-deps deepsparse==1.8.0 sparsezoo==1.8.1
    SPARSENLP_PEERS=peers/bin/python make bench-e2e

Without it they run with this interpreter, as far as it has them. An engine that is absent is left out, in one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import SETTLE_SECONDS
from torch import Tensor, nn
from visits import Visit

from sparsenlp.benchmark import Inputs
from sparsenlp.classifiers import silent_transformers

VARIABLE = "SPARSENLP_PEERS"

DENSE = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "zentorch": ("fp32", "bf16")}
"""Engine -> precisions, of those that gain nothing from zeros."""

SKIPS_ZEROS = {"deepsparse": ("fp32", "int8")}


def interpreter() -> str:
    """The Python that has the other engines."""
    return os.environ.get(VARIABLE) or sys.executable


class PeerError(RuntimeError):
    """An engine cannot do what it was asked."""


class Server:
    """A process of peer_server.py. Use it in a `with` block, which ends it.

    Raises PeerError if the interpreter cannot be started.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (__exit__ closes it)
        command = [interpreter(), str(Path(__file__).with_name("peer_server.py"))]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
            )
        except OSError as error:
            raise PeerError(f"{VARIABLE}: expected a Python interpreter, got {command[0]} ({error.strerror})") from None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises PeerError if the answer is an error, or none comes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            last = self.log.read().strip().splitlines()[-1:] or [f"exit code {self.process.wait()}"]
            raise PeerError(f"the process ended: {last[0]}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply

    def build(self, name: str, folder: Path) -> Tensor:
        """What the model of a folder computes; `name` is engine, precision and what else tells models apart."""
        self.ask("build", name=name, folder=str(folder), threads=self.threads)
        return torch.from_numpy(np.load(folder / f"{name}.npy")).float()

    def visits(self, name: str) -> Visit:
        """Visits to a model that was built; the other process takes the time."""

        def visit(seconds: float) -> list[float]:
            time.sleep(SETTLE_SECONDS)  # for the threads of the engine before
            return self.ask("visit", name=name, seconds=seconds)["samples"]

        return visit


def versions() -> dict[str, str | None]:
    """Engine -> version, None if it is absent. Raises PeerError if the interpreter does not work."""
    with Server(1) as server:
        return server.ask("versions")


def missing(found: dict[str, str | None]) -> list[str]:
    """A sentence for each engine that cannot be timed."""
    return [
        f"{engine}: not timed, not installed in the environment of {interpreter()} (see bench/model_peers.py)"
        for engine, version in found.items()
        if version is None
    ]


def write_folder(model: nn.Module, inputs: Inputs, folder: Path) -> Path:
    """What `peer_server.build` reads: a dense transformers model, and inputs.npz."""
    with silent_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    return folder

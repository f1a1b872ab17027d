"""What bench/accuracy.py has done: record and weights of each cell on disk, so that a re-run goes on from there."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy_cells import Cell, Row, Setup, Workbench
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsenlp.demo.records import write_json
from sparsenlp.version import __version__


@dataclass(frozen=True)
class Records:
    """Files TASK/LABEL-SEED.json and .safetensors in a folder; they hold only for the setup they were made with."""

    folder: Path
    setup: Setup

    def result(self, cell: Cell) -> Row | None:
        """What `run_cell` returned for a cell that is done, else None."""
        needed = {cell, cell.dense}
        return self._read(cell, "") if all(self._weights(each).is_file() for each in needed) else None

    def latency(self, cell: Cell) -> Row | None:
        """What was kept by `keep_latency` for the present result, else None."""
        result = self.result(cell)
        return self._read(cell, ".latency") if result is not None else None

    def keep(self, cell: Cell, model: nn.Module, before: Mapping[str, Tensor], result: Row) -> None:
        """Write the record, and the tensors that differ from those of the same name in `before`."""
        new = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        changed = {name: tensor for name, tensor in new.items() if not torch.equal(tensor, before[name])}
        file = self._weights(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        stale = f"*-{cell.seed}" if cell.is_dense else self._stem(cell)
        for kind in (".json", ".latency.json"):
            for record in file.parent.glob(f"{stale}{kind}"):  # of a dense cell also what its old model was made into
                record.unlink()
        save_file(changed, file)
        write_json(self._file(cell, ""), {"identity": self.identity(cell), "result": result})

    def keep_latency(self, cell: Cell, latency: Row) -> None:
        write_json(self._file(cell, ".latency"), {"identity": self.identity(cell), "result": latency})

    def model(self, cell: Cell, bench: Workbench) -> nn.Module:
        """The trained model of a cell that is done."""
        before = bench.fresh if cell.is_dense else self.model(cell.dense, bench)
        model = cell.method.shape_(copy.deepcopy(before))
        model.load_state_dict(load_file(self._weights(cell)), strict=False)
        return model.eval()

    def identity(self, cell: Cell) -> str:
        """A digest of everything that decides a cell's result but the data and the code."""
        setup = self.setup
        about = [__version__, repr(cell), str((setup.finetuning, setup.max_length, setup.texts, setup.tiny is None))]
        if not cell.is_dense:
            about += [self.identity(cell.dense), repr(setup.recovery)]
        if cell.is_timed:
            about.append(repr((setup.setting, setup.threads)))
        return hashlib.sha256("\n".join(about).encode()).hexdigest()

    def _read(self, cell: Cell, kind: str) -> Row | None:
        file = self._file(cell, kind)
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"accuracy: expected JSON in {file}, got {error}; remove it to do it again") from None
        return dict(record["result"]) if record["identity"] == self.identity(cell) else None

    def _file(self, cell: Cell, kind: str) -> Path:
        return self.folder / cell.task / f"{self._stem(cell)}{kind}.json"

    def _weights(self, cell: Cell) -> Path:
        return self.folder / cell.task / f"{self._stem(cell)}.safetensors"

    @staticmethod
    def _stem(cell: Cell) -> str:
        return f"{cell.method.label.replace(':', 'of')}-{cell.seed}"

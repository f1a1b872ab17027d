"""Memory and load time of a model in a process of its own: `python bench/footprint.py JSON`, and who starts it.

Linux only: the peak of resident memory is reset through /proc, after everything has been imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from sparsenlp.benchmark import Inputs

AVAILABLE = Path("/proc/self/clear_refs").exists()


def footprint(folder: str, precision: str | None, inputs: Inputs, threads: int) -> dict[str, float]:
    """Load a model from a folder that `save_pretrained` wrote, and run it a few times.

    precision  of a directory of ours, whose encoders are fused; None for a dense transformers model
    returns    seconds of loading, resident bytes (`base` with all imports done, and the `peak` since), and `bytes`
               of the file of weights

    Raises RuntimeError with the last line of the process if it fails.
    """
    shape = list(inputs["input_ids"].shape)
    request = json.dumps({"folder": folder, "precision": precision, "shape": shape, "threads": threads})
    result = subprocess.run([sys.executable, __file__, request], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"footprint: {[*result.stderr.strip().splitlines(), 'no output'][-1]}")
    weights = Path(folder).glob("*.safetensors")
    return {**json.loads(result.stdout.splitlines()[-1]), "bytes": sum(file.stat().st_size for file in weights)}


def measure(folder: str, precision: str | None, shape: list[int], threads: int) -> dict[str, float]:
    """In the child: what `footprint` returns."""
    import torch
    from encoders import fused
    from transformers import AutoModel, BertModel  # noqa: F401  (the class too, as it is imported when first used)

    from sparsenlp import from_pretrained

    torch.set_num_threads(threads)
    inputs = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # starts threads, and loads libraries
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    with torch.inference_mode():
        dense = precision is None
        model = AutoModel.from_pretrained(folder) if dense else fused(from_pretrained(folder), precision)
        model.eval()
        seconds = time.perf_counter() - start
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()  # weights stay in the file until they are read, as all rows of an embedding will be
        for _ in range(3):
            model(**inputs)
    return {"seconds": seconds, "base": base, "peak": _resident("VmHWM")}


def _resident(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"footprint: expected {field} in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))

"""Times of one op's kernels on a GPU, beside what torch has for the same work; a line of JSON for each cell.

    python bench/gpu_timings.py bsr_linear | nm_linear | block_sparse_attention | sparse_lstm

`make gpu` (bench/gpu.py) runs it. The candidates of a cell take the same inputs, and each result is checked before it
is timed; one that fails is recorded with its error. CUDA events around each call, candidates in turn. Before a call
memory is overwritten, so that nothing is in the L2 cache, and the GPU spins, so that the call is queued when its time
begins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from harness import Step
from torch import Tensor

from sparsenlp import BlockSparse
from sparsenlp.formats import NM, BlockMask
from sparsenlp.formats.recurrent import RecurrentWeights
from sparsenlp.ops import block_sparse_attention, bsr_linear, nm_linear, sparse_lstm
from sparsenlp.ops.nm_linear import pack

ROUNDS = 30
FLUSH_BYTES = 256 << 20  # more than any L2 cache
SPIN_CYCLES = 1_000_000  # about half a millisecond, more than the Python of any call takes
TOLERANCE = {"rtol": 3e-2, "atol": 3e-2}  # of bfloat16 results about 1 against float32

Timer = Callable[[dict[str, Step]], dict[str, list[float]]]


@dataclass(frozen=True)
class Sizes:
    layers: tuple[tuple[int, int], ...] = ((768, 3072), (3072, 768), (4096, 4096))  # K -> N
    tokens: tuple[int, ...] = (1, 128, 4096)
    sparsities: tuple[float, ...] = (0.75, 0.9)
    blocks: tuple[tuple[int, int], ...] = ((64, 64), (8, 1))
    windows: tuple[tuple[int, int], ...] = ((1024, 128), (4096, 512), (8192, 512))  # length, keys on the left
    units: tuple[int, ...] = (256, 1024)  # of an LSTM
    sequences: tuple[int, ...] = (1, 8, 256)
    steps: int = 64
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """Candidates, ours first, by name; each builds the call to time.

    labels     what the row says of the cell
    expected   the result in float32
    unchecked  candidates that compute something else, for comparison
    view       what of a result to compare
    """

    labels: dict[str, Any]
    candidates: dict[str, Callable[[], Step]]
    expected: Tensor
    unchecked: tuple[str, ...] = ()
    view: Callable[[Any], Tensor] = field(default=lambda result: result)


def time_on_gpu(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            step()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def measure(op: str, cell: Cell, timer: Timer) -> dict[str, Any]:
    """The row of a cell: microseconds of each candidate, or its error."""
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name, build in cell.candidates.items():
        try:
            step = build()
            result = step()
            if name not in cell.unchecked:
                torch.testing.assert_close(cell.view(result).float(), cell.expected, **TOLERANCE)
            steps[name] = step
        except Exception as error:  # of torch, Triton, Inductor or a check: the other candidates still run
            errors[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    row: dict[str, Any] = {"op": op, **cell.labels, "us": {}}
    for name, samples in (timer(steps) if steps else {}).items():
        p20, p40, p60, p80 = (1e6 * q for q in quantiles(samples, n=5))
        row["us"][name] = {"median": (p40 + p60) / 2, "p20": p20, "p80": p80}
    return row | ({"errors": errors} if errors else {})


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device)


def bsr_linear_cells(sizes: Sizes, device: str) -> Iterator[Cell]:
    for columns, rows in sizes.layers:
        for block in sizes.blocks:
            for sparsity in sizes.sparsities:
                n, k = block
                mask = torch.rand(rows // n, columns // k) >= sparsity
                mask = mask.repeat_interleave(n, 0).repeat_interleave(k, 1)
                dense = torch.randn(rows, columns) * mask / (columns * (1 - sparsity)) ** 0.5
                weight = BlockSparse.from_dense(dense.to(sizes.dtype), block, mask).to(device)
                for tokens in sizes.tokens:
                    labels = {"layer": f"{columns} -> {rows}", "tokens": tokens, "block": "x".join(map(str, block))}
                    yield from bsr_cells(labels | {"sparsity": sparsity}, weight, tokens)


def bsr_cells(labels: dict[str, Any], weight: BlockSparse, tokens: int) -> Iterator[Cell]:
    """The layer; for many tokens its gradients too."""
    dense, (n, k), (rows, columns) = weight.to_dense(), weight.block, weight.shape
    device, dtype = str(dense.device), dense.dtype
    x = normal(tokens, columns, device=device).to(dtype)
    ours = partial(bsr_linear, backend="triton") if dense.is_cuda else bsr_linear

    def torch_bsr() -> Step:
        return partial(F.linear, x, dense.to_sparse_bsr((n, k)))

    yield Cell(
        labels | {"pass": "forward"},
        {
            "bsr_linear": lambda: partial(ours, x, weight),
            "cuBLAS": lambda: partial(F.linear, x, dense),
            "torch BSR": torch_bsr,
        },
        x.float() @ dense.float().T,
    )
    if tokens < 128:
        return
    grad = (normal(tokens, rows, device=device) / tokens**0.5).to(dtype)
    pattern = weight.crow_indices, weight.col_indices
    dgrad, wgrad = torch.ops.sparsenlp.bsr_linear_dgrad.default, torch.ops.sparsenlp.bsr_linear_wgrad.default
    yield Cell(
        labels | {"pass": "gradient of x"},
        {
            "bsr_linear": lambda: partial(dgrad, grad, *pattern, weight.values, columns),
            "cuBLAS": lambda: partial(torch.mm, grad, dense),
        },
        (grad.float() @ dense.float()),
    )
    block_row = torch.repeat_interleave(torch.arange(rows // n, device=device), pattern[0].diff().long())

    def stored(gradient: Tensor) -> Tensor:
        """The blocks that are stored, of a dense gradient too."""
        if gradient.dim() == 3:
            return gradient
        return gradient.unflatten(0, (-1, n)).unflatten(2, (-1, k))[block_row, :, pattern[1].long()]

    yield Cell(
        labels | {"pass": "gradient of the weight"},
        {
            "bsr_linear": lambda: partial(wgrad, grad, x, *pattern, [n, k]),
            "cuBLAS": lambda: lambda: grad.T @ x,
        },
        stored(grad.float().T @ x.float()),
        view=stored,
    )


def nm_linear_cells(sizes: Sizes, device: str) -> Iterator[Cell]:
    for columns, rows in sizes.layers:
        groups = torch.randn(rows, columns // 4, 4)
        kept = torch.rand(groups.shape).argsort(dim=2) < 2
        weight = NM.from_dense(((groups * kept).flatten(1) / (columns / 2) ** 0.5).to(sizes.dtype), (2, 4))
        int8, weight = weight.quantize().to(device), weight.to(device)
        for tokens in sizes.tokens:
            yield nm_cell({"layer": f"{columns} -> {rows}", "tokens": tokens}, weight, int8, tokens)


def nm_cell(labels: dict[str, Any], weight: NM, int8: NM, tokens: int) -> Cell:
    dense = weight.to_dense()
    x = normal(tokens, weight.shape[1], device=str(dense.device)).to(dense.dtype)

    def ours(weight: NM) -> Step:
        """The op as `NMLinear` calls it: indices are packed once."""
        packed = pack(weight.indices, weight.pattern)
        tensors = (weight.values, weight.indices, packed, list(weight.pattern), None, "none", None, weight.scales)
        if not x.is_cuda:
            return partial(nm_linear, x, weight)
        return partial(torch.ops.sparsenlp.nm_linear.default, x, *tensors)

    def semi_structured(name: str) -> Step:
        kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{name}")
        return partial(F.linear, x, kind.from_dense(dense))

    return Cell(
        labels | {"pass": "forward"},
        {
            "nm_linear": lambda: ours(weight),
            "nm_linear int8": lambda: ours(int8),
            "cuBLAS": lambda: partial(F.linear, x, dense),
            "cuSPARSELt": lambda: semi_structured("CUSPARSELT"),
            "CUTLASS": lambda: semi_structured("CUTLASS"),
        },
        x.float() @ dense.float().T,
        unchecked=("nm_linear int8",),  # its error bound is that of the op, which the tests check
    )


def block_sparse_attention_cells(sizes: Sizes, device: str) -> Iterator[Cell]:
    for length, left in sizes.windows:
        mask = BlockMask.sliding_window(length, left, 0).to(device)
        labels = {"heads": "12 x 64", "length": length, "window": left, "sparsity": 1 - mask.density}
        for backward in (False, True):
            yield attention_cell(labels | {"pass": "backward" if backward else "forward"}, mask, left, backward, sizes)


def attention_cell(labels: dict[str, Any], mask: BlockMask, left: int, backward: bool, sizes: Sizes) -> Cell:
    device, length = str(mask.col_indices.device), mask.shape[0]
    inputs = [normal(1, 12, length, 64 + i, device=device)[..., :64].to(sizes.dtype) for i in range(3)]
    slope = normal(1, 12, length, 64, device=device)
    dense = mask.to_dense()

    def step(attend: Callable[..., Tensor], tensors: list[Tensor] = inputs) -> Step:
        """The call, or the backward pass alone."""
        if not backward:
            return partial(attend, *tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = attend(*leaves)
        return partial(torch.autograd.grad, y, leaves, slope.to(y.dtype), retain_graph=True)

    def view(result: Any) -> Tensor:
        return result if torch.is_tensor(result) else torch.cat([t.flatten() for t in result])

    def flex() -> Step:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def window(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= query - left) & (key <= query)

        torch.compiler.reset()  # one cell's graphs count towards the limit of the next one's
        flex_mask = create_block_mask(window, None, None, length, length, device=device)
        return step(partial(torch.compile(flex_attention, dynamic=False), block_mask=flex_mask))

    sdpa = F.scaled_dot_product_attention
    return Cell(
        labels,
        {
            "block_sparse_attention": lambda: step(partial(block_sparse_attention, mask=mask)),
            "SDPA, causal": lambda: step(partial(sdpa, is_causal=True)),
            "SDPA, mask": lambda: step(partial(sdpa, attn_mask=dense)),
            "FlexAttention": flex,
        },
        view(step(partial(sdpa, attn_mask=dense), [t.float() for t in inputs])()),
        unchecked=("SDPA, causal",),
        view=view,
    )


def sparse_lstm_cells(sizes: Sizes, device: str) -> Iterator[Cell]:
    for units in sizes.units:
        for sparsity in sizes.sparsities:
            weights = RecurrentWeights(*(random_gates(units, sparsity, sizes.dtype, device) for _ in range(2)))
            for sequences in sizes.sequences:
                labels = {"units": units, "sequences": sequences, "steps": sizes.steps, "block": "8x1"}
                yield lstm_cell(labels | {"sparsity": sparsity, "pass": "forward"}, weights, sequences, sizes)


def random_gates(units: int, sparsity: float, dtype: torch.dtype, device: str) -> BlockSparse:
    mask = (torch.rand(units // 2, units) >= sparsity).repeat_interleave(8, 0)
    dense = torch.randn(4 * units, units) * mask / (units * (1 - sparsity)) ** 0.5
    return BlockSparse.from_dense(dense.to(dtype), (8, 1), mask).to(device)


def lstm_cell(labels: dict[str, Any], weights: RecurrentWeights, sequences: int, sizes: Sizes) -> Cell:
    dense = [matrix.to_dense() for matrix in weights.matrices]
    device, units = str(dense[0].device), dense[0].shape[1]
    x = normal(sizes.steps, sequences, units, device=device).to(sizes.dtype)
    states = [x.new_zeros(1, sequences, units) for _ in range(2)]

    def torch_lstm(x: Tensor, states: list[Tensor], dense: list[Tensor]) -> Tensor:
        return torch.lstm(x, states, dense, False, 1, 0.0, False, False, False)[0]

    def ours(backend: str | None) -> Callable[[], Step]:
        return lambda: lambda: sparse_lstm(x, [weights], backend=backend)[0]

    backends = ("triton", "cuda") if x.is_cuda else ()
    full = [t.float() for t in (x, *states, *dense)]
    return Cell(
        labels,
        {
            "sparse_lstm": ours(None),
            **{f"sparse_lstm {backend}": ours(backend) for backend in backends},
            "cuDNN": lambda: partial(torch_lstm, x, states, dense),
        },
        torch_lstm(full[0], full[1:3], full[3:]),
    )


CELLS = {
    "bsr_linear": bsr_linear_cells,
    "nm_linear": nm_linear_cells,
    "block_sparse_attention": block_sparse_attention_cells,
    "sparse_lstm": sparse_lstm_cells,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=list(CELLS))
    op = parser.parse_args().op
    torch.manual_seed(0)
    for cell in CELLS[op](Sizes(), "cuda"):
        print(json.dumps(measure(op, cell, time_on_gpu)), flush=True)


if __name__ == "__main__":
    main()

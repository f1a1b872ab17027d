"""The rows of sparse_lstm and sparse_gru: the steps of one direction."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from problems import IN_REGISTERS, Mutation, Problem, Row
from recurrent_cases import RecurrentCase

from sparsenlp.ops.recurrent_gpu import table_of_steps

FILE = "recurrent.py"
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


def steps(case: RecurrentCase, whole: bool) -> Callable[[str, str], Problem]:
    """The launches after the product of the inputs, for a case of one direction with states."""

    def build(package: str, target: str) -> Problem:
        module = importlib.import_module(f"{package}.recurrent")
        x, batch_sizes, crow, col, values, _, biases, *states, reverse = case.arguments()
        sizes = [case.batch] * case.steps if batch_sizes is None else batch_sizes.tolist()
        bias_input, bias_recurrent = biases if biases else (None, None)
        inputs = torch.nn.functional.linear(x.flatten(0, -2), case.weights()[0].input.to_dense(), bias_input)
        tokens, wide = inputs.shape[0], 4 * case.hidden
        c = states[1][0].float() if case.lstm else None
        outputs = [
            torch.full((tokens, case.hidden), torch.nan, dtype=case.dtype),
            torch.full(states[0].shape[1:], torch.nan, dtype=case.dtype),
            torch.full((tokens, wide), torch.nan),
            *([torch.full((tokens, case.hidden), torch.nan)] if case.lstm else []),
        ]
        table = table_of_steps(sizes, reverse, x.device)
        arguments = (bias_recurrent, states[0][0], c, *outputs[:3], outputs[3] if case.lstm else None, table)
        device = module.Device(target, 8)
        launches = module.plan(inputs, crow[1], col[1], values[1], *arguments, device=device, whole=whole)
        y, h_n, *others = case.expected(save=True)
        expected = [y.flatten(0, -2), h_n[0], others[-2 if case.lstm else -1][0]]
        expected += [others[-1][0], others[0][0]] if case.lstm else []
        return Problem(launches, outputs, expected, case.tolerance, () if c is None else (c,))

    return build


SMALL = RecurrentCase(lengths=(1, 2, 2, 2, 2), hidden=16, columns=16, dtype=FLOAT16)
LARGE = RecurrentCase(steps=1, batch=64, hidden=256, columns=32, density=0.1, dtype=FLOAT16)

ROWS = [
    Row(
        "sparse_lstm step, columns float16",
        steps(SMALL, False),
        steps(LARGE, False),
        mutations=(
            Mutation("the half that it writes", FILE, "h_ptr + step % 2 * half", "h_ptr + (step + 1) % 2 * half"),
            Mutation("the weights of the next gate", FILE, "block_row = gate * (", "block_row = (gate + 1) % 4 * ("),
            Mutation("sequences that have ended", FILE, "(sequence[:, None] < size) & (row", "(row"),
            Mutation("a cell that forgets all", FILE, "cell = second * tl.load(c_ptr", "cell = 0 * tl.load(c_ptr"),
            Mutation(
                "final states of all steps",
                FILE,
                "mask & (sequence[:, None] >= following)",
                "mask & (sequence[:, None] > following)",
            ),
        ),
    ),
    Row(
        "sparse_lstm step, blocks bfloat16",
        steps(replace(SMALL, hidden=32, block=(16, 16), dtype=BFLOAT16, reverse=True), False),
        steps(replace(LARGE, block=(32, 32), dtype=BFLOAT16), False),
        mutations=(
            Mutation("bias of one gate for all", FILE, "bias_ptr + tl.cast(block_row", "bias_ptr + tl.cast(block"),
            Mutation("inputs of other tokens", FILE, "input_place = token[", "input_place = sequence["),
            Mutation("tanh for sigmoid", FILE, "second = tl.sigmoid(second)", "second = _tanh(second)"),
        ),
    ),
    Row(
        "sparse_lstm step, one sequence float32",
        steps(replace(SMALL, lengths=(), steps=2, batch=1, dtype=FLOAT32), False),
        steps(replace(LARGE, batch=1, dtype=FLOAT32), False),
        math="fma",
        synchronous=IN_REGISTERS,
    ),
    Row(
        "sparse_lstm sequence, columns float16",
        steps(replace(SMALL, lengths=(2,) * 33), True),
        steps(LARGE, True),
        mutations=(
            Mutation(
                "the first sequences for all",
                FILE,
                "program_id(0), tl.int64) * BLOCK_M",
                "program_id(0), tl.int64) * 0",
            ),
            Mutation("the first tile of units only", FILE, "in range(0, tiles)", "in range(0, 1)"),
            Mutation("the last step left out", FILE, "in range(0, steps):", "in range(0, steps - 1):"),
        ),
    ),
    Row(
        "sparse_lstm sequence, one sequence float32",
        # more columns than a warp has threads, so that a warp reads of the state what others wrote
        steps(replace(SMALL, lengths=(), steps=2, batch=1, hidden=40, block=(40, 1), density=1.0, dtype=FLOAT32), True),
        steps(replace(LARGE, batch=1, dtype=FLOAT32), True),
        math="fma",
        synchronous=IN_REGISTERS,
        mutations=(Mutation("no barrier between steps", FILE, "tl.debug_barrier()", "pass"),),
    ),
    Row(
        "sparse_gru step, columns bfloat16",
        steps(replace(SMALL, op="sparse_gru", dtype=BFLOAT16), False),
        steps(replace(LARGE, op="sparse_gru", dtype=BFLOAT16), False),
        mutations=(
            Mutation("reset before the product", FILE, "_tanh(third + first * of_state)", "_tanh(first * third)"),
            Mutation("update the other way", FILE, "h = third + second * (", "h = third + (1 - second) * ("),
            Mutation("what it did not reset is not kept", FILE, "fourth = of_state", "fourth = third"),
        ),
    ),
    Row(
        "sparse_gru sequence, blocks float32",
        steps(replace(SMALL, op="sparse_gru", hidden=32, block=(16, 16), dtype=FLOAT32), True),
        steps(replace(LARGE, op="sparse_gru", block=(32, 32), dtype=FLOAT32), True),
        math="fma",
    ),
]

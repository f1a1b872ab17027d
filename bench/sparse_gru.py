"""SparseGRU at 90 % and 50 % sparsity against nn.GRU in float32, bfloat16 and dynamic int8.

    python bench/sparse_gru.py [--quick] [--threads 1 2] [--output bench/results]

Sequences of 128 steps and single steps (streaming), one direction and two, and a training step. torch's layers have the
same zeros. All run interleaved in this process, and results are checked before they are timed. Calls on one sequence
are each timed after an untimed call of the same (`warm` of sparsenlp.measure.interleave). Writes sparse_gru.json and
prints a table and what was meant to be reached.
"""

from recurrent import main

from sparsenlp import SparseGRU

if __name__ == "__main__":
    main("sparse_gru", __doc__, SparseGRU)

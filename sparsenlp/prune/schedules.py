"""Training step -> sparsity."""

from __future__ import annotations


def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Rise from `initial` at step `begin` to `final` at step `end`, fast at first and then slower.

    s = final + (initial - final) · (1 - (step - begin) / (end - begin))³; Zhu & Gupta 2017, arXiv:1710.01878.
    Raises ValueError unless 0 <= begin <= end and 0 <= initial <= final < 1.
    """
    if not 0 <= begin <= end:
        raise ValueError(f"cubic_sparsity: expected 0 <= begin <= end, got {begin} and {end}")
    if not 0 <= initial <= final < 1:
        raise ValueError(f"cubic_sparsity: expected 0 <= initial <= final < 1, got {initial} and {final}")
    if step >= end:
        return final
    if step <= begin:
        return initial
    remaining = 1 - (step - begin) / (end - begin)
    return final + (initial - final) * remaining**3

"""What the formats of weights have in common."""

from __future__ import annotations

from typing import NoReturn


class StoredWeight:
    """A weight that is no tensor, and says so where it is taken for one."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        kind = type(self).__name__
        if name.startswith("__"):
            raise AttributeError(f"{kind} has no {name}")
        raise AttributeError(
            f"{kind}: expected a tensor to take {name!r} of, got a sparse weight; its to_dense() is a tensor, and "
            "densify_ makes the layers of a model dense again, as merging an adapter into them needs"
        )

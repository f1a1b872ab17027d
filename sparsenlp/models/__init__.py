"""Model families, and the link to transformers, which is optional and never imported from here.

transformers learns about our checkpoints when its registry of quantizers is there: now if it has been
imported, else right after somebody imports it. Either order of the two imports works, and
`import sparsenlp` alone stays light.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

REGISTRY = "transformers.quantizers.auto"


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers.PreTrainedModel; False where transformers was never imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def after_conversion(model: nn.Module) -> None:
    """Let a transformers model that now holds SparseLinear layers save itself in our format."""
    if is_transformers_model(model):
        from .hf import attach

        attach(model)


def has_fused_decoder(model: nn.Module) -> bool:
    """Whether the layers of a transformers decoder run as one op (models.decoders)."""
    if not is_transformers_model(model):
        return False
    from .decoders import has_fused_decoder

    return has_fused_decoder(model)


def connect_transformers() -> None:
    """Register with transformers now, or as soon as its registry is imported. Idempotent."""
    if REGISTRY in sys.modules:
        from . import hf  # noqa: F401
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(MetaPathFinder):
    """Finds REGISTRY as the standard finder does, but with a loader that registers afterwards."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == REGISTRY else None
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Runs the module with its own loader, then imports .hf, which registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        from . import hf  # noqa: F401

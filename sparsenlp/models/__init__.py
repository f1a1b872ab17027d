"""Model families, and the link to transformers, which is optional and never imported from here.

transformers learns about our checkpoints when its registry of quantizers is there, and about our models when
its Auto classes are: now if they have been imported, else right after somebody imports them. Either order of the two
imports works, and `import sparsenlp` alone stays light.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from .own import own_modules, register

REGISTRY = "transformers.quantizers.auto"
AUTO_CLASSES = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
)
"""What our models are registered with and built on."""

_under_way: set[str] = set()
"""Which of the modules that we watch are being imported now; they import each other."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers.PreTrainedModel; False where transformers was never imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def after_conversion(model: nn.Module) -> None:
    """Let transformers models that now hold sparse or fused layers, `model` or in it, save themselves in our format."""
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        from .hf_saving import attach, mark_loose_layers

        attach(model)
        mark_loose_layers(model)


def before_densifying(model: nn.Module) -> None:
    """Take fused encoders and decoders apart."""
    from .encoders import unfuse_encoders_

    unfuse_encoders_(model)
    if has_fused_decoder(model):
        from .decoders import unfuse_decoder_

        unfuse_decoder_(model)


def after_densifying(model: nn.Module) -> None:
    """Let transformers models that hold no sparse layer any more save themselves as they always do."""
    if any(map(is_transformers_model, model.modules())):
        from .hf_saving import detach

        detach(model)


def has_fused_decoder(model: nn.Module) -> bool:
    """Whether the layers of a transformers decoder run as one op (models.decoders)."""
    if not is_transformers_model(model):
        return False
    from .decoders import has_fused_decoder

    return has_fused_decoder(model)


def connect_transformers() -> None:
    """Register with transformers now, or as soon as its registries are imported. Idempotent."""
    watched = {finder.name for finder in sys.meta_path if isinstance(finder, _Finder)}
    for name in (REGISTRY, *AUTO_CLASSES, *own_modules()):
        if name not in sys.modules and name not in watched:
            sys.meta_path.insert(0, _Finder(name))
    if REGISTRY in sys.modules:
        from . import hf  # noqa: F401
    if any(name in sys.modules for name in AUTO_CLASSES):
        _register_models()


def _register_models() -> None:
    """Unless something they need is still being imported, after which this is called again."""
    if not _under_way:
        with _importing("register"):
            register()


@contextmanager
def _importing(name: str) -> Iterator[None]:
    _under_way.add(name)
    try:
        yield
    finally:
        _under_way.discard(name)


class _Finder(MetaPathFinder):
    """Finds one module as the standard finder does, but with a loader that registers afterwards."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Runs the module with its own loader, then registers what it makes possible."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with _importing(module.__name__):
            self.loader.exec_module(module)
        if module.__name__ == REGISTRY:
            from . import hf  # noqa: F401
        else:
            _register_models()

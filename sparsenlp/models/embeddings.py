"""Which embeddings of transformers are rows of tables and a LayerNorm, and can run as one op."""

from __future__ import annotations

from torch import nn

from ..layers.composite import replace_modules
from ..layers.embeddings import FusedEmbeddings

RULES = {
    "bert.modeling_bert.BertEmbeddings": False,
    "camembert.modeling_camembert.CamembertEmbeddings": True,
    "distilbert.modeling_distilbert.Embeddings": False,
    "electra.modeling_electra.ElectraEmbeddings": False,
    "mpnet.modeling_mpnet.MPNetEmbeddings": True,
    "roberta.modeling_roberta.RobertaEmbeddings": True,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaEmbeddings": True,
}
"""Class within transformers.models: whether its positions are counted from padding_idx, as RoBERTa's are."""


def fuse_embeddings_(model: nn.Module) -> dict[str, nn.Module]:
    """Put a FusedEmbeddings in the place of every embeddings module of `model` that RULES know.

    Names in the state dict stay as they are. Subclasses of the classes in RULES are left alone, and so is a
    module whose `forward` was replaced.

    returns  {name: the module that was replaced}; putting it back undoes the change

    Raises ValueError if `model` itself is such a module.
    """
    if _rule(model) is not None:
        raise ValueError(
            f"fuse_embeddings_: expected a model that contains embeddings, got {type(model).__name__} itself; wrap it"
        )
    originals = {name: module for name, module in model.named_modules() if _rule(module) is not None}
    fused: dict[nn.Module, nn.Module] = {
        module: FusedEmbeddings(module, module.padding_idx if _rule(module) else None) for module in originals.values()
    }
    replace_modules(model, fused)
    return originals


def _rule(module: nn.Module) -> bool | None:
    """What RULES say of this module, None if it has to stay."""
    cls = type(module)
    package, _, name = f"{cls.__module__}.{cls.__qualname__}".partition(".models.")
    rule = RULES.get(name) if package == "transformers" else None
    uncountable = rule and getattr(module, "padding_idx", None) is None
    return None if uncountable or "forward" in vars(module) else rule

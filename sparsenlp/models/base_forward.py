"""The forward of BERT-like base models whose encoder is fused, without what transformers does in between.

Masks of four dimensions that are read back to two, and an output object for each module, take as long as two layers
of a small model on a short sentence.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..layers.encoder import SparseEncoder, exporting
from .encoder_calls import UNREAD, asks_for_more
from .instance_forward import InstanceForward

OUTPUTS = {
    "bert.modeling_bert.BertModel": "BaseModelOutputWithPoolingAndCrossAttentions",
    "camembert.modeling_camembert.CamembertModel": "BaseModelOutputWithPoolingAndCrossAttentions",
    "electra.modeling_electra.ElectraModel": "BaseModelOutputWithPastAndCrossAttentions",
    "roberta.modeling_roberta.RobertaModel": "BaseModelOutputWithPoolingAndCrossAttentions",
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": "BaseModelOutputWithPoolingAndCrossAttentions",
}
"""Class within transformers.models, of what is embeddings, encoder and pooler: what its forward returns."""


class BaseForward(InstanceForward):
    """Replaces the forward of a base model in OUTPUTS: inference for the last hidden state runs its parts directly.

    Anything else runs the forward of its class. The result is the same. While a graph is traced, that forward would
    turn any mask into one of four dimensions, which hides what it does; so masks of padding are read here, and one
    that has four dimensions already runs the original layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not args:
            output = self._direct(input_ids, attention_mask, token_type_ids, kwargs)
            if output is not None:
                return output
        if torch.compiler.is_compiling() and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            kwargs[UNREAD] = True
        return self.original(input_ids, attention_mask, token_type_ids, *args, **kwargs)

    def _direct(self, input_ids: Any, mask: Any, token_type_ids: Any, others: dict[str, Any]) -> Any:
        """The output, or None where more is asked for than the parts give."""
        model: Any = self.model
        modules, settings = model._modules, vars(model.config)
        encoder: Any = modules["encoder"]
        if (
            (torch.is_grad_enabled() and not exporting())
            or model.training
            or not _is_plain(input_ids)
            or input_ids.dim() != 2
            or not (mask is None or (_is_plain(mask) and mask.shape == input_ids.shape))
            or others.get("return_dict") is False
            or asks_for_more(others, frozenset({"return_dict"}))
            or settings.get("output_hidden_states")
            or settings.get("_output_attentions")
            or not settings.get("return_dict", True)
            or not isinstance(encoder, SparseEncoder)
            or encoder._forward_hooks
            or encoder._forward_pre_hooks
            or "forward" in vars(encoder)
            or _has_any_global_hook()
        ):
            return None
        x = modules["embeddings"](input_ids=input_ids, token_type_ids=token_type_ids)
        if (project := modules.get("embeddings_project")) is not None:
            x = project(x)
        if not encoder.fuses(x):
            return None
        hidden = encoder.run(x, None if mask is None else mask != 0)
        pooler = modules.get("pooler")
        pooled = {} if pooler is None else {"pooler_output": pooler(hidden)}
        outputs = sys.modules["transformers.modeling_outputs"]
        return getattr(outputs, OUTPUTS[_name(model)])(last_hidden_state=hidden, **pooled)


def shorten_forward_(model: nn.Module) -> None:
    """Give `model` a BaseForward, if it is one of OUTPUTS and nobody else has replaced its forward."""
    if _name(model) in OUTPUTS and "forward" not in vars(model):
        model.__dict__["forward"] = BaseForward(model)


def restore_forward_(model: nn.Module) -> None:
    """Undo `shorten_forward_`."""
    if isinstance(vars(model).get("forward"), BaseForward):
        del model.__dict__["forward"]


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of no subclass but those that stand for one in a graph."""
    return type(tensor) is Tensor or (torch.compiler.is_compiling() and isinstance(tensor, Tensor))


def _name(model: nn.Module) -> str:
    package, _, name = f"{type(model).__module__}.{type(model).__qualname__}".partition(".models.")
    return name if package == "transformers" else ""

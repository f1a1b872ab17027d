"""The models of this project: small, made from words, trained from scratch.

Each has a file of its own. This table names them without importing transformers, which learns about them by `register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

PRUNING: Mapping[str, Any] = {
    "prune": {"pattern": "8x1", "sparsity": 0.8},
    "recover": {"learning_rate": 2e-3, "epochs": 3},
}
"""What suits small models that were trained from scratch: a higher learning rate than for pretrained ones."""


TOKEN_PRUNING: Mapping[str, Any] = {
    "prune": PRUNING["prune"],
    "recover": {
        **PRUNING["recover"],
        **{"label_weight": 0.5, "distill_weight": 1.0, "temperature": 1.0},
        **{"hidden_weight": 0.0, "spliced": 0.0, "freeze_embeddings": False, "bf16": False},
    },
}
"""The same for models that predict tokens, which `train.recover_sequences` recovers."""


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """A row of the table.

    summary    a few words for the user
    module     file in this folder
    config     class of its configuration, whose model_type is the key of the row
    model      class of the model
    auto       Auto class of transformers that loads it
    pairs      it takes pairs of texts, others one at a time
    pruning    sections of a recipe that suit it; a recipe or option goes before them
    """

    summary: str
    module: str
    config: str
    model: str
    auto: str = "AutoModelForSequenceClassification"
    pairs: bool = False
    pruning: Mapping[str, Any] = field(default_factory=lambda: PRUNING)

    @property
    def predicts_tokens(self) -> bool:
        """It is a language model or an encoder-decoder, no classifier."""
        return self.auto != "AutoModelForSequenceClassification"

    def classes(self) -> tuple[Any, Any]:
        """(configuration, model); imports transformers."""
        module = import_module(f".{self.module}", __package__)
        return getattr(module, self.config), getattr(module, self.model)


OWN: dict[str, OwnModel] = {
    "textcnn": OwnModel(
        summary="convolutions of several widths and max-pooling (Kim 2014)",
        module="textcnn",
        config="TextCnnConfig",
        model="TextCnnForSequenceClassification",
    ),
    "birnn": OwnModel(
        summary="a bidirectional LSTM or GRU, pooled over the words",
        module="birnn",
        config="BiRnnConfig",
        model="BiRnnForSequenceClassification",
    ),
    "selfattention": OwnModel(
        summary="two layers of self-attention in a sliding window",
        module="selfattention",
        config="SelfAttentionConfig",
        model="SelfAttentionForSequenceClassification",
    ),
    "matcher": OwnModel(
        summary="for pairs: one recurrent encoder reads both texts, compared as a whole or word by word",
        module="matcher",
        config="MatcherConfig",
        model="MatcherForSequenceClassification",
        pairs=True,
    ),
    "lstm-lm": OwnModel(
        summary="a language model of words or characters (Zaremba et al. 2014)",
        module="lstm_lm",
        config="LstmLmConfig",
        model="LstmForCausalLM",
        auto="AutoModelForCausalLM",
        pruning=TOKEN_PRUNING,
    ),
    "seq2seq": OwnModel(
        summary="a recurrent encoder-decoder with attention (Luong et al. 2015)",
        module="rnn_seq2seq",
        config="RnnSeq2SeqConfig",
        model="RnnForConditionalGeneration",
        auto="AutoModelForSeq2SeqLM",
        pruning=TOKEN_PRUNING,
    ),
}

SHARED = ("words",)
"""Files in this folder that the models build on and that import transformers."""


def own_modules() -> list[str]:
    """Names of the modules that the models are in, and of what they share."""
    return [f"{__package__}.{name}" for name in (*SHARED, *(row.module for row in OWN.values()))]


def own_class(name: str) -> Any:
    """The model class of that name, None if it is none of ours."""
    return next((row.classes()[1] for row in OWN.values() if row.model == name), None)


def register() -> None:
    """Tell the Auto classes of transformers about every model. Idempotent."""
    import transformers

    for model_type, row in OWN.items():
        config, model = row.classes()
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        getattr(transformers, row.auto).register(config, model, exist_ok=True)

"""What a transformers checkpoint is for: the class that its config.json names, its head, and the classes it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .data.labels import is_generic, match_labels, number_of
from .models.own import own_class

CLASSES, REGRESSION, SEVERAL = "one class per text", "regression", "several labels per text"
NO_HEAD, LANGUAGE, UNKNOWN = "no head", "a language model's head", "an unknown head"
KINDS = {
    "ForSequenceClassification": CLASSES,
    "ForTokenClassification": "a label per token",
    "ForQuestionAnswering": "spans that answer questions",
    "ForMultipleChoice": "multiple choice",
    "ForConditionalGeneration": "an encoder-decoder that answers with texts",
    "ForMaskedLM": LANGUAGE,
    "ForPreTraining": LANGUAGE,
    "ForNextSentencePrediction": LANGUAGE,
    "ForCausalLM": LANGUAGE,
    "LMHead": LANGUAGE,
    "DoubleHeads": LANGUAGE,
    "Model": NO_HEAD,
    "Encoder": NO_HEAD,
}
"""What a class with this in its name is for; the first that fits."""
STARTS = (NO_HEAD, LANGUAGE)
"""What a classifier is made of by fine-tuning; a language model's head is dropped."""
SERVED = (
    "with labelled texts, classifiers are served, and encoders or language models to be fine-tuned as such; "
    "without texts, every model can be pruned"
)


@dataclass(frozen=True)
class Head:
    """The classes a model is to predict.

    names    in the order of the outputs
    trained  False where the model has to be fine-tuned before it can predict them
    why      one sentence for the user where something was decided for them, else ""
    remarks  how the labels of the data were matched, where that is to be said, else ""
    """

    names: list[str]
    trained: bool
    why: str = ""
    remarks: str = ""


def label_names_of(config: Any) -> list[str]:
    """Class names of a transformers config, in the order of the outputs.

    Raises ValueError for gaps in their numbers.
    """
    names = config.id2label
    if sorted(names) != [*range(len(names))]:
        raise ValueError(f"id2label: expected classes numbered from 0 to {len(names) - 1}, got {sorted(names)}")
    return [str(names[i]) for i in range(len(names))]


def named_class(config: Any) -> Any:
    """The model class, of transformers or ours, that a config.json names.

    Raises ValueError where it names none, several, or one that is not installed.
    """
    import transformers

    names = [*(getattr(config, "architectures", None) or ())]
    found = (own_class(names[0]) or getattr(transformers, names[0], None)) if len(names) == 1 else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        got = ", ".join(names) or "none"
        raise ValueError(
            f"architectures: expected one model class of transformers or sparsenlp in config.json, got {got}; "
            "load the model with its own class and save it with save_pretrained"
        )
    return found


def head_kind(config: Any) -> str:
    """What the outputs of a model are for: one of the values of KINDS, REGRESSION, SEVERAL or UNKNOWN."""
    name = _architecture(config)
    problem = getattr(config, "problem_type", None)
    kind = next((kind for part, kind in KINDS.items() if part in name), UNKNOWN)
    if problem == "multi_label_classification":
        return SEVERAL
    if problem == "regression" or (kind == CLASSES and len(config.id2label) == 1):
        return REGRESSION
    return kind


def check_head(config: Any) -> None:
    """Raise ValueError for a model that is neither a classifier of one class per text nor what one is made of."""
    kind, architecture = head_kind(config), _architecture(config)
    if (architecture or kind != UNKNOWN) and kind != CLASSES and kind not in STARTS:
        of = f"{architecture}, which is for {kind}" if architecture else f"a model for {kind}"
        raise ValueError(f"model: expected one class per text, got {of}; {SERVED}")
    if getattr(config, "summary_type", None) == "last":
        raise ValueError(
            f"model: expected a head that finds a text's last token, got {architecture or 'a model'} with summary_type "
            "last, which reads the padding of shorter texts; choose first or mean in config.json, and fine-tune"
        )


def choose_head(config: Any, labels: Sequence[str], retrain: bool = False) -> Head:
    """Match a model's classes with the labels of a data file (each once, in the order new classes get).

    retrain  the model will be fine-tuned anyway, so that its classes may be renamed

    Raises ValueError for a model that is for something other than one class per text, and where it cannot be told
    which class of a trained model is which: as many under other names, or some of those that nobody named.
    """
    check_head(config)
    kind = head_kind(config)
    if kind != CLASSES:
        dropped = f"; the head of {_architecture(config)} is dropped" if kind == LANGUAGE else ""
        return Head([*labels], False, f"the model has no trained classification head{dropped}")
    names = label_names_of(config)
    matched = match_labels(labels, names)
    if None not in matched.places:
        return Head(names, not retrain, remarks=matched.remarks)
    if len(labels) > len(names) or (len(labels) < len(names) and (retrain or not is_generic(names))):
        return Head([*labels], False, f"the model has {len(names)} classes and the data {len(labels)}")
    if retrain:
        return Head([*labels], False)
    if is_generic(names):
        return _unnamed_head(names, labels)
    raise ValueError(
        f"labels: expected the model's classes {', '.join(names)}, got {', '.join(labels)}; "
        "rename them in the data, or train the model on them with --finetune-epochs"
    )


def _unnamed_head(names: Sequence[str], labels: Sequence[str]) -> Head:
    """Text that names all classes of a trained model is taken in order; some of them, or other numbers, are refused."""
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    numbers = any(number_of(label) is not None for label in labels)
    if len(labels) == len(names) and not numbers:
        return Head([*labels], True, f"the model's classes have no names; taken to be {shown}, in this order")
    expected = f"numbers from 0 to {len(names) - 1}" if numbers else f"all {len(names)} classes"
    raise ValueError(
        f"labels: expected {expected} for a model whose classes have no names, got {shown}; write the numbers of its "
        "outputs into the data, name its classes in config.json (id2label), or train it with --finetune-epochs"
    )


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])

"""Tokenizers of the tokenizers library with fewer tokens, by editing their JSON form."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

MODELS = ("WordLevel", "WordPiece", "BPE", "Unigram")


def needed_tokens(tokenizer: Any, kept: set[int]) -> set[int]:
    """`kept` with the special tokens and those that the kept ones are made of, so that they still come about.

    tokenizer   a transformers tokenizer with a `backend_tokenizer`

    BPE reaches a token by merges: the parts of every merge that makes a kept token stay, and so on down to characters.
    Byte-level alphabets and byte tokens stay, and the lowest-scored piece of Unigram, which the unknown token's score
    depends on. Raises ValueError for a tokenizer of another kind.
    """
    data = _data(tokenizer)
    model = data["model"]
    vocab = _vocab(model)
    needed = kept | {token["id"] for token in data["added_tokens"] if token["special"]}
    by_name = [*tokenizer.all_special_tokens, model.get("unk_token")]
    if '"ByteLevel"' in json.dumps([data["pre_tokenizer"], data["normalizer"]]):
        from tokenizers.pre_tokenizers import ByteLevel

        by_name += ByteLevel.alphabet()
    if model.get("byte_fallback"):
        by_name += [f"<0x{byte:02X}>" for byte in range(256)]
    needed |= {vocab[token] for token in by_name if token in vocab}
    if model["type"] == "Unigram":
        needed |= {min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1])}
        needed |= set() if model.get("unk_id") is None else {model["unk_id"]}
    if model["type"] == "BPE":
        parts: dict[int, list[int]] = {}
        for left, right, result in _merges(model):
            parts.setdefault(vocab[result], []).extend((vocab[left], vocab[right]))
        waiting = [*needed]
        while waiting:
            new = set(parts.get(waiting.pop(), ())) - needed
            needed |= new
            waiting += new
    return needed


def reduce_tokenizer(tokenizer: Any, new_ids: Sequence[int]) -> Any:
    """A copy of a transformers tokenizer with the tokens whose new id is not negative; `new_ids` is by old id.

    Raises ValueError as `needed_tokens`; what that gives has to be among the tokens.
    """
    from tokenizers import Tokenizer

    data = _data(tokenizer)
    model = data["model"]
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if new_ids[i] >= 0]
    else:
        vocab = {token: new_ids[i] for token, i in model["vocab"].items() if new_ids[i] >= 0}
        model["vocab"] = vocab
        if model["type"] == "BPE":
            merges = zip(_merges(model), model["merges"], strict=True)
            model["merges"] = [merge for tokens, merge in merges if all(token in vocab for token in tokens)]
    data["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in data["added_tokens"] if new_ids[token["id"]] >= 0
    ]
    if data.get("padding"):
        data["padding"]["pad_id"] = new_ids[data["padding"]["pad_id"]]
    _renumber_(data["post_processor"], new_ids)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(data))
    return smaller


def _data(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(
            "tokenizer: expected a fast one, of the tokenizers library, which can be edited, got "
            f"{type(tokenizer).__name__}; reduce the vocabulary without it, and renumber the ids of its tokens"
        )
    data = json.loads(backend.to_str())
    if data["model"]["type"] not in MODELS:
        raise ValueError(f"tokenizer: expected a model among {', '.join(MODELS)}, got {data['model']['type']}")
    return data


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _merges(model: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(left, right, result) of every merge, in order; older files join left and right by a space."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right, left + right[prefix:]) for left, right in pairs]


def _renumber_(processor: Any, new_ids: Sequence[int]) -> None:
    """Put new ids into a post-processor, which adds special tokens; a sequence of them is one too."""
    for part in (processor or {}).get("processors", ()):
        _renumber_(part, new_ids)
    for token in (processor or {}).get("special_tokens", {}).values():
        token["ids"] = [new_ids[i] for i in token["ids"]]
    for name in ("cls", "sep"):
        if name in (processor or {}):
            token, i = processor[name]
            processor[name] = [token, new_ids[i]]

"""Trained recurrent models that come as Python packages: g2p-en, and textgenrnn, which needs h5py to be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.vocabulary import vocabulary_tokenizer
from .lstm_lm import LstmForCausalLM, LstmLmConfig
from .rnn_seq2seq import RnnForConditionalGeneration, RnnSeq2SeqConfig

PACKAGES = {
    "g2p-en": "pip install --no-deps g2p-en==2.1.0",
    "textgenrnn": "pip install --no-deps textgenrnn==2.0.0 h5py",
}
"""Name -> how it is installed."""

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
PHONEMES = [
    *("<pad>", "<unk>", "<s>", "</s>", "AA0", "AA1", "AA2", "AE0", "AE1", "AE2", "AH0", "AH1", "AH2", "AO0", "AO1"),
    *("AO2", "AW0", "AW1", "AW2", "AY0", "AY1", "AY2", "B", "CH", "D", "DH", "EH0", "EH1", "EH2", "ER0", "ER1", "ER2"),
    *("EY0", "EY1", "EY2", "F", "G", "HH", "IH0", "IH1", "IH2", "IY0", "IY1", "IY2", "JH", "K", "L", "M", "N", "NG"),
    *("OW0", "OW1", "OW2", "OY0", "OY1", "OY2", "P", "R", "S", "SH", "T", "TH", "UH0", "UH1", "UH2", "UW", "UW0"),
    *("UW1", "UW2", "V", "W", "Y", "Z", "ZH"),
]
"""The tokens of g2p-en in the order of their ids."""

WINDOW = 40
"""Tokens that textgenrnn predicts the next one from."""


def g2p_en() -> tuple[RnnForConditionalGeneration, Any, Any]:
    """(model, tokenizer of letters, tokenizer of phonemes) of g2p-en 2.1.0 (Park & Kim), Apache-2.0, in eval mode.

    It says how a word of letters a to z is pronounced: GRUs of 256, no attention, 1.2 million parameters. Of the two
    tokenizers the first adds "</s>" to a word, the second to phonemes with spaces between them.

    Raises ModuleNotFoundError if the package is absent.
    """
    arrays = np.load(_file("g2p-en", "g2p_en/checkpoint20.npz"))
    names = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
    tensors = {"lm_head.weight": arrays["fc_w"], "lm_head.bias": arrays["fc_b"]}
    for theirs, ours in (("enc", "encoder"), ("dec", "decoder")):
        tensors[f"{ours}.embeddings.weight"] = arrays[f"{theirs}_emb"]
        for short, name in names.items():
            tensors[f"{ours}.rnn.layers.0.{name}"] = arrays[f"{theirs}_{short}"]
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    letters = vocabulary_tokenizer(_numbered(LETTERS), special, characters=True, end="</s>")
    phonemes = vocabulary_tokenizer(_numbered(PHONEMES), {**special, "bos_token": "<s>"}, end="</s>")
    config = RnnSeq2SeqConfig(
        vocab_size=len(LETTERS),
        decoder_vocab_size=len(PHONEMES),
        embedding_size=256,
        hidden_size=256,
        bidirectional=False,
        attention=None,
        dropout=0.0,
        pad_token_id=phonemes.pad_token_id,
        bos_token_id=phonemes.bos_token_id,
        eos_token_id=phonemes.eos_token_id,
        decoder_start_token_id=phonemes.bos_token_id,
    )
    model = RnnForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 20  # as g2p-en decodes
    return _filled(model, tensors), letters, phonemes


def textgenrnn() -> tuple[LstmForCausalLM, Any]:
    """(model, tokenizer of characters) of textgenrnn 2.0.0 (Woolf), MIT, in eval mode.

    A language model of short texts: two LSTMs of 128 and an attention average. It was trained to predict the token
    after a window of WINDOW others, "<pad>" on the left before a text that is shorter; other input it predicts badly,
    and "<pad>" is a token like others to it, in no attention_mask. A text stands between two "<s>".

    Raises ModuleNotFoundError if the package or h5py is absent.
    """
    path = _file("textgenrnn", "textgenrnn/textgenrnn_weights.hdf5")
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError("textgenrnn: expected the package h5py, got none; pip install h5py") from None
    vocabulary = json.loads(path.with_name("textgenrnn_vocab.json").read_text(encoding="utf-8"))
    tokenizer = vocabulary_tokenizer(
        {"<pad>": 0, **vocabulary},
        {"pad_token": "<pad>", "unk_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>"},
        characters=True,
        begin="<s>",
        end="<s>",
    )
    with h5py.File(path) as file:
        tensors = {
            "embeddings.weight": file["embedding/embedding/embeddings:0"][:],
            "attention": file["attention/attention/attention_W:0"][:, 0],
            "lm_head.weight": file["output/output/kernel:0"][:].T,
            "lm_head.bias": file["output/output/bias:0"][:],
        }
        for i in range(2):
            group = file[f"rnn_{i + 1}/rnn_{i + 1}"]
            for name, array in from_cudnn_lstm(
                group["kernel:0"][:], group["recurrent_kernel:0"][:], group["bias:0"][:]
            ):
                tensors[f"lstm.layers.{i}.{name}"] = array
    config = LstmLmConfig(
        vocab_size=len(tensors["embeddings.weight"]),
        embedding_size=100,
        hidden_size=128,
        dropout=0.0,
        attention_average=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _filled(LstmForCausalLM(config), tensors), tokenizer


def from_cudnn_lstm(kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """torch's weights of an LSTM from those that Keras saves of a CuDNNLSTM (kernel (in, 4 units), ...).

    Both order the gates i, f, g, o. The bytes of a gate's kernel are those of its transpose, and a gate's recurrent
    kernel is transposed (see transform_kernels in keras/engine/saving.py).
    """
    units = recurrent.shape[0]
    first, second = np.split(bias, 2)
    return [
        ("weight_ih_l0", np.concatenate([gate.reshape(units, -1) for gate in np.split(kernel, 4, axis=1)])),
        ("weight_hh_l0", np.concatenate(np.split(recurrent, 4, axis=1))),
        ("bias_ih_l0", first),
        ("bias_hh_l0", second),
    ]


def _filled(model: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    state = {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in tensors.items()}
    module: nn.Module = model
    module.load_state_dict(state)
    return model.eval()


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _file(package: str, file: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"{package}: expected the package {package}, got none; {PACKAGES[package]}") from None

"""A tiny BERT with a tokenizer of whole words, and texts that it can learn, for the tests of whole commands."""

import csv
import random
from pathlib import Path

import pytest
import torch

GOOD = [f"good{i}" for i in range(10)]
BAD = [f"bad{i}" for i in range(10)]
LENGTH = 32


def save_tiny_bert(directory, names=("bad", "good"), head=True, seed=0, **sizes):
    """A transformers directory: BERT with hidden size 32 and 2 layers; without `head` an encoder alone."""
    transformers = pytest.importorskip("transformers", reason="the models come from transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | sizes
    tokenizer = make_tokenizer(transformers)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **sizes)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model = (transformers.BertForSequenceClassification if head else transformers.BertModel)(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def make_tokenizer(transformers):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def write_table(path, count=64, seed=0, names=("bad", "good"), columns=("text", "label")):
    """Texts of one kind of word with that kind as label."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in range(count):
            words = rng.choices((BAD, GOOD)[row % 2], k=rng.randint(2, 6))
            writer.writerow([" ".join(words), names[row % 2]])
    return Path(path)

"""What all models of words have in common: they do not see padding, they are saved as usual, they learn."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from sparsenlp import from_pretrained, save_pretrained
from sparsenlp.data import TokenizedDataset
from sparsenlp.models.own import OWN
from sparsenlp.train import FinetuneConfig, accuracy, finetune, predict

pytest.importorskip("transformers", reason="the models are models of transformers")

VOCABULARY = 20


@dataclass(frozen=True)
class Case:
    name: str
    options: dict = field(default_factory=dict)

    def __str__(self):
        return "-".join([self.name, *map(str, self.options.values())])

    @property
    def pairs(self):
        return OWN[self.name].pairs

    def build(self, **options):
        """With few parameters and a fixed seed, in eval mode."""
        config, model = OWN[self.name].classes()
        sizes = {"vocab_size": VOCABULARY, "embedding_size": 16, "num_labels": 2} | SIZES[self.name]
        torch.manual_seed(0)
        return model(config(**(sizes | self.options | options))).eval()


SIZES = {
    "textcnn": {"filters": 8},
    "birnn": {"hidden_size": 8},
    "selfattention": {"intermediate_size": 32, "window": 2, "max_position_embeddings": 16},
    "matcher": {"hidden_size": 8, "dense_size": 16},
}
DEFAULTS = [Case(name) for name in SIZES]
WORD_BY_WORD = Case("matcher", {"comparison": "words"})
CASES = [
    *DEFAULTS,
    Case("birnn", {"cell": "gru", "pooling": "mean", "bidirectional": False}),
    Case("birnn", {"pooling": "last", "num_hidden_layers": 2}),
    Case("birnn", {"cell": "gru", "pooling": "attention"}),
    WORD_BY_WORD,
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)


def test_every_classifier_is_tested():
    assert SIZES.keys() == {name for name, row in OWN.items() if row.auto == "AutoModelForSequenceClassification"}


def make_inputs(case, lengths=(1, 7, 4)):
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, shape, generator=generator),
        "attention_mask": (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long(),
    }
    if case.pairs:
        inputs["token_type_ids"] = (torch.arange(shape[1]) >= 2).long().expand(shape)
    return inputs


@cases
@torch.no_grad()
def test_padding_changes_nothing(case):
    model, inputs = case.build(), make_inputs(case)
    output = model(**inputs, output_hidden_states=True)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        alone = model(**{name: x[row : row + 1, :length] for name, x in inputs.items()}, output_hidden_states=True)
        torch.testing.assert_close(alone.logits[0], output.logits[row])
        torch.testing.assert_close(alone.hidden_states[-1][0], output.hidden_states[-1][row, :length])
    padded = {name: F.pad(x, (2, 5)) for name, x in inputs.items()}
    padded["input_ids"][padded["attention_mask"] == 0] = 3
    torch.testing.assert_close(model(**padded).logits, output.logits)


@cases
@torch.no_grad()
def test_without_a_mask_padding_is_where_the_padding_token_is(case):
    model, inputs = case.build(), make_inputs(case)
    expected = model(**inputs).logits
    inputs["input_ids"] *= inputs.pop("attention_mask")
    torch.testing.assert_close(model(**inputs).logits, expected)


@cases
def test_a_text_without_words_is_no_obstacle(case):
    model, inputs = case.build(), make_inputs(case)
    inputs["attention_mask"][0] = 0
    output = model(**inputs, labels=torch.tensor([0, 1, 0]))
    output.loss.backward()
    assert output.logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@cases
@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path, case):
    from transformers import AutoModelForSequenceClassification

    model, inputs = case.build(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}), make_inputs(case)
    save_pretrained(model, tmp_path)
    expected = model(**inputs).logits
    assert expected.shape == (3, 3)
    for loaded in (AutoModelForSequenceClassification.from_pretrained(tmp_path), from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
        torch.testing.assert_close(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("case", [*DEFAULTS, WORD_BY_WORD], ids=str)
def test_it_learns(case):
    """Which of two words a text holds; of pairs whether both hold the same one."""
    generator = torch.Generator().manual_seed(0)
    ids, types, labels = [], [], []
    for _ in range(64):
        texts = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 4)]
        signs = torch.randint(2, 4, (2,), generator=generator).tolist()
        for text, sign in zip(texts, signs, strict=True):
            text[int(torch.randint(3, (1,), generator=generator))] = sign
        texts, label = (texts, int(signs[0] == signs[1])) if case.pairs else (texts[:1], signs[0] - 2)
        ids.append([i for text in texts for i in text])
        types.append([i for i, text in enumerate(texts) for _ in text])
        labels.append(label)
    columns = {"input_ids": ids} | ({"token_type_ids": types} if case.pairs else {})
    data = TokenizedDataset(columns, torch.tensor(labels), dict.fromkeys(columns, 0))
    model = case.build(dropout=0.1)
    finetune(model, data, FinetuneConfig(epochs=12, batch_size=8, learning_rate=1e-2, bf16=False), quiet=True)
    assert accuracy(predict(model, data), data.labels) > 0.95


@torch.no_grad()
def test_the_matcher_reads_both_texts_alike():
    case = Case("matcher")
    model, ids = case.build(), torch.tensor([[5, 6, 7, 8, 9]])
    states = [
        model(input_ids=ids[:, order], token_type_ids=types, output_hidden_states=True).hidden_states[-1]
        for order, types in (
            ([0, 1, 2, 3, 4], torch.tensor([[0, 0, 0, 1, 1]])),
            ([3, 4, 0, 1, 2], torch.tensor([[0, 0, 1, 1, 1]])),
        )
    ]
    torch.testing.assert_close(states[0][:, [3, 4, 0, 1, 2]], states[1])


def test_too_long_a_text_for_position_embeddings():
    with pytest.raises(ValueError, match="expected at most 16 tokens, got 17"):
        Case("selfattention").build()(torch.ones(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsenlp; from transformers import PreTrainedModel, AutoConfig",
        "from sparsenlp.models.matcher import MatcherConfig; from transformers import AutoConfig",
    ],
)
def test_transformers_knows_them_whatever_was_imported_first(imports):
    code = f"{imports}; assert AutoConfig.for_model('textcnn').filters; assert AutoConfig.for_model('matcher').cell"
    subprocess.run([sys.executable, "-c", code], check=True)

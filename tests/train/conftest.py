"""A tiny BERT and a data set it can learn: does a text hold more low than high tokens?"""

import pytest
import torch

from sparsenlp.data import TokenizedDataset

VOCABULARY = 50


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_data():
    def make(count=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 16, (count,), generator=generator).tolist()
        ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        labels = [int(sum(i < VOCABULARY // 2 for i in row) * 2 > len(row)) for row in ids]
        types = [[0] * length for length in lengths]
        columns = {"input_ids": ids, "token_type_ids": types}
        return TokenizedDataset(columns, torch.tensor(labels), dict.fromkeys(columns, 0))

    return make


@pytest.fixture(scope="session")
def make_model():
    transformers = pytest.importorskip("transformers", reason="the models to train come from transformers")

    def make(seed=0, **options):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **(sizes | options))
        return transformers.BertForSequenceClassification(config).eval()

    return make

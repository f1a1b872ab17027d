"""Every fused family, called by many Python threads at once, gives bit by bit what one thread gets."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tiny_encoders import IMAGE, TEXT, build, sparse, torch_encoder, transformers
from torch import nn

from sparsenlp import SparsifyConfig, sparsify_
from sparsenlp.models.decoders import conv1d_to_linear_, fuse_decoder_
from sparsenlp.models.encoders import fuse_encoders_

THREADS = 8
ROUNDS = 3
LENGTHS = (5, 9, 12, 1, 16, 2, 7, 17)
DECODER = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}


def text(name):
    def make():
        model = sparse(build(TEXT[name]), (8, 4))
        fuse_encoders_(model)
        return model, [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches()]

    return make


def image():
    model = sparse(build(IMAGE["vit"]))
    fuse_encoders_(model)
    return model, [{"pixel_values": torch.randn(1 + n % 3, 3, 16, 16, generator=seeded(n))} for n in LENGTHS]


def torch_layers():
    model = nn.ModuleDict({"encoder": torch_encoder()})
    fuse_encoders_(model)
    inputs = [
        {"src": torch.randn(*mask.shape, 32, generator=seeded(7)), "src_key_padding_mask": mask == 0}
        for _, mask in batches()
    ]
    return model["encoder"], inputs


def decoder(family):
    def make():
        torch.manual_seed(0)
        if family == "GPT2":
            config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)
            model = conv1d_to_linear_(transformers.GPT2LMHeadModel(config))
        else:
            config = getattr(transformers, f"{family}Config")(**DECODER)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
        fuse_decoder_(model.eval())
        return model, [{"input_ids": ids, "attention_mask": mask.flip(1)} for ids, mask in batches()]

    return make


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.conv(self.gru(self.lstm(x)[0])[0].transpose(1, 2))


def recurrent():
    torch.manual_seed(0)
    model = Recurrent().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                (torch.rand(parameter.shape[0] // 8) < 0.5).repeat_interleave(8)[
                    (...,) + (None,) * (parameter.dim() - 1)
                ]
            )
    sparsify_(model, SparsifyConfig(measure="off", min_sparsity=0.1))
    return model, [{"x": torch.randn(1 + n % 3, n, 16, generator=seeded(n))} for n in LENGTHS]


FAMILIES = {
    **{name: text(name) for name in ("bert", "roberta", "electra", "distilbert", "mpnet")},
    "vit": image,
    "torch": torch_layers,
    **{family: decoder(family) for family in ("Llama", "Mistral", "Qwen2", "GPT2")},
    "recurrent": recurrent,
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batches():
    """Tokens and masks of several lengths: of none, at the right, at the left, of a whole row."""
    for number, length in enumerate(LENGTHS):
        rows = 1 + number % 3
        mask = (torch.arange(length) < torch.arange(length, length - rows, -1)[:, None].clamp(min=1)).long()
        yield torch.randint(3, 50, (rows, length), generator=seeded(number)), mask.flip(1) if number % 2 else mask


def run(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return (output if isinstance(output, torch.Tensor) else output[0]).clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_get_what_one_thread_gets(family, needs_native):
    model, inputs = FAMILIES[family]()
    fresh = copy.deepcopy(model)  # has gathered nothing: all threads begin with the first call
    expected = [run(model, given) for given in inputs]
    start = threading.Barrier(THREADS)
    wrong: list[str] = []

    def work(thread):
        start.wait()
        for step in range(ROUNDS * len(inputs)):
            i = (thread + step * (1 + thread % 3)) % len(inputs)
            try:
                if not torch.equal(run(fresh, inputs[i]), expected[i]):
                    wrong.append(f"thread {thread}, step {step}: other numbers for input {i}")
            except Exception as error:
                wrong.append(f"thread {thread}, step {step}: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

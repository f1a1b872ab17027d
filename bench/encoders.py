"""Whole encoders for bench/end_to_end.py: the models, their zeros, our conversion, inputs, and what is a right result.

Every engine runs the same masked model, and all are compared with it in float32: dense engines do not care about
the zeros, and those that skip zeros get the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsenlp import SparseLinear, from_pretrained
from sparsenlp.benchmark import Inputs, dense_twin, random_inputs
from sparsenlp.benchmark import Setting as FullSetting
from sparsenlp.classifiers import silent_transformers
from sparsenlp.data.demo import minilm_directory, rotten_tomatoes
from sparsenlp.layers.composite import replace_modules
from sparsenlp.models.encoders import fuse_encoders_, unfuse_encoders_
from sparsenlp.prune.layers import prunable

BLOCKS = {"fp32": (8, 1), "bf16": (8, 2), "int8": (8, 4)}
"""Precision -> the block shape that it runs best with."""

INSIDE = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
"""Precision of the weights -> that of attention and activations in fused layers."""

LARGEST_ERROR = {True: 1e-4, False: 1e-3}
"""ours -> largest error in fp32 over the largest value."""

LEAST_COSINE = {True: {"bf16": 0.999, "int8": 0.995}, False: {"bf16": 0.99, "int8": 0.95}}
"""ours -> precision -> least cosine similarity. Other engines are to be right, but need not be as close."""

UNEVEN_DENSITY = (0.01, 0.40)
"""Least and most over the layers of the uneven model."""


def bert_base() -> nn.Module:
    """BERT-base, random weights."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def minilm() -> nn.Module:
    """MiniLM-L6; its weights where the package that has them is installed, else random ones."""
    from transformers import BertConfig, BertModel

    try:
        return BertModel.from_pretrained(minilm_directory(), dtype=torch.float32)
    except ModuleNotFoundError:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        return BertModel(BertConfig(**sizes))


def distilbert() -> nn.Module:
    """DistilBERT, random weights."""
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig())


def tiny_bert() -> nn.Module:
    """Two layers of BERT, to see that the benchmark runs."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(vocab_size=1000, **sizes))


def hollow(model: Any) -> nn.Module:
    """A model like this one, but eight features wide, which one head sees."""
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.hidden_size, config.intermediate_size = 1, 8, 8
    return type(model)(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT-base": bert_base,
    "MiniLM-L6": minilm,
    "DistilBERT": distilbert,
    "tiny": tiny_bert,
}


def build(name: str) -> nn.Module:
    """A float32 model of MODELS in eval mode, the same one every time.

    Biases and norms that stand at zero and one are moved off them: an engine that forgets one is to be found out.
    """
    with torch.random.fork_rng([]), torch.no_grad(), silent_transformers():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.unique().numel() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@dataclass(frozen=True, order=True)
class Setting(FullSetting):
    """`batch` sequences of `tokens` tokens; with `ragged` that is the longest one, and the others are padded."""

    ragged: bool = False

    def __str__(self) -> str:
        return f"{super().__str__()}{' ragged' if self.ragged else ''}"


def make_inputs(model: nn.Module, setting: Setting) -> Inputs:
    """Token ids and mask, each (batch, tokens) int64, the same at every call.

    Ragged lengths are those of film reviews, in proportion to the longest one of the batch. Raises
    ModuleNotFoundError if the corpus is absent.
    """
    found = random_inputs(model, setting)
    if setting.ragged:
        texts = rotten_tomatoes()[0].texts[: setting.batch]
        words = torch.tensor([len(text.split()) for text in texts])
        lengths = (words * setting.tokens / words.max()).ceil().long()
        found["attention_mask"] = (torch.arange(setting.tokens) < lengths[:, None]).long()
        found["input_ids"] = found["input_ids"] * found["attention_mask"]
    return found


@torch.no_grad()
def masked(model: nn.Module, sparsity: float, block: tuple[int, int]) -> nn.Module:
    """A copy with random blocks of every layer of the encoder set to zero, the same fraction everywhere."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for layer in prunable(model).values() if sparsity else ():
        _keep_best(layer, torch.rand(_blocks(layer, block), generator=generator), 1 - sparsity)
    return model


@torch.no_grad()
def unevenly_masked(model: nn.Module, block: tuple[int, int]) -> nn.Module:
    """A copy whose layers keep from 1 to 40 % of their blocks, and whose rows and columns are uneven as well.

    As in a model that was pruned by one ranking of all its weights: some neurons keep nothing.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    layers = list(prunable(model).values())
    low, high = UNEVEN_DENSITY
    densities = torch.logspace(0, 1, len(layers), base=high / low) * low
    shuffled = densities[torch.randperm(len(layers), generator=generator)].tolist()
    for density, layer in zip(shuffled, layers, strict=True):
        blocks = _blocks(layer, block)
        rows, columns = (torch.randn(size, generator=generator).exp() for size in blocks)
        _keep_best(layer, torch.rand(blocks, generator=generator) * rows[:, None] * columns, density)
    return model


def _blocks(layer: nn.Linear, block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks."""
    return layer.out_features // block[0], layer.in_features // block[1]


def _keep_best(layer: nn.Linear, scores: Tensor, density: float) -> None:
    """Set to zero all but a fraction of the blocks, those with the highest scores (one for each block)."""
    pruned = min(round((1 - density) * scores.numel()), scores.numel() - 1)
    mask = scores > scores.flatten().kthvalue(pruned).values if pruned else torch.ones_like(scores, dtype=torch.bool)
    n, k = layer.out_features // scores.shape[0], layer.in_features // scores.shape[1]
    layer.weight.unflatten(1, (-1, k)).unflatten(0, (-1, n)).mul_(mask[:, None, :, None])


def sparse(model: nn.Module, precision: str) -> nn.Module:
    """A copy of a masked float32 model with SparseLinear layers in a precision of BLOCKS; dense if it has no zeros."""
    model = copy.deepcopy(model)
    layers = prunable(model)
    if any(bool((layer.weight == 0).any()) for layer in layers.values()):
        new = {layer: SparseLinear.from_dense(layer, BLOCKS[precision]) for layer in layers.values()}
        replace_modules(model, {a: b.quantize() if precision == "int8" else b for a, b in new.items()})
    return model.to(torch.bfloat16) if precision == "bf16" else model


def fused(model: nn.Module, precision: str) -> nn.Module:
    """The model with its encoder layers and embeddings fused, in place."""
    fuse_encoders_(model, precision=INSIDE[precision])
    return model


@torch.inference_mode(False)
def converted(model: nn.Module, precision: str) -> nn.Module:
    """Ours, with the weights of a masked float32 model in a precision of BLOCKS."""
    return fused(sparse(model, precision), precision)


@lru_cache(maxsize=2)
def load(name: str) -> nn.Module:
    """A model of MODELS, or the dense float32 twin of the encoder in a sparse model's directory.

    It is shared between calls: copy it before you change it. Raises CheckpointError for a directory that cannot be
    read, ValueError for one without sparse layers.
    """
    if name in MODELS:
        return build(name)
    model = from_pretrained(name).eval()
    unfuse_encoders_(model)
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ValueError(f"--model: expected a model with sparse layers, got none in {name}")
    twin = dense_twin(model).float()
    return getattr(twin, twin.base_model_prefix, twin)


def hidden_states(output: Any) -> Tensor:
    """(batch, tokens, hidden) float32 of what an encoder returns."""
    return (output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]).float()


def deviation(y: Tensor, expected: Tensor, mask: Tensor) -> dict[str, float]:
    """How far hidden states are from the expected ones, real tokens only.

    error   largest, over the largest expected value
    cosine  of all values taken as one vector
    """
    got, wanted = y.float()[mask.bool()].double(), expected.float()[mask.bool()].double()
    error = (got - wanted).abs().max() / wanted.abs().max()
    return {"error": float(error), "cosine": float(torch.cosine_similarity(got.flatten(), wanted.flatten(), 0))}


def fault(found: dict[str, float], precision: str, ours: bool) -> str | None:
    """What is wrong with a `deviation`, None if nothing is; a NaN is wrong."""
    if precision == "fp32":
        bound = LARGEST_ERROR[ours]
        return None if found["error"] <= bound else f"expected an error of at most {bound:g}, got {found['error']:.2g}"
    least = LEAST_COSINE[ours][precision]
    return None if found["cosine"] >= least else f"expected a cosine of at least {least:g}, got {found['cosine']:.4f}"

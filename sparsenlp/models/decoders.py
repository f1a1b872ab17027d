"""Decoder language models of transformers whose layers run as one op: which modules play which part, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_outputs
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from .. import native
from ..layers.composite import replace_modules
from ..layers.decoder import DecoderLayerModules, DecoderStack, FewTokenLinear
from ..ops.decoder_layers import NATIVE_DTYPES
from .families import BLOCK_SPARSE
from .instance_forward import InstanceForward
from .kv_cache import advance, reserve

MOST_TOKENS = 256
"""Forwards of more tokens (batch * length) run as before: by 512 torch's attention makes up for the rest."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length

CAPTURING = "transformers.utils.output_capturing"
"""Hooks from there stay for good after hidden states were asked for once, and do nothing unless they are again."""


@dataclass(frozen=True)
class DecoderFamily:
    """Where a family keeps its modules, as dotted names: in the base model, and `inputs` to `norm2` in each layer.

    rope        gives cosines and sines, for models with rotary positions; else `positions` embeds them
    activation  name of the configuration's field
    eps         likewise
    output      class of the base model's output
    neurons     field that counts the neurons before `down`
    free_heads  the configuration may have any number of heads beside `head_dim`
    """

    inputs: tuple[str, ...]
    output_projection: str
    up: str
    down: str
    norm1: str
    norm2: str
    gate: str | None = None
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    rope: str | None = None
    positions: str | None = None
    activation: str = "hidden_act"
    eps: str = "rms_norm_eps"
    output: str = "BaseModelOutputWithPast"
    neurons: str = "intermediate_size"
    free_heads: bool = False


LLAMA = DecoderFamily(
    inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output_projection="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    rope="rotary_emb",
    free_heads=True,
)
GPT2 = DecoderFamily(
    inputs=("attn.c_attn",),
    output_projection="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm1="ln_1",
    norm2="ln_2",
    layers="h",
    embedding="wte",
    norm="ln_f",
    positions="wpe",
    activation="activation_function",
    eps="layer_norm_epsilon",
    output="BaseModelOutputWithPastAndCrossAttentions",
    neurons="n_inner",
)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2}
"""By `config.model_type`."""


def fuse_decoder_(model: nn.Module) -> nn.Module:
    """Run the decoder layers of a transformers model as one op where that is possible, on this instance only.

    The modules stay as and where they are: the state dict, saving and training do not change, and weights may. Only
    the forward of the base model is replaced, and that of a dense language-model head (see FewTokenLinear). It falls
    back to the original one when gradients are enabled, in training mode, with hooks inside, under autocast, for more
    than MOST_TOKENS tokens or those of a sliding window, with a cache that is not a DynamicCache, and for any argument
    that it does not know.
    `generate` works as before (greedy, sampling, beams).

    returns  `model`

    Raises ValueError for a family that is not in FAMILIES, another dtype than float32 and bfloat16, an unknown
    activation or kind of rotary positions, and a linear layer that is neither nn.Linear nor SparseLinear (for GPT-2
    see `conv1d_to_linear_`).
    """
    base = _base(model)
    forward = DecoderForward(base)
    forward.stack = forward.build()
    base.forward = forward
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is nn.Linear:
        head.__dict__["forward"] = FewTokenLinear(head)
    return model


def unfuse_decoder_(model: nn.Module) -> nn.Module:
    """Undo `fuse_decoder_`; returns `model`, which may never have been fused."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), DecoderForward | FewTokenLinear):
            del module.forward
    return model


def has_fused_decoder(model: nn.Module) -> bool:
    """Whether `fuse_decoder_` was here."""
    return any(isinstance(module.__dict__.get("forward"), DecoderForward) for module in model.modules())


def conv1d_to_linear_(model: nn.Module) -> nn.Module:
    """Replace every Conv1D (GPT-2's linear layers, weight (K, N)) by an nn.Linear, which pruning and conversion know.

    The state dict of the model keeps its layout: weights are transposed on their way in and out. The bias Parameters
    are shared with the old layers, the weights are new Parameters. Returns `model`.
    """
    linears: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if type(module) is Conv1D and module not in linears:
            linear = nn.Linear(module.nx, module.nf, device="meta")
            weight = module.weight
            linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
            linear.bias = module.bias
            linear._register_state_dict_hook(_transpose_saved)
            linear.register_load_state_dict_pre_hook(_transpose_loaded)
            linears[module] = linear.train(module.training)
    replace_modules(model, linears)
    return model


def _transpose_saved(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    if (key := f"{prefix}weight") in state:
        state[key] = state[key].t().contiguous()


def _transpose_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if (key := f"{prefix}weight") in state:
        state[key] = state[key].t()


def _base(model: nn.Module) -> Any:
    base: Any = getattr(model, "base_model", model)
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"fuse_decoder_: expected a model of {', '.join(FAMILIES)}, got {kind or type(model).__name__}"
        )
    return base


class DecoderForward(InstanceForward):
    """The forward of a fused base model. What it needs beside the model itself is built when it is needed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        self.stack: DecoderStack | None = None
        self.rope: _Rope | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.stack, self.rope = state["model"], None, None

    def __getattr__(self, name: str) -> Any:
        if name == "family":  # after unpickling or copying, when the model was not there yet
            self.family = FAMILIES[self.model.config.model_type]
            return self.family
        raise AttributeError(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and "input_ids" not in kwargs:
            output = self._fused(input_ids=args[0], **kwargs)
        else:
            output = None if args else self._fused(**kwargs)
        return self.original(*args, **kwargs) if output is None else output

    def build(self) -> DecoderStack:
        """Find the modules and tensors. Raises ValueError where the layers cannot be fused."""
        model, config, family = self.model, self.model.config, self.family
        name = getattr(config, family.activation)
        if name not in ACTIVATIONS:
            raise ValueError(f"fuse_decoder_: expected an activation among {', '.join(ACTIVATIONS)}, got {name!r}")
        if family.rope and (kind := config.rope_parameters["rope_type"]) not in FIXED_ROPE:
            raise ValueError(f"fuse_decoder_: expected rope_type among {', '.join(FIXED_ROPE)}, got {kind!r}")
        if getattr(config, "add_cross_attention", False):
            raise ValueError("fuse_decoder_: expected a decoder without cross-attention")
        if config._attn_implementation == BLOCK_SPARSE:
            raise ValueError("fuse_decoder_: expected dense attention, got block-sparse attention")
        layers = [self._modules(layer) for layer in model.get_submodule(family.layers)]
        attention: list[Any] = [layer.layer.get_submodule(family.inputs[0].rpartition(".")[0]) for layer in layers]
        heads, scales = config.num_attention_heads, {module.scaling for module in attention}
        if len(scales) != 1:
            raise ValueError(f"fuse_decoder_: expected one scale of the scores in all layers, got {sorted(scales)}")
        stack = DecoderStack(
            layers,
            model.get_submodule(family.norm),
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=attention[0].head_dim,
            heads=heads,
            scale=scales.pop(),
            activation=ACTIVATIONS[name],
            eps=getattr(config, family.eps),
        )
        if (dtype := stack.dtype) not in NATIVE_DTYPES:
            raise ValueError(f"fuse_decoder_: expected weights in float32 or bfloat16, got {dtype}")
        return stack

    def _modules(self, layer: nn.Module) -> DecoderLayerModules:
        get, family = layer.get_submodule, self.family
        return DecoderLayerModules(
            layer=layer,
            inputs=tuple(map(get, family.inputs)),
            output=get(family.output_projection),
            up=get(family.up),
            down=get(family.down),
            norm1=get(family.norm1),
            norm2=get(family.norm2),
            gate=get(family.gate) if family.gate else None,
        )

    def _ready(self) -> DecoderStack | None:
        """The stack, if it serves the model as it is now."""
        stack = self.stack  # other threads may replace it
        if stack is None or not stack.unchanged():
            try:
                stack = self.build()
            except ValueError:
                stack = None
            self.stack = stack
        if stack is None or any(hook.__module__ != CAPTURING for hook in stack.hooks()):
            return None
        return stack

    def _fused(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        """The output, or None where the original forward has to do it."""
        model, config, family = self.model, self.model.config, self.family
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            torch.is_grad_enabled()
            or model.training
            or torch.compiler.is_compiling()
            or given is None
            or (input_ids is not None) == (inputs_embeds is not None)
            or not given.is_cpu
            or given.dim() < 2
            or not 0 < given.shape[0] * given.shape[1] <= MOST_TOKENS
            or any(value is not None and value is not False for value in others.values())
            or config.output_hidden_states
            or config.output_attentions
            or torch.is_autocast_enabled("cpu")
            or not native.available
            or (stack := self._ready()) is None
        ):
            return None
        batch, length = given.shape[:2]
        use_cache = config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=config)
        window = self._window()
        if past_key_values is None:
            if window is not None and length > window:
                return None
            data, past = stack.new_cache(batch, length), 0
        else:
            reserved = reserve(past_key_values, stack, batch, length, window)
            if reserved is None:
                return None
            data, past = reserved
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                return None
            mask = attention_mask.to(torch.bool).contiguous()
        if position_ids is None:
            position_ids = torch.arange(past, past + length).expand(batch, length)
        elif position_ids.shape not in ((batch, length), (1, length)):
            return None
        x = model.get_submodule(family.embedding)(input_ids) if inputs_embeds is None else inputs_embeds
        if family.positions:
            x = x + model.get_submodule(family.positions)(position_ids)
        if x.dtype != stack.dtype:
            return None
        rope = positions = None
        if family.rope:
            positions = position_ids.expand(batch, length).contiguous()
            rope = self._rope(int(positions.max()) + 1)
        hidden = stack(x, data, past, rope, positions, mask)
        if past_key_values is not None:
            advance(past_key_values, past + length)
        output = getattr(modeling_outputs, family.output)
        return output(last_hidden_state=hidden, past_key_values=past_key_values if use_cache else None)

    def _window(self) -> int | None:
        """The tokens that a layer attends to at most, by position; None: all."""
        if not getattr(self.model, "has_sliding_layers", True):
            return None
        return getattr(self.model.config, "sliding_window", None)

    def _rope(self, positions: int) -> Tensor:
        """Cosines and sines of at least so many positions, from the model's own module; kept until it changes."""
        module = self.model.get_submodule(self.family.rope)
        frequencies = module._buffers["inv_freq"]
        rope = self.rope  # other threads may replace it
        if rope is None or not rope.serves(frequencies, positions):
            count = max(positions, min(2 * positions, self.model.config.max_position_embeddings))
            cos, sin = module(torch.empty(1, dtype=torch.float32), torch.arange(count)[None])
            half = cos.shape[-1] // 2
            table = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1).contiguous()
            self.rope = rope = _Rope(table, frequencies, frequencies.clone())
        return rope.table


@dataclass(frozen=True, eq=False)
class _Rope:
    """A table of cosines and sines, and the frequencies that it was made from: the tensor, and what it held."""

    table: Tensor
    frequencies: Tensor
    values: Tensor

    def serves(self, frequencies: Tensor, positions: int) -> bool:
        return (
            positions <= self.table.shape[0]
            and self.frequencies is frequencies
            and torch.equal(self.values, frequencies)
        )

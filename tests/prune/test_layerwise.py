import copy

import pytest
import torch
from torch import nn

from sparsenlp.data import demo
from sparsenlp.prune import (
    NM,
    Block,
    Unstructured,
    finalize_,
    find_blocks,
    layer_sparsity,
    masked_layers,
    prunable,
    prune_,
    sparsegpt_,
    wanda_,
)

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VOCABULARY = 50


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SIZES, **options)
    return transformers.LlamaForCausalLM(config).eval()


def gemma():
    """Its blocks take different masks and rotary positions in turn."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, sliding_window=4, pad_token_id=0, **SIZES
    )
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3ForCausalLM(config).eval()


def t5():
    """Its first block makes the position bias that the others take."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()


MODELS = {"llama": llama, "gemma": gemma, "t5": t5, "bert": bert}


class Stack(nn.Module):
    """A model that no library knows: blocks that return tensors and add to their input in place."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x.add_(self.down(self.up(x).relu()))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.stages = nn.ModuleList([self.Layer() for _ in range(3)])

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return x


def token_batches(count=4, batch=8, length=12, padded=False):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        inputs = {"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
        if padded:
            lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
            inputs["attention_mask"] = (torch.arange(length) < lengths).long()
        batches.append(inputs)
    return batches


def hidden(model, batches):
    with torch.no_grad():
        return [model(**batch, output_hidden_states=True).hidden_states[-1] for batch in batches]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prune", [sparsegpt_, wanda_])
def test_models_are_pruned_to_the_pattern(prune, name):
    model = MODELS[name]()
    expected = prunable(model).keys()
    for pattern in (Unstructured(), NM(2, 4), Block(4, 1)):
        pruned = copy.deepcopy(model)
        sparsities = prune(pruned, token_batches(padded=True), pattern, 0.5)
        assert sparsities == dict.fromkeys(expected, 0.5)
        assert masked_layers(pruned).keys() == expected
        assert layer_sparsity(finalize_(pruned)) == sparsities
        if isinstance(pattern, NM):
            for layer in prunable(pruned).values():
                assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("name", MODELS)
def test_each_block_sees_what_the_pruned_blocks_make_of_the_data(name, monkeypatch):
    """The gram of a late layer, recomputed with hooks on a forward pass of the whole model in which all before it are
    pruned, is what its solver was given."""
    from sparsenlp.prune import layerwise

    model, batches = MODELS[name](), token_batches(padded=True)
    given = []
    solver = layerwise.sparsegpt

    def spy(weight, gram, **options):
        given.append(gram.clone())
        return solver(weight, gram, **options)

    monkeypatch.setattr(layerwise, "sparsegpt", spy)
    dense = copy.deepcopy(model)
    sparsegpt_(model, batches, Unstructured(), 0.5)
    blocks = dict(model.named_modules())[find_blocks(dense, prunable(dense))]
    names = list(prunable(model))
    inside = {m for m in blocks[-1].modules() if isinstance(m, nn.Linear)}
    first = next(i for i, layer in enumerate(prunable(model).values()) if layer in inside)
    grams = []

    def hook(module, args):
        keep = batch["attention_mask"].bool()
        rows = args[0][keep] if args[0].shape[:2] == keep.shape else args[0].flatten(0, -2)
        grams.append(rows.t() @ rows)

    handle = prunable(model)[names[first]].register_forward_pre_hook(hook)
    base = model.base_model
    with torch.no_grad():
        for batch in batches:
            base(**batch)
    handle.remove()
    torch.testing.assert_close(given[first], torch.stack(grams).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 1)], ids=str)
def test_outputs_change_less_than_by_wanda_and_magnitude(pattern):
    """Activations of a few directions, as trained models have them."""
    model, batches = llama(), token_batches(8)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(VOCABULARY, 4) @ torch.randn(4, 16))
    expected = torch.cat(hidden(model, batches))
    errors = {}
    for method, prune in {
        "sparsegpt": sparsegpt_,
        "wanda": wanda_,
        "magnitude": lambda m, _, *rest: prune_(m, *rest),
    }.items():
        pruned = copy.deepcopy(model)
        prune(pruned, batches, pattern, 0.5)
        errors[method] = (torch.cat(hidden(pruned, batches)) - expected).square().mean().item()
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(8, 1)], ids=str)
def test_minilm_is_reconstructed_best_by_sparsegpt_and_worst_by_magnitude(pattern):
    try:
        folder = demo.minilm_directory()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model = transformers.AutoModel.from_pretrained(folder, num_hidden_layers=1).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = list(tokenizer.get_vocab())
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(2000, 12000, (60,), generator=generator)) for _ in range(32)]
    batches = [dict(tokenizer(texts[i : i + 16], return_tensors="pt", padding=True)) for i in range(0, 32, 16)]
    expected = hidden(model, batches)
    errors = []
    for prune in (sparsegpt_, wanda_, lambda m, _, *rest: prune_(m, *rest)):
        pruned = copy.deepcopy(model)
        prune(pruned, batches, pattern, 0.5)
        pairs = zip(hidden(pruned, batches), expected, batches, strict=True)
        errors.append(sum((new - old)[b["attention_mask"].bool()].square().sum().item() for new, old, b in pairs))
    assert errors[0] < errors[1] < errors[2]


def test_padding_does_not_count():
    batches = token_batches(padded=True)
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    first, second = bert(), bert()
    sparsegpt_(first, batches, Unstructured(), 0.5)
    sparsegpt_(second, other, Unstructured(), 0.5)
    assert_untouched(first, state(second))


def test_unknown_models_work_by_their_longest_list():
    model = Stack()
    assert find_blocks(model, prunable(model)) == "stages"
    data = torch.randn(64, 4)
    inputs = data.clone()
    sparsities = sparsegpt_(model, [data], Block(4, 1), 0.5)
    assert sparsities.keys() == prunable(model).keys() - {"first"}
    assert set(sparsities.values()) == {0.5}
    assert torch.equal(data, inputs)
    named = Stack()
    assert sparsegpt_(named, [data], Block(4, 1), 0.5, blocks="stages") == sparsities
    assert_untouched(named, state(model))


def test_a_second_call_tightens():
    model, batches = llama(), token_batches()
    wanda_(model, batches, Unstructured(), 0.25)
    first = {name: layer.weight != 0 for name, layer in masked_layers(model).items()}
    sparsegpt_(model, batches, Unstructured(), 0.5)
    for name, layer in masked_layers(model).items():
        assert not ((layer.weight != 0) & ~first[name]).any()
    assert set(layer_sparsity(model).values()) == {0.5}


def test_filter_fn_and_progress():
    model, seen = llama(), []
    sparsities = wanda_(
        model,
        token_batches(),
        Unstructured(),
        0.5,
        filter_fn=lambda _, name: "layers.1.mlp" in name,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert all("layers.1.mlp" in name for name in sparsities)
    assert len(sparsities) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_modes_and_the_cache_are_as_before():
    model = llama().train()
    model.model.layers[1].eval()
    wanda_(model, token_batches(), Unstructured(), 0.5)
    assert model.training
    assert not model.model.layers[1].training
    assert model.config.use_cache


class Failing(nn.Linear):
    """Fails when it has run `after` times."""

    after = 0

    def forward(self, x):
        self.after -= 1
        if self.after < 0:
            raise MemoryError("no more")
        return super().forward(x)


def failing_llama():
    """Survives the capture, and then fails in the last block."""
    model = llama()
    layer = model.model.layers[2].mlp.up_proj
    layer.__class__, layer.after = Failing, 4
    return model


@pytest.mark.parametrize("masked", [False, True])
def test_a_failure_half_way_undoes_all(masked):
    model = failing_llama()
    if masked:
        prune_(model, Unstructured(), 0.25)
    before = state(model)
    with pytest.raises(MemoryError, match="no more"):
        sparsegpt_(model, token_batches(), Unstructured(), 0.5)
    assert_untouched(model, before)


def test_without_rollback_the_error_says_what_is_done():
    model = failing_llama()
    before = state(llama())
    with pytest.raises(RuntimeError, match=r"sparsegpt_: expected to prune 3 blocks, got to 2; .* untouched: no more"):
        sparsegpt_(model, token_batches(), Unstructured(), 0.5, rollback=False)
    names = masked_layers(model).keys()
    assert names == {name for name in prunable(model) if "layers.2" not in name}
    finalize_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "layers.2" in name)


def poisoned():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def tied():
    model = llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def repeated():
    model = Stack()
    model.stages[2] = model.stages[0]
    return model


def masked():
    model = llama()
    prune_(model, Block(4, 1), 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (llama, {"sparsity": 1.5}, "sparsity: expected a fraction"),
        (llama, {"pattern": Block(3, 1)}, "sparsegpt_: model.layers.0.self_attn.q_proj: 3x1: expected a shape"),
        (llama, {"batches": []}, "expected at least 32 tokens of calibration data, .* got 0"),
        (llama, {"batches": token_batches(1, 1, 31)}, "sparsegpt_: expected at least 32 tokens .* got 31"),
        (llama, {"blocks": "model.nothing"}, "expected the name of an nn.ModuleList, got model.nothing"),
        (llama, {"filter_fn": lambda _, name: name == "lm_head"}, "expected an nn.ModuleList of blocks with layers"),
        (llama, {"dampening": -1.0}, "model.layers.0.self_attn.q_proj: sparsegpt: expected a dampening"),
        (masked, {}, "expected pattern 4x1, which .* has been pruned to, got unstructured"),
        (tied, {}, "expected weights of their own, got model.layers.2.mlp.up_proj tied to model.layers.0.mlp.up_proj"),
        (poisoned, {}, "expected finite activations, got NaN or infinite ones before block 2 in batch 0"),
        (repeated, {"batches": [torch.randn(64, 4)]}, "expected each block to run once"),
    ],
)
def test_errors_leave_the_model_untouched(make, arguments, message):
    model = make()
    before = {name: tensor.nan_to_num(7) for name, tensor in state(model).items()}
    arguments = {"batches": token_batches(), "pattern": Unstructured(), "sparsity": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        sparsegpt_(model, **arguments)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(7), before[name]) for name in before)


def test_blocks_that_are_no_chain_are_refused():
    class Skipping(Stack):
        def forward(self, x):
            x = self.first(x)
            return self.stages[2](self.stages[1](self.stages[0](x)) + 1)

    model = Skipping()
    with pytest.raises(ValueError, match="expected block 2 to take the output of the one before"):
        sparsegpt_(model, [torch.randn(64, 4)], Unstructured(), 0.5)
    assert_untouched(model, state(Stack()))

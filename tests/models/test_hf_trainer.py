"""transformers' Trainer saves, resumes and chooses the best of sparse models."""

import json

import pytest
import torch

from sparsenlp import SparseLinear, SparsifyConfig, from_pretrained, sparsify_
from sparsenlp.prune import Block, finalize_, prune_

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
DATA = [{"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 2)} for i in range(8)]


def sparse_model(fuse):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    prune_(model, Block(8, 1), 0.7)
    sparsify_(finalize_(model), SparsifyConfig(measure="off", fuse=fuse))
    return model


def trainer(model, directory, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        logging_strategy="no",
        seed=0,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("fuse", [False, True])
def test_resuming_gives_the_model_of_an_uninterrupted_run(fuse, tmp_path):
    whole = sparse_model(fuse)
    trainer(whole, tmp_path / "whole", max_steps=4, save_strategy="no").train()
    trainer(sparse_model(fuse), tmp_path / "parts", max_steps=4, save_steps=2).train()
    resumed = sparse_model(fuse)
    logits(resumed)
    trainer(resumed, tmp_path / "parts", max_steps=4, save_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2")
    )
    assert torch.equal(logits(resumed), logits(whole))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = sparse_model(fuse=False)
    run = trainer(
        model,
        tmp_path,
        max_steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    run.train()
    best = from_pretrained(run.state.best_model_checkpoint)
    assert any(isinstance(module, SparseLinear) for module in best.modules())
    assert torch.equal(logits(best), logits(model))
    run.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final/config.json").read_text())["quantization_config"]["modules"]
    assert torch.equal(logits(from_pretrained(tmp_path / "final")), logits(model))

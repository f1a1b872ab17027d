import json
import os
import re
import signal
from dataclasses import dataclass

import pytest
import torch
from tiny_bert import save_tiny_bert, write_table
from typer.testing import CliRunner

import sparsenlp
from sparsenlp import SparseLinear, convert, native, native_cuda
from sparsenlp.cli import app
from sparsenlp.convert import SparsifyConfig

VERBS = ("info", "demo", "train", "prune", "eval", "bench")


@dataclass(frozen=True)
class Unmeasured(SparsifyConfig):
    """Layers as small as those here may well be faster dense."""

    measure: str = "off"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(convert, "SparsifyConfig", Unmeasured)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    save_tiny_bert(directory / "model")
    save_tiny_bert(directory / "encoder", head=False)
    write_table(directory / "train.csv")
    write_table(directory / "test.csv", 32, seed=1)
    return directory


@pytest.fixture(scope="module")
def sparse(files):
    """Directory of a sparse checkpoint."""
    patch = pytest.MonkeyPatch()
    patch.setattr(convert, "SparsifyConfig", Unmeasured)
    assert invoke("prune", files / "model", files / "sparse", "--sparsity", "0.5").exit_code == 0
    patch.undo()
    return files / "sparse"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failure(*arguments, code=2):
    """The one line on standard error of a command that fails."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("sparsenlp: ")
    return lines[0].removeprefix("sparsenlp: ")


def succeed(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


# info and help


def test_info_lists_isa_and_backends():
    text = succeed("info").stdout
    assert sparsenlp.__version__ in text
    assert native.isa() or native.why_unavailable in text
    for op in ("bsr_linear", "decoder_layers", "nm_linear"):
        assert f"{op}, native" in text
    assert "bsr_linear, reference" in text


def test_info_names_the_kernels_under_a_cap(needs_native):
    with native.isa_cap("scalar"):
        data = json.loads(succeed("info", "--json").stdout)
    assert data["ops"]["bsr_linear"]["native"] == "weights of float32 on scalar, bfloat16 on scalar, int8 on scalar"


def test_info_says_why_a_backend_is_unavailable(monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "no compiler")
    data = json.loads(succeed("info", "--json").stdout)
    assert data["ops"]["bsr_linear"]["native"] == "unavailable: no compiler"


def test_info_says_why_there_are_no_cuda_kernels(monkeypatch):
    monkeypatch.setattr(native_cuda, "available", False)
    monkeypatch.setattr(native_cuda, "why_unavailable", "no nvcc")
    data = json.loads(succeed("info", "--json").stdout)
    assert data["ops"]["nm_linear"]["cuda"] == "unavailable: no nvcc"


def test_info_without_transformers(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from sparsenlp.cli import info

    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(info, "version", absent)
    assert "not installed; pip install 'sparsenlp[hf]'" in succeed("info").stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    assert "--help" in succeed(verb, "--help").stdout


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "info"])
def test_help_shows_an_example(verb):
    assert f"sparsenlp {verb} " in succeed(verb, "--help").stdout


def test_version():
    assert succeed("--version").stdout.strip() == f"sparsenlp {sparsenlp.__version__}"


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune"], "Missing argument 'model'. (see sparsenlp prune --help)"),
        (["info", "--nothing"], "No such option: --nothing (see sparsenlp info --help)"),
        (["nothing"], "No such command 'nothing'. (see sparsenlp --help)"),
        (["--nothing"], "No such option: --nothing (see sparsenlp --help)"),
    ],
)
def test_usage_errors_take_one_line(arguments, message):
    def plain(text):
        return text.replace("'", "").replace("MODEL", "model").replace("root", "sparsenlp")

    assert plain(failure(*arguments)) == plain(message)


def test_an_unexpected_error_takes_one_line_and_can_be_traced(monkeypatch):
    from sparsenlp.cli import info

    def broken():
        raise KeyError("lost")

    monkeypatch.setattr(info, "collect", broken)
    assert failure("info", code=1) == "unexpected KeyError: 'lost'; sparsenlp --traceback ... shows where it arose"
    assert isinstance(invoke("--traceback", "info").exception, KeyError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.0"], "sparsity: expected a fraction from 0 to below 1, got 1.0"),
        (["--sparsity", "0"], "sparsity: expected more than 0 where nothing is removed whole, got 0"),
        (["--pattern", "blocks"], "pattern: expected "),
        (["--pattern", "5x1"], "prune_: bert.encoder.layer.0.attention.self.query: 5x1: expected a shape divisible"),
        (["--criterion", "luck"], "criterion: expected one of"),
        (["--scope", "solar"], "scope: expected one of"),
        (["--text-column", "body"], 'load_table: expected a column "body"'),
        (["--label-column", "class"], 'load_table: expected a column "class"'),
        (["--test", "{files}/none.csv"], "load_table: cannot read"),
        (["--data", "{files}/none.csv"], "load_table: cannot read"),
        (["--data", "{files}/model/config.json"], "load_table: expected a .csv, .tsv or .jsonl file"),
    ],
)
def test_prune_refuses_bad_input_before_it_trains(files, tmp_path, options, message):
    options = [option.format(files=files) for option in options]
    data = [] if "--data" in options else ["--data", files / "train.csv"]
    test = [] if "--test" in options else ["--test", files / "test.csv"]
    assert failure("prune", files / "model", tmp_path / "out", *data, *test, *options).startswith(message)
    assert not (tmp_path / "out").exists()


def test_prune_refuses_labels_that_the_model_does_not_know(files, tmp_path):
    other = write_table(tmp_path / "other.csv", names=("no", "yes"))
    message = failure("prune", files / "model", tmp_path / "out", "--data", other)
    assert message.startswith("labels: expected the model's classes bad, good, got no, yes")


def test_prune_refuses_a_test_label_never_seen(files, tmp_path):
    other = write_table(tmp_path / "other.csv", names=("bad", "ugly"))
    arguments = ("--data", files / "train.csv", "--test", other)
    message = failure("prune", files / "model", tmp_path / "out", *arguments)
    assert message == 'labels: expected one of bad, good, got "ugly" in row 2'


def test_prune_refuses_a_class_that_is_only_tested(files, tmp_path):
    train = tmp_path / "train.csv"
    train.write_text("text,label\ngood1,good\n", encoding="utf-8")
    message = failure("prune", files / "model", tmp_path / "out", "--data", train, "--test", files / "test.csv")
    assert message == 'labels: expected one of good, got "bad" in row 1'


def test_prune_refuses_outputs_that_would_destroy_something(files, tmp_path):
    data = ("--data", files / "train.csv")
    (tmp_path / "file").write_text("kept")
    assert failure("prune", files / "model", tmp_path / "file", *data).startswith("output: expected a directory")
    assert (tmp_path / "file").read_text() == "kept"
    message = failure("prune", files / "model", files / "model", *data)
    assert message.startswith("output: expected another directory than the model's")


def test_prune_refuses_a_sparse_checkpoint(sparse, tmp_path):
    assert failure("prune", sparse, tmp_path / "out").startswith(
        "model: expected a dense model, got a sparse checkpoint"
    )


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_prune_refuses_what_needs_data_without_it(files, tmp_path, criterion):
    message = failure("prune", files / "model", tmp_path / "out", "--criterion", criterion)
    assert message.startswith(f"criterion: expected --data for {criterion}")


def test_prune_at_random_is_seeded(files, tmp_path):
    weights = []
    for seed in ("1", "1", "2"):
        output = tmp_path / str(len(weights))
        succeed("prune", files / "model", output, "--sparsity", "0.5", "--criterion", "random", "--seed", seed)
        weights.append([path.read_bytes() for path in sorted(output.glob("*.safetensors"))])
    assert weights[0]
    assert weights[0] == weights[1] != weights[2]


def test_prune_refuses_an_untrained_head_without_training(files, tmp_path):
    arguments = ("--data", files / "train.csv", "--test", files / "test.csv", "--finetune-epochs", "0")
    message = failure("prune", files / "encoder", tmp_path / "out", *arguments)
    assert message == "finetune-epochs: expected at least 1, as the model has no trained classification head, got 0"


@pytest.mark.parametrize("verb", ["prune", "eval", "bench"])
def test_a_model_that_is_not_there(files, tmp_path, verb):
    rest = {"prune": [tmp_path / "out"], "eval": ["--data", files / "test.csv"], "bench": []}[verb]
    missing = tmp_path / "missing"
    assert failure(verb, missing, *rest) == f"model: expected a directory, got {missing}"


def test_a_model_directory_without_a_model(files, tmp_path):
    assert failure("eval", tmp_path, "--data", files / "test.csv").startswith(f"model: cannot load {tmp_path}: ")


def test_a_damaged_checkpoint(files, sparse, tmp_path):
    for file in sparse.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    message = failure("eval", tmp_path, "--data", files / "test.csv")
    assert "expected a safetensors file" in message


def test_a_full_disk(files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsenlp.classifiers.save_pretrained", full)
    result = invoke("prune", files / "model", tmp_path / "out", "--sparsity", "0.5")
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == "sparsenlp: [Errno 28] No space left on device"


def test_missing_transformers(files, monkeypatch):
    monkeypatch.setattr("sparsenlp.classifiers.importlib.util.find_spec", lambda name: None)
    message = failure("eval", files / "model", "--data", files / "test.csv")
    assert message == "expected the package transformers, got none; pip install 'sparsenlp[hf]'"


# prune


def prune(files, output, model="model", *options):
    texts = ("--data", files / "train.csv", "--test", files / "test.csv")
    return invoke("prune", files / model, output, *texts, "--sparsity", "0.5", "--epochs", "1", *options)


def test_prune_writes_a_sparse_checkpoint(files, tmp_path):
    result = prune(files, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "fine-tuning" not in result.stderr
    assert re.search(r"50\.\d% of the weights of 12 pruned layers are zero; (\d+) of them are sparse", result.stdout)
    assert not (tmp_path / "out" / "work").exists()
    record = json.loads((tmp_path / "out" / "sparsenlp.json").read_text())
    assert record["quality"]["sparse"]["examples"] == 32
    assert record["quality"]["sparse"].keys() == record["quality"]["dense"].keys()
    assert len(record["plan"]["rows"]) == 14
    model = sparsenlp.from_pretrained(tmp_path / "out")
    sparse = [row["name"] for row in record["plan"]["rows"] if row["chosen"] != "dense"]
    assert sparse
    assert [name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)] == sparse


def test_prune_fine_tunes_an_encoder_and_keeps_the_names(files, tmp_path):
    options = ("--finetune-epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3")
    result = prune(files, tmp_path / "out", "encoder", *options)
    assert result.exit_code == 0, result.output
    assert "fine-tuning the dense model first: the model has no trained classification head" in result.stderr
    for directory in ("out", "out/work/dense"):
        config = json.loads((tmp_path / directory / "config.json").read_text())
        assert config["id2label"] == {"0": "bad", "1": "good"}
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["dense"]
    succeed("prune", tmp_path / "out" / "work" / "dense", tmp_path / "again", "--sparsity", "0.5")


def test_prune_holds_out_rows_without_a_test_file(files, tmp_path):
    result = invoke("prune", files / "model", tmp_path / "out", "--data", files / "train.csv", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "no --test: 6 of the 64 rows are held out for testing" in result.stderr


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_prune_at_once_keeps_the_kind_of_model(files, tmp_path, architecture):
    import transformers

    dense = getattr(transformers, architecture).from_pretrained(files / "encoder")
    dense.save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).write_bytes((files / "model" / name).read_bytes())
    result = succeed("prune", tmp_path / "dense", tmp_path / "out", "--sparsity", "0.5")
    assert re.search(r"50\.\d% of the weights of 12 pruned layers are zero", result.stdout)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]
    sparse = sparsenlp.from_pretrained(tmp_path / "out")
    assert type(sparse).__name__ == architecture
    pruned = {name for name, layer in sparse.named_modules() if isinstance(layer, SparseLinear)}
    kept = {name: tensor for name, tensor in dense.state_dict().items() if name.rpartition(".")[0] not in pruned}
    assert all(torch.equal(tensor, sparse.state_dict()[name]) for name, tensor in kept.items() if "layer" not in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "got BertForTokenClassification, which is for a label per"),
        ({"problem_type": "regression"}, "got BertForSequenceClassification, which is for regression"),
        ({"problem_type": "multi_label_classification"}, "which is for several labels per text"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "eval"])
def test_models_for_something_else_are_refused(files, tmp_path, verb, settings, message):
    model = tmp_path / "model"
    model.mkdir()
    for path in (files / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    options = [tmp_path / "out", "--finetune-epochs", "1"] if verb == "prune" else []
    refused = failure(verb, model, *options, "--data", files / "train.csv")
    assert refused.startswith("model: expected one class per text")
    assert message in refused
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([f"a,{i / 7:.2f}" for i in range(40)], "labels: expected classes, got 40 different numbers such as 0.14"),
        (["a,1"] * 40, "labels: expected at least 2 classes in"),
        ([f"a,{i}" for i in range(40)], "labels: expected classes of several texts in"),
        (["a,1", "b,0", "c,1"], "split: expected rows on both sides, got 3 for training, 0 for test"),
    ],
)
def test_labels_that_are_no_classes_are_refused(files, tmp_path, rows, message):
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["text,label", *rows]))
    for verb in (("prune", files / "model"), ("train", "--model", "textcnn")):
        assert failure(*verb, tmp_path / "out", "--data", data, "--epochs", "1").startswith(message)
        assert not (tmp_path / "out").exists()


def test_prune_at_once_warns(files, tmp_path):
    result = succeed("prune", files / "model", tmp_path / "out", "--sparsity", "0.5")
    assert "warning: no --data" in result.stderr
    assert json.loads((tmp_path / "out" / "sparsenlp.json").read_text())["quality"] == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_prune_resumes_after_ctrl_c(files, tmp_path, monkeypatch, number, code):
    import sparsenlp.train

    whole = sparsenlp.train.recover

    def interrupted(*arguments, **options):
        def stop(step):
            if step.step == 2:
                signal.raise_signal(number)

        return whole(*arguments, **options, on_step=stop)

    options = ("--batch-size", "8")
    with monkeypatch.context() as patch:
        patch.setattr(sparsenlp.train, "recover", interrupted)
        result = prune(files, tmp_path / "out", "model", *options)
    assert result.exit_code == code
    last = result.stderr.strip().splitlines()[-1]
    assert last == "sparsenlp: stopped; run the same command again to go on from there"
    assert os.listdir(tmp_path / "out") == ["work"]
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(sparsenlp.train, "recover", lambda *a, **o: steps.append(whole(*a, **o).steps))
        assert prune(files, tmp_path / "out", "model", *options).exit_code == 0
    assert steps == [14]  # 8 of 64 texts and 8 of as many spliced ones, less the 2 that were done
    assert not (tmp_path / "out" / "work").exists()


def test_prune_refuses_to_resume_another_run(files, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "recover.safetensors").write_bytes(b"nonsense")
    result = prune(files, tmp_path / "out", "model", "--work-dir", work)
    assert result.exit_code == 2
    assert "training state: expected a whole safetensors file" in result.stderr


# eval


def test_eval_of_a_dense_and_a_sparse_model(files, sparse):
    arguments = ("--data", files / "test.csv", "--against", files / "model")
    data = json.loads(succeed("eval", sparse, *arguments, "--json").stdout)
    assert data["examples"] == 32
    assert data["majority"] == 0.5
    assert data["cosine"] < 1
    same = json.loads(succeed("eval", files / "model", *arguments, "--json").stdout)
    assert same["accuracy"] == same["against_accuracy"] == data["against_accuracy"]
    assert (same["agreement"], same["kl"]) == (1.0, pytest.approx(0, abs=1e-6))


def test_eval_prints_a_table(files):
    text = succeed("eval", files / "model", "--data", files / "test.csv").stdout
    assert "majority class" in text
    assert "50.0%" in text


def test_eval_refuses_a_label_that_the_model_does_not_know(files, tmp_path):
    other = write_table(tmp_path / "other.csv", names=("bad", "ugly"))
    message = failure("eval", files / "model", "--data", other)
    assert message == 'labels: expected one of bad, good, got "ugly" in row 2'


def test_eval_of_classes_without_names(files, tmp_path):
    save_tiny_bert(tmp_path / "model", names=("LABEL_0", "LABEL_1"))
    result = succeed("eval", tmp_path / "model", "--data", files / "test.csv")
    assert "the model's classes have no names; taken to be bad, good, in this order" in result.stderr


def test_eval_of_some_classes_without_names(files, tmp_path):
    """Numbers are those of the outputs, also where the file has some of them only; text is not guessed."""
    names = tuple(f"LABEL_{i}" for i in range(3))
    save_tiny_bert(tmp_path / "model", names=names)
    accuracies = []
    for name, spelled in (("named", names[1:]), ("floats", ("1.0", "2.0")), ("ints", ("1", "2"))):
        data = write_table(tmp_path / f"{name}.csv", names=spelled)
        result = succeed("eval", tmp_path / "model", "--data", data, "--json")
        accuracies.append(json.loads(result.stdout)["accuracy"])
        said = "taken for those of its outputs; the data has 2 of the 3 classes" in result.stderr
        assert said == (name != "named")
    assert accuracies[0] == accuracies[1] == accuracies[2]
    message = failure("eval", tmp_path / "model", "--data", files / "test.csv")
    assert message.startswith("labels: expected all 3 classes for a model whose classes have no names, got bad, good")
    message = failure("eval", tmp_path / "model", "--data", write_table(tmp_path / "more.csv", names=("2", "3")))
    assert message.startswith("labels: expected numbers from 0 to 2 for a model whose classes have no names, got 2, 3")


def test_eval_compares_names_without_regard_to_case(files, tmp_path):
    data = write_table(tmp_path / "upper.csv", 32, seed=1, names=("BAD", "Good"))
    result = succeed("eval", files / "model", "--data", data, "--json")
    assert "warning: labels are compared without regard to case: BAD is bad, Good is good" in result.stderr
    plain = succeed("eval", files / "model", "--data", files / "test.csv", "--json")
    assert json.loads(result.stdout)["accuracy"] == json.loads(plain.stdout)["accuracy"]


def test_eval_judges_no_random_head(files, tmp_path):
    message = failure("eval", files / "encoder", "--data", files / "test.csv")
    assert "the model has no trained classification head; fine-tune it first" in message
    message = failure("eval", files / "model", "--data", files / "test.csv", "--against", files / "encoder")
    assert message.startswith(f"model: expected a trained classifier of these labels, got {files / 'encoder'}")


def test_eval_reads_the_texts_with_the_tokenizer_of_each_model(files, tmp_path):
    """The other model is the same one with its words in another order."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    count = len(tokenizer)
    turned = {word: i if i < 4 else count + 3 - i for word, i in data["model"]["vocab"].items()}
    data["model"]["vocab"] = turned
    other = save_tiny_bert(tmp_path / "other")
    weights = load_file(files / "model" / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    order = [i if i < 4 else count + 3 - i for i in range(count)]
    save_file(weights | {name: weights[name][order].contiguous()}, other / "model.safetensors", {"format": "pt"})
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(data))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(other)
    arguments = ("--data", files / "test.csv", "--against", other, "--json")
    found = json.loads(succeed("eval", files / "model", *arguments).stdout)
    assert found["agreement"] == 1
    assert found["cosine"] == pytest.approx(1, abs=1e-5)


def test_eval_refuses_another_order_of_classes(files, tmp_path):
    turned = save_tiny_bert(tmp_path / "turned", names=("good", "bad"))
    message = failure("eval", files / "model", "--data", files / "test.csv", "--against", turned)
    assert message == f"against: expected classes in the order of {files / 'model'}, got another in {turned}"


def test_texts_that_are_cut_are_told(files, tmp_path):
    result = succeed("eval", files / "model", "--data", files / "test.csv", "--max-length", "4")
    assert re.search(r"^\d+ of the 32 texts are cut to 4 tokens$", result.stderr, re.MULTILINE)
    result = prune(files, tmp_path / "out", "model", "--max-length", "4")
    assert re.search(r"^\d+ of the 64 training texts are cut to 4 tokens$", result.stderr, re.MULTILINE)
    assert re.search(r"^\d+ of the 32 test texts are cut to 4 tokens$", result.stderr, re.MULTILINE)


def test_eval_refuses_models_with_other_classes(files, tmp_path):
    save_tiny_bert(tmp_path / "three", names=("bad", "good", "ugly"))
    arguments = ("--data", files / "test.csv", "--against", tmp_path / "three")
    message = failure("eval", files / "model", *arguments)
    assert message == "judge: expected reference logits of shape [32, 2], got [32, 3]"


# bench

QUICK = ("--batch", "1", "--tokens", "4", "--seconds", "0", "--baseline", "eager fp32", "--baseline", "dynamic int8")


def test_bench_prints_a_table(sparse):
    text = succeed("bench", sparse, *QUICK).stdout
    assert "1 x 4" in text
    assert "sparse, eager fp32: " in text
    assert "largest spread" in text
    assert "1 threads" in text


def test_bench_against_a_dense_model(files, sparse):
    data = json.loads(succeed("bench", sparse, "--dense", files / "model", *QUICK, "--json").stdout)
    assert [row["name"] for row in data["rows"]] == ["eager fp32", "dynamic int8", "sparse, eager fp32"]


def test_bench_of_a_dense_model_says_so(files):
    result = succeed("bench", files / "model", *QUICK)
    assert "the model has no sparse layer" in result.stderr


def test_bench_without_the_extension_says_so(sparse, monkeypatch):
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "why_unavailable", "no compiler")
    assert (
        "no compiler: sparse layers run on the reference, which is not fast" in succeed("bench", sparse, *QUICK).stderr
    )


def test_bench_refuses_bad_input(sparse):
    assert failure("bench", sparse, "--tokens", "512").startswith("bench: expected at most 32 tokens")
    assert failure("bench", sparse, "--baseline", "onnx").startswith("bench: expected baselines among eager fp32")


def test_bench_explains_layers(sparse, monkeypatch):
    from sparsenlp.cost import CostModel, Fitted, Kind
    from sparsenlp.cost.law import DenseLaw, Setup, SparseLaw, Steps

    setup = Setup(1, 4, 4, 1 << 20)
    law = SparseLaw(setup, Steps(8, 16, 32, 0), (1e-5,) * 8, (1e-5,) * 10)
    laws = {True: law, False: DenseLaw(setup, (1, 2), ((1e-5,) * 4,) * 2)}
    asked = []

    def known(kinds, *_):
        asked.extend(kinds)
        return CostModel(1, {kind: Fitted(laws[kind.block is not None], (0.25,)) for kind in kinds})

    monkeypatch.setattr("sparsenlp.cost.explain.calibrated", known)
    options = ("--explain", "--batch", "2", "--tokens", "4", "--seconds", "0")
    text = succeed("bench", sparse, *options).stdout
    assert "sparse: error median" in text
    assert "float32 dense 25% / 25%" in text
    assert "1 threads" in text
    data = json.loads(succeed("bench", sparse, *options, "--json").stdout)
    assert {layer["tokens"] for layer in data["layers"]} == {8}
    assert data["calibration_error"]["float32 dense"] == {"median": 0.25, "p90": 0.25}
    assert Kind("float32") in asked
    message = failure("bench", sparse, "--explain", "--baseline", "eager fp32")
    assert message == "explain: expected neither --dense nor --baseline, as only layers are timed"


def test_bench_explains_nothing_of_a_dense_model(files):
    assert "expected a model with sparse layers" in failure("bench", files / "model", "--explain")

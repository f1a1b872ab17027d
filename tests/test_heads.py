from types import SimpleNamespace

import pytest

from sparsenlp import heads


def config(*names, architecture="BertForSequenceClassification"):
    return SimpleNamespace(id2label=dict(enumerate(names)), architectures=[architecture])


@pytest.mark.parametrize(
    ("model", "labels", "retrain", "names", "trained"),
    [
        (config("bad", "good"), ["bad", "good"], False, ["bad", "good"], True),
        (config("good", "bad"), ["bad", "good"], False, ["good", "bad"], True),
        (config("bad", "good", "ugly"), ["bad", "good"], False, ["bad", "good", "ugly"], True),
        (config("bad", "good"), ["bad", "good"], True, ["bad", "good"], False),
        (config("LABEL_0", "LABEL_1"), ["bad", "good"], False, ["bad", "good"], True),
        (config("bad", "good"), ["no", "yes"], True, ["no", "yes"], False),
        (config("bad", "good"), ["a", "b", "c"], False, ["a", "b", "c"], False),
        (config("LABEL_0", "LABEL_1", architecture="BertModel"), ["bad", "good"], False, ["bad", "good"], False),
        (SimpleNamespace(id2label={0: "a"}, architectures=None), ["bad", "good"], False, ["bad", "good"], False),
    ],
)
def test_choose_head(model, labels, retrain, names, trained):
    head = heads.choose_head(model, labels, retrain)
    assert (head.names, head.trained) == (names, trained)


def test_choose_head_does_not_guess_which_class_is_which():
    with pytest.raises(ValueError, match=r"labels: expected the model's classes bad, good, got no, yes; rename"):
        heads.choose_head(config("bad", "good"), ["no", "yes"])


TWELVE = [f"LABEL_{i}" for i in range(12)]


def numbers(*values):
    return [str(value) for value in values]


@pytest.mark.parametrize("retrain", [False, True])
@pytest.mark.parametrize("labels", [numbers(3, 7, 11), ["3.0", "7.0"], numbers(*range(12)), ["LABEL_3", "label_4"]])
def test_numbers_are_those_of_the_outputs(labels, retrain):
    head = heads.choose_head(config(*TWELVE), labels, retrain)
    assert (head.names, head.trained) == (TWELVE, not retrain)
    assert ("taken for those of its outputs" in head.remarks) == (labels[0] != "LABEL_3")


def test_case_alone_does_not_make_another_class():
    head = heads.choose_head(config("NEGATIVE", "POSITIVE"), ["negative", "positive"])
    assert (head.names, head.trained) == (["NEGATIVE", "POSITIVE"], True)
    assert head.remarks == "labels are compared without regard to case: negative is NEGATIVE, positive is POSITIVE"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            numbers(*range(1, 13)),
            "labels: expected numbers from 0 to 11 for a model whose classes have no names, got 1",
        ),
        (numbers(-1, 1), "labels: expected numbers from 0 to 11 .*, got -1, 1"),
        (numbers(1, 0.5), "labels: expected numbers from 0 to 11 .*, got 1, 0.5"),
        (["bad", "good"], "labels: expected all 12 classes for a model whose classes have no names, got bad, good"),
    ],
)
def test_classes_without_names_are_not_guessed(labels, message):
    with pytest.raises(ValueError, match=f"{message}.*id2label.*--finetune-epochs"):
        heads.choose_head(config(*TWELVE), labels)
    assert heads.choose_head(config(*TWELVE), labels, retrain=True).names == labels


def test_more_labels_than_classes_need_training():
    for names in (("LABEL_0", "LABEL_1"), ("bad", "good")):
        head = heads.choose_head(config(*names), numbers(*range(12)))
        assert (head.trained, head.why) == (False, "the model has 2 classes and the data 12")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertForTokenClassification", "a label per token"),
        ("BertForQuestionAnswering", "spans that answer questions"),
        ("T5ForConditionalGeneration", "an encoder-decoder that answers with texts"),
        ("BertForMultipleChoice", "multiple choice"),
        ("ViTForImageClassification", "an unknown head"),
    ],
)
def test_other_tasks_are_refused(architecture, kind):
    with pytest.raises(ValueError, match=f"got {architecture}, which is for {kind}; with labelled texts, classifiers"):
        heads.choose_head(config("a", "b", architecture=architecture), ["a", "b"], retrain=True)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"problem_type": "multi_label_classification"}, "several labels per text"),
        ({"problem_type": "regression"}, "regression"),
        ({"id2label": {0: "LABEL_0"}}, "regression"),
        ({"problem_type": "regression", "architectures": None}, "regression"),
    ],
)
def test_other_problems_are_refused(settings, kind):
    model = config("a", "b")
    vars(model).update(settings)
    with pytest.raises(ValueError, match=f"model: expected one class per text, got .* for {kind}"):
        heads.choose_head(model, ["a", "b"])


def test_a_head_that_reads_the_padding_is_refused():
    model = config("a", "b", architecture="XLNetForSequenceClassification")
    model.summary_type = "last"
    with pytest.raises(ValueError, match="got XLNetForSequenceClassification with summary_type last, which reads the"):
        heads.choose_head(model, ["a", "b"])
    model.summary_type = "first"
    assert heads.choose_head(model, ["a", "b"]).trained


def test_a_head_that_is_dropped_is_named():
    for name in ("BertForMaskedLM", "GPT2LMHeadModel", "ElectraForPreTraining"):
        head = heads.choose_head(config("LABEL_0", "LABEL_1", architecture=name), ["a", "b"])
        assert not head.trained
        assert head.why == f"the model has no trained classification head; the head of {name} is dropped"
    for name in ("BertModel", "T5EncoderModel"):
        head = heads.choose_head(config("LABEL_0", "LABEL_1", architecture=name), ["a", "b"])
        assert (head.trained, head.why) == (False, "the model has no trained classification head")


@pytest.mark.parametrize("names", [None, [], ["BertModel", "BertForMaskedLM"], ["torch"], ["Bert"], ["BertConfig"]])
def test_a_class_that_is_not_there(names):
    pytest.importorskip("transformers", reason="the classes are those of transformers")
    with pytest.raises(ValueError, match="architectures: expected one model class of transformers or sparsenlp"):
        heads.named_class(SimpleNamespace(architectures=names))


def test_numbers_of_classes_have_no_gaps():
    with pytest.raises(ValueError, match=r"id2label: expected classes numbered from 0 to 1, got \[1, 2\]"):
        heads.label_names_of(SimpleNamespace(id2label={1: "a", 2: "b"}))

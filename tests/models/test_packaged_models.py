from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sparsenlp.models import packaged


def loaded(load):
    try:
        return load()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(x, h, arrays, prefix):
    """As g2p_en/g2p.py has it; x (in,), h (units,)."""
    a = arrays[f"{prefix}_w_ih"] @ x + arrays[f"{prefix}_b_ih"]
    b = arrays[f"{prefix}_w_hh"] @ h + arrays[f"{prefix}_b_hh"]
    (r, z), (ra, rb) = np.split(sigmoid(a[:512] + b[:512]), 2), (a[512:], b[512:])
    return (1 - z) * np.tanh(ra + r * rb) + z * h


def test_g2p_en_says_what_its_own_formulas_say():
    model, letters, phonemes = loaded(packaged.g2p_en)
    arrays = np.load(packaged._file("g2p-en", "g2p_en/checkpoint20.npz"))
    words = ["sparsity", "weight", "onomatopoeia"]
    batch = letters(words, padding=True, return_tensors="pt")
    spoken = phonemes.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert spoken[:2] == ["S P AA1 R S IH0 T IY0", "W EY1 T"]
    for word, answer in zip(words, spoken, strict=True):
        h = np.zeros(256, np.float32)
        for letter in [*word, "</s>"]:
            h = gru(arrays["enc_emb"][packaged.LETTERS.index(letter)], h, arrays, "enc")
        ids, logits = [2], []
        while len(ids) < 21 and ids[-1] != 3:
            h = gru(arrays["dec_emb"][ids[-1]], h, arrays, "dec")
            logits.append(arrays["fc_w"] @ h + arrays["fc_b"])
            ids.append(int(logits[-1].argmax()))
        assert answer == " ".join(packaged.PHONEMES[i] for i in ids[1:-1])
        with torch.no_grad():
            ours = model(
                letters(word, return_tensors="pt").input_ids, decoder_input_ids=torch.tensor([ids[:-1]])
            ).logits
        np.testing.assert_allclose(ours[0].numpy(), np.array(logits), atol=1e-4)


def test_textgenrnn_predicts_what_its_own_formulas_predict():
    """In Keras' layout, converted from that of CuDNN as Keras does it."""
    model, tokenizer = loaded(packaged.textgenrnn)
    import h5py

    text = "Sparse models of the future"
    ids = tokenizer(text).input_ids[:-1]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    ids = [0] * (packaged.WINDOW - len(ids)) + ids
    with h5py.File(packaged._file("textgenrnn", "textgenrnn/textgenrnn_weights.hdf5")) as file:
        x = file["embedding/embedding/embeddings:0"][:][ids]
        features = [x]
        for i in (1, 2):
            group = file[f"rnn_{i}/rnn_{i}"]
            kernel, recurrent = (
                np.hstack([f(gate) for gate in np.hsplit(group[name][:], 4)])
                for name, f in (
                    ("kernel:0", lambda k: k.T.reshape(k.shape, order="F")),
                    ("recurrent_kernel:0", lambda k: k.T),
                )
            )
            bias = sum(np.split(group["bias:0"][:], 2))
            h = c = np.zeros(128, np.float32)
            steps = []
            for row in x:
                i_gate, f_gate, g_gate, o_gate = np.split(row @ kernel + h @ recurrent + bias, 4)
                c = sigmoid(f_gate) * c + sigmoid(i_gate) * np.tanh(g_gate)
                h = sigmoid(o_gate) * np.tanh(c)
                steps.append(h)
            x = np.array(steps)
            features.append(x)
        joined = np.concatenate(features, axis=1)
        weights = np.exp(joined @ file["attention/attention/attention_W:0"][:])
        averaged = (joined * weights).sum(axis=0) / weights.sum()
        expected = averaged @ file["output/output/kernel:0"][:] + file["output/output/bias:0"][:]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, -1]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("load", "package"), [(packaged.g2p_en, "g2p-en"), (packaged.textgenrnn, "textgenrnn")])
def test_an_absent_package_is_named(monkeypatch, load, package):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=f"expected the package {package}, got none; pip install"):
        load()


def test_a_small_lstm_from_cudnn():
    """One unit, two inputs: the two rows of a gate's kernel are read one after the other."""
    kernel = np.arange(8.0).reshape(2, 4)
    state = dict(packaged.from_cudnn_lstm(kernel, np.arange(4.0)[None], np.arange(8.0)))
    assert state["weight_ih_l0"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert state["weight_hh_l0"].tolist() == [[0], [1], [2], [3]]
    assert state["bias_ih_l0"].tolist() == [0, 1, 2, 3]
    assert state["bias_hh_l0"].tolist() == [4, 5, 6, 7]

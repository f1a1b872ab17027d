"""A record of training texts that is nested, a pipe, of another version, or has hashes that were taken out."""

import json
import os

from common import attempt, outcome, scratch

from sparsenlp.trained_texts import TEXTS_FILE, TrainedTexts, hashes_of, read_trained_texts, with_texts

answers = {}
with scratch() as folder:
    path = folder / TEXTS_FILE
    with_texts(None, TrainedTexts.of(hashes_of([f"text {i}" for i in range(9)]))).save_pretrained(folder)
    whole = json.loads(path.read_text())
    changed = {"version": whole | {"format_version": 2}, "taken out": whole | {"hashes": whole["hashes"][:32]}}
    for name, text in {"nested": "[" * 100_000, **{name: json.dumps(data) for name, data in changed.items()}}.items():
        path.write_text(text)
        answers[name] = attempt(lambda: read_trained_texts(folder), folder, 130)
    path.unlink()
    os.mkfifo(path)
    answers["pipe"] = attempt(lambda: read_trained_texts(folder), folder, 130)
outcome(answers)

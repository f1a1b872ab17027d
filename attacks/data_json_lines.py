"""Lines of JSON that mean two things or too much: nested lists, keys twice, endless numbers, NaN, half characters."""

from collections import Counter

from common import attempt, outcome, scratch

from sparsenlp.data import load_table

LINES = {
    "100,000 lists": '{"text": ' + "[" * 100_000,
    "100,000 objects": '{"text": ' * 100_000,
    "two labels": '{"text": "a", "label": 1, "label": 2}',
    "5,000 digits": '{"text": "a", "label": ' + "9" * 5000 + "}",
    "NaN": '{"text": "a", "label": NaN}',
    "1e999999": '{"text": "a", "label": 1e999999}',
    "half a character": '{"text": "a\\ud800", "label": 1}',
    "NUL": '{"text": "a\\u0000", "label": 1}',
    "a list": '{"text": ["a"], "label": 1}',
    "an object": '{"text": "a", "label": {"is": 1}}',
    "no object": '["a", 1]',
}

with scratch() as folder:
    ends = {}
    for name, line in LINES.items():
        path = folder / "data.jsonl"
        path.write_text('{"text": "b", "label": 0}\n' + line + "\n")
        ends[name] = attempt(lambda path=path: load_table(path).label_names, folder)
    counts = Counter("refused with its line" if "line 2" in end else end for end in ends.values())
    outcome({"": ", ".join(f"{count} of {len(ends)} {end}" for end, count in counts.items())})

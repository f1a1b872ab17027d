"""Labels that, sorted as text, would go to other outputs of a classifier of LABEL_0 to LABEL_11 than they name."""

from types import SimpleNamespace

from common import attempt, outcome, scratch

from sparsenlp.data import load_table
from sparsenlp.heads import choose_head

NAMES = [f"LABEL_{i}" for i in range(12)]
MODEL = SimpleNamespace(id2label=dict(enumerate(NAMES)), architectures=["BertForSequenceClassification"])
SPELLED = {
    "as floats": lambda i: f"{i}.0",
    "with zeros in front": lambda i: f"{i:03}",
    "as powers": lambda i: f"{i}e0",
    "only 3, 7 and 11": lambda i: str((3, 7, 11)[i % 3]),
    "only 10 and 2, as floats": lambda i: f"{(10, 2)[i % 2]}.0",
    "1 to 12": lambda i: str(i + 1),
    "some words": lambda i: ("sport", "news")[i % 2],
    "-1 and 1": lambda i: str((-1, 1)[i % 2]),
    "full-width digits": lambda i: "".join(chr(ord(c) + 0xFEE0) for c in str(i % 3)),
}


def outputs(path):
    """Whether each row is encoded as the output that its number names."""
    texts = load_table(path)
    head = choose_head(MODEL, texts.label_names)
    wanted = [int(text) for text in texts.texts]
    return "each its output" if texts.with_classes(head.names).labels == wanted else "OTHER OUTPUTS"


with scratch() as folder:
    ends = {}
    for name, spell in SPELLED.items():
        rows = [spell(i) for i in range(12)]
        numbers = [int(float(row)) if row.isascii() and row[-1].isdigit() else 0 for row in rows]
        lines = [f"{number},{row}" for number, row in zip(numbers, rows, strict=True)]
        (folder / "d.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
        end = attempt(lambda: outputs(folder / "d.csv"), folder)
        ends[name] = "refused" if end.startswith("refused, ValueError: labels") else end
    outcome(ends)

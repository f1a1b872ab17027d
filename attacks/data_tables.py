"""Tables that a reader may take for others: names twice, other separators and encodings, quotes, cells without end."""

from collections import Counter

from common import attempt, outcome, scratch

from sparsenlp.data import load_table

TABLES = {
    "label twice": ("d.csv", b"text,label,label\na,0,1\nb,1,1\n"),
    "text twice, with a space": ("d.csv", b"text,label, text\na,0,b\nb,1,c\n"),
    "semicolons": ("d.csv", b"text;label\na;0\nb;1\n"),
    "utf-16": ("d.csv", "text,label\na,0\nb,1\n".encode("utf-16")),
    "utf-16 without a mark": ("d.csv", "text,label\na,0\nb,1\n".encode("utf-16-le")),
    "cp1252": ("d.csv", "text,label\ncafé,0\nb,1\n".encode("cp1252")),
    "NUL": ("d.csv", b"text,label\na\0,0\nb,1\n"),
    "open quote": ("d.csv", b'text,label\n"a,0\nb,1\n'),
    "quotes over lines of a .tsv": ("d.tsv", b'text\tlabel\n"a\t0\nb\t1\nc"\t1\nd\t0\n'),
    "no label": ("d.csv", b"text,label\na,0\nb\n"),
    "one cell more": ("d.csv", b"text,label\na,0\nb, c,1\n"),
    "gzip": ("d.csv.gz", b"\x1f\x8b"),
}

with scratch() as folder:
    ends = {}
    for name, (file, content) in TABLES.items():
        (folder / file).write_bytes(content)
        ends[name] = attempt(lambda path=folder / file: load_table(path).labels, folder)
    (folder / "long.csv").write_text("text,label\n" + "word " * 2_000_000 + ",0\nb,1\n")
    ends["10 MB in a cell"] = attempt(lambda: f"read ({len(load_table(folder / 'long.csv').texts[0]):,} characters)")
    counts = Counter("refused, ValueError" if end.startswith("refused, ValueError") else end for end in ends.values())
    outcome({"": ", ".join(f"{count} of {len(ends)} {end}" for end, count in counts.items())})

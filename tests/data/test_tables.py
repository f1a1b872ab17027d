import csv
import gzip
import json

import pytest

from sparsenlp.data.tables import load_columns


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def read(path, *columns):
    return load_columns(path, columns or ("text", "label"))


TWO = [["fine", "poor"], ["1", "0"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "text,label\nfine,1\npoor,0\n"),
        ("D.CSV", "text,label\nfine,1\npoor,0\n"),
        ("d.csv", "\ufefftext,label\nfine,1\npoor,0\n"),
        ("d.csv", "text,label\rfine,1\rpoor,0\r"),
        ("d.csv", "text,label\r\nfine,1\r\npoor,0"),
        ("d.csv", " text , label \nfine , 1\n poor,0 \n"),
        ("d.csv", "text,label\nfine,1\npoor,0\n\n,\n , \n\n"),
        ("d.csv", "text,label\n\n,\nfine,1\npoor,0\n"),
        ("d.csv", "id,text,label,id\n1,fine,1,7\n2,poor,0\n"),
        ("d.tsv", 'text\tlabel\n"fine"\t1\npoor\t0\n'),
        ("d.jsonl", '{"text": "fine", "label": 1}\r{"text": "poor", "label": 0}\r'),
        ("d.jsonl", '{"label": "1", "text": "fine"}\n\n{"text": "poor", "label": 0, "more": [1]}'),
        ("s p a ü.csv", "text,label\nfine,1\npoor,0\n"),
    ],
)
def test_tables_that_say_the_same(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == TWO


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label,label\na,b,x\n", 'expected one column "label" in .*, line 2, got 2 of that name'),
        ("d.csv", "text,label, text\na,b,x\n", 'expected one column "text" in .*, got 2 of that name'),
        ("d.csv", "text;label\na;1\n", "got text;label; the columns of such a file are separated by commas"),
        ("d.csv", "text\tlabel\na\t1\n", "the columns of such a file are separated by commas"),
        ("d.tsv", "text,label\na,1\n", "the columns of such a file are separated by tabs"),
        ("d.csv", "Text,Label\na,1\n", r'expected a column "text" in .*, got Text, Label; did you mean "Text"\?'),
        ("d.jsonl", '{"Text": "a", "label": 1}', r'expected a column "text" in .*line 1.*did you mean "Text"\?'),
        ("d.csv", "fine text,1\nother,0\n", 'expected a column "text" in .*, got fine text, 1'),
        ("d.csv", "text,label\na, b,1\n", "expected 2 columns in .*, line 2, got 3"),
        ("d.csv", "text,label\na\n", 'expected a nonempty "label" in .*, line 2, got none'),
        ("d.csv", "text,label\na,1\n ,0\n", 'expected a nonempty "text" in .*, line 3, got none'),
        ("d.csv", 'text,label\n"a,1\nb,0\n', "malformed row in .*: a quotation mark that is not closed"),
        ("d.tsv", 'text\tlabel\n"a\t1\nb"\t0\n', "expected no cell of several lines in .*, line 3"),
        ("d.tsv", 'text\tlabel\n"a" b\t1\n', "malformed row in .*, line 2"),
        (
            "d.csv",
            b"text,label\na\0b,1\n",
            r"""expected UTF-8 text as "text" in .*, line 2, got the character '\\x00'""",
        ),
        (
            "d.csv",
            "text,label\na,1\n".encode("utf-16"),
            "expected UTF-8 text in .*, got byte 0xff; save the file again",
        ),
        ("d.csv", "text,label\ncaf\xe9,1\n".encode("cp1252"), "expected UTF-8 text in .*, got byte 0xe9"),
        ("d.jsonl", '{"text": "\\ud83d", "label": 1}', r"got the character '\\ud83d'"),
        (
            "d.jsonl",
            '{"text": "a", "label": 1}\n{"text": ["a"], "label": 1}',
            '"text" in .*, line 2 to be .*, got a list',
        ),
        ("d.jsonl", '{"text": "a", "label": [1]}', 'expected "label" in .*, line 1 to be text or a number, got a list'),
        ("d.jsonl", '{"text": {"en": "a"}, "label": 1}', 'expected "text" in .*, line 1 .*, got an object'),
        ("d.jsonl", '{"text": null, "label": 1}', 'expected a nonempty "text" in .*, line 1, got none'),
        ("d.jsonl", '{"text": "a", "label": NaN}', "malformed JSON in .*, line 1: expected a number, got NaN"),
        ("d.jsonl", '{"text": "a", "label": 1, "label": 2}', 'line 1: expected one value of "label", got several'),
        ("d.jsonl", "[" * 100_000, "malformed JSON in .*, line 1"),
        ("d.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "malformed JSON in .*, line 1"),
        ("d.jsonl", '[{"text": "a", "label": 1}]', "expected a JSON object in .*, got list; write one object per line"),
        (
            "d.json",
            "[]",
            r"expected a .csv, .tsv or .jsonl file, got .*d.json; write one object per line into a .jsonl",
        ),
        ("d.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0), "got .*d.csv.gz; decompress it first"),
        ("d.parquet", b"PAR1", "expected a .csv, .tsv or .jsonl file, got .*d.parquet; convert it first"),
        ("d", b"", "expected a .csv, .tsv or .jsonl file"),
    ],
)
def test_what_cannot_be_read_without_a_doubt_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"load_table: .*{message}") as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_one_column_is_not_read_as_two(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,1\n")
    with pytest.raises(ValueError, match='expected different columns, got "text" twice'):
        read(path, "text", "text")


def test_long_cells(tmp_path):
    long, before = "word " * 40_000, csv.field_size_limit()
    path = write(tmp_path / "d.csv", f"text,label\n{long},1\n")
    assert read(path) == [[long.strip()], ["1"]]
    assert csv.field_size_limit() == before
    assert read(write(tmp_path / "d.jsonl", json.dumps({"text": long, "label": 1}))) == [[long.strip()], ["1"]]

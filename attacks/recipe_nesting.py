"""A recipe of 3,000 nested lists, in brackets, in dashes, in mappings, or made by --set."""

from common import attempt, outcome, scratch

from sparsenlp.recipe import load_recipe

cases = {"brackets": "[" * 3000, "dashes": "- " * 3000, "mappings": "\n".join(" " * i + "a:" for i in range(400))}
answers = {}
with scratch() as folder:
    for name, text in cases.items():
        (folder / "r.yaml").write_text(text)
        answers[name] = attempt(lambda: load_recipe(folder / "r.yaml"), folder, 110)
    (folder / "r.yaml").write_text("model: m\ndata: {train: t.csv}\n")
    answers["--set"] = attempt(lambda: load_recipe(folder / "r.yaml", ["a." * 3000 + "a=1"]), folder, 80)
outcome(answers)

"""A recipe with tags that would run a command, make a date of nonsense, or a truth of nothing."""

from common import attempt, outcome, scratch

from sparsenlp.recipe import load_recipe

cases = {
    "python": "model: !!python/object/apply:os.system ['touch {}']",
    "date": "model: !!timestamp nonsense",
    "truth": "model: !!bool ''",
}
answers = {}
with scratch() as folder:
    for name, text in cases.items():
        (folder / "r.yaml").write_text(text.format(folder / "ran"))
        answers[name] = attempt(lambda: load_recipe(folder / "r.yaml"), folder, 110)
    if (folder / "ran").exists():
        answers["python"] = "A COMMAND RAN"
outcome(answers)

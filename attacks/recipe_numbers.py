"""A recipe with an integer of 5,000 digits, one beyond 64 bits, an infinite rate, a billion epochs, tokens or rows."""

from common import attempt, outcome, scratch

from sparsenlp.recipe import load_recipe

cases = {
    "digits": "seed: " + "9" * 5000,
    "bits": "seed: 9223372036854775808",
    "infinite": "recover: {learning_rate: 1e999}",
    "epochs": "recover: {epochs: 1000000000}",
    "tokens": "convert: {token_counts: [1000000000]}",
    "rows": "prune: {pattern: 1000000000x1}",
}
answers = {}
with scratch() as folder:
    for name, text in cases.items():
        (folder / "r.yaml").write_text(f"model: m\ndata: {{train: t.csv}}\n{text}\n")
        answers[name] = attempt(lambda: load_recipe(folder / "r.yaml"), folder, 130)
outcome(answers)

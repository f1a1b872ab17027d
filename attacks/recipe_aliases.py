"""A recipe whose aliases stand for 100 million values, for a thousand levels, or for themselves."""

from common import attempt, outcome, scratch

from sparsenlp.recipe import load_recipe

tens = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
levels = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000))
cases = {"values": "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + tens, "levels": "a0: &a0 [x]\n" + levels, "itself": "a: &a [*a]"}
answers = {}
with scratch() as folder:
    for name, text in cases.items():
        (folder / "r.yaml").write_text(text)
        answers[name] = attempt(lambda: load_recipe(folder / "r.yaml"), folder)
outcome(answers)

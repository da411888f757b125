"""Recipes: parsed, never evaluated; refused in one line."""

from dataclasses import replace

import pytest

from lqec_jax.errors import InputError
from lqec_jax.methods import METHODS
from lqec_jax.recipe import LONGEST, Recipe, check_chain, parse_recipe

MAIN = "rtn(bits=2, group_size=64) | rilq(rank=16)"


def refusal(text) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable(), repr(message)
    return message


def test_the_main_recipe():
    recipe = parse_recipe(MAIN)
    quantizer, compensation = recipe.steps
    assert (quantizer.name, compensation.name) == ("rtn", "rilq")
    assert (quantizer.arguments["bits"], quantizer.arguments["group_size"]) == (2, 64)
    assert compensation.arguments["rank"] == 16
    assert parse_recipe(recipe) is recipe


@pytest.mark.parametrize("text", ["svd", "svd()", "  svd( )  ", "svd(rank=64,)"])
def test_arguments_and_spaces_may_be_left_out(text):
    assert str(parse_recipe(text)) == str(parse_recipe("svd()"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("None", None), ("0x20", 32), ("1_6", 16), ("(96)", 96)],
)
def test_values_are_literals(text, value):
    (step,) = parse_recipe(f"rtn(group_size={text})").steps
    assert step.arguments["group_size"] == value


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_prints_every_default_and_reads_back_the_same(name):
    (step,) = parse_recipe(name).steps
    printed = str(Recipe((step,)))
    again = parse_recipe(printed)
    assert str(again) == printed
    assert again.steps[0].arguments == step.arguments
    assert all(f"{argument}=" in printed for argument in step.arguments)


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("rtn()", [["rtn"]]),
        ("rtn() | svd()", [["rtn", "svd"]]),
        (MAIN, [["rtn"], ["rilq"]]),
        ("rtn() | svd() | rilq() | rilq() | svd()", [["rtn", "svd"], ["rilq"], ["rilq"], ["svd"]]),
        ("rilq() | rtn()", [["rilq"], ["rtn"]]),
    ],
)
def test_model_steps_are_phases_of_their_own(text, phases):
    recipe = parse_recipe(text)
    assert [[step.name for step in phase] for phase in recipe.phases] == phases
    assert [step for phase in recipe.phases for step in phase] == list(recipe.steps)


def test_needs_are_those_of_all_steps():
    assert parse_recipe("rtn() | svd()").needs == frozenset()
    assert parse_recipe("rtn() | rtn(clip_search='output') | svd()").needs == {"rms"}


HOSTILE = {
    "a call by name": "__import__('os').system('true')",
    "an unknown builtin": "eval(a='1')",
    "lambda": "rtn(bits=lambda: 2)",
    "lambda as the recipe": "(lambda: 0)()",
    "attribute": "rtn.__class__(bits=2)",
    "attribute of a value": "rtn(bits=(2).__class__)",
    "subscript": "rtn[0](bits=2)",
    "comprehension": "rtn(bits=[b for b in (2,)])",
    "a name as a value": "rtn(bits=METHODS)",
    "arithmetic": "rtn(bits=1 + 1)",
    "a format string": "rtn(clip_search=f'{1}')",
    "assignment": "x = rtn()",
    "walrus": "(x := rtn())",
    "statement": "import os",
    "two statements": "rtn(); svd()",
    "positional argument": "rtn(2)",
    "starred argument": "rtn(*[2])",
    "double starred argument": "rtn(**{'bits': 2})",
    "the same argument twice": "rtn(bits=2, bits=3)",
    "another operator": "rtn() or svd()",
    "two bars": "rtn() || svd()",
    "a bar too many": "rtn() |",
    "a bar too early": "| rtn()",
    "await": "await rtn()",
    "a string": "'rtn()'",
    "a number": "4",
    "a list": "[rtn(), svd()]",
    "empty": "",
    "blank": " \t\n ",
    "newline between steps": "rtn()\n| svd()",
    "newline in a string": "rtn(clip_search='a\\nb')",
    "newline in a triple string": "rtn(clip_search='''a\nb''')",
    "null byte": "rtn(\0bits=2)",
    "null byte in a string": "rtn(clip_search='\\0')",
    "a lone surrogate": "rtn(clip_search='\udcff')",
    "escape sequence of a terminal": "rtn(clip_search='\x1b[31m')",
    "a name of another script": "rtn(bіts=2)",
    "an emoji": "rtn(bits=🙂)",
    "unclosed": "rtn(bits=2",
    "unopened": "rtn bits=2)",
    "a string without end": "rtn(clip_search='a",
    "an invalid escape": r"rtn(clip_search='\d')",
    "a digit run into a word": "rtn(bits=1or 2)",
    "a method where a number belongs": "rtn(bits=svd())",
    "a huge integer": f"rtn(bits={'9' * 4000})",
    "a huge hexadecimal integer": f"rtn(group_size=-0x{'f' * 4000})",
    "a huge number": f"rilq(lr={'9' * 4000})",
    "an infinite number": "rilq(lr=1e999)",
    "an imaginary number": "rilq(lr=1j)",
    "a dictionary": "rtn(bits={'a': {}})",
    "a value that cannot be compared": "rtn(clip_search=[[]])",
    "deep parentheses": "(" * 10000 + "rtn()" + ")" * 10000,
    "parentheses deep enough": "(" * 2000 + "rtn()" + ")" * 2000,
    "deep lists": "rtn(bits=" + "[" * 1500 + "]" * 1500 + ")",
    "a few deep lists": "rtn(bits=" + "[" * 90 + "]" * 90 + ")",
    "many minus signs": "rtn(bits=" + "-" * 4000 + "1)",
    "deep calls": "rtn(bits=" * 150 + "2" + ")" * 150,
    "deep attributes": "rtn" + ".a" * 2000 + "()",
    "too long": "rtn()" + " " * LONGEST + "| svd()",
    "bytes": b"rtn()",
    "nothing": None,
    "an object": object,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_anything_else_is_refused_in_one_line(text):
    assert refusal(text).partition(": ")[0] in {"recipe", *METHODS}


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch = "__import__('pathlib').Path('x').touch()"
    for text in (touch, f"rtn(bits={touch})", f"rtn(**{touch})", f"rtn() | {touch}", f"[{touch}]"):
        refusal(text)
    assert not list(tmp_path.iterdir())


def test_many_steps_are_a_long_recipe_not_a_deep_one():
    count = LONGEST // len("svd()|") - 1
    assert len(parse_recipe("|".join(["svd()"] * count)).steps) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtm(bits=2)", "recipe: unknown method 'rtm'; did you mean 'rtn'?"),
        ("rtn(bit=2)", "recipe: rtn has no argument 'bit'; did you mean 'bits'?"),
        ("svd(ranks=2)", "recipe: svd has no argument 'ranks'; did you mean 'rank'?"),
        ("svd(zzz=2)", "recipe: svd has no argument 'zzz'; known: dtype, rank"),
        ("rtn(2)", "recipe: rtn takes named arguments only; write rtn(name=value)"),
        ("rtn(bits=2, bits=3)", "recipe: rtn was given 'bits' twice"),
        ("rtn(bits=x)", "recipe: 'x' is neither a literal nor a method call"),
        ("rtn.a()", "recipe: 'rtn.a()' is not a method; write method(name=value)"),
        ("rtn(bits=9)", "rtn: bits=9; an integer from 1 to 8 was wanted"),
        ("rtn(bits=svd(rank=2))", "rtn: bits=svd(rank=2, dtype='float16'); an integer from 1 to 8"),
    ],
)
def test_what_is_said(text, said):
    assert refusal(text).startswith(said)


def test_a_place_is_given_where_there_is_one():
    assert "at column 6" in refusal("rtn( | svd()")
    assert "write method(name=value) | method(...)" in refusal("rtn( | svd()")


def test_a_long_recipe_is_quoted_in_short():
    message = refusal("rtn(" + "a" * 2000)
    assert len(message) < 200 and "..." in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("svd() | rtn()", "no step before svd changes a weight"),
        ("hadamard() | qera()", "no step before qera changes a weight"),
        ("quantize_input() | lq_lora()", "no step before lq_lora changes a weight"),
        ("rtn(bits=2) | gptq(bits=4)", "gptq would round what rtn has rounded"),
        ("rtn() | rtn()", "rtn would round what rtn has rounded"),
        ("rtn() | rilq() | nf()", "nf would round what rtn has rounded"),
        ("loftq(quantizer=nf(bits=2)) | rtn()", "rtn would round what loftq has rounded"),
        ("apiq() | gptq()", "gptq would round what apiq has rounded"),
        ("nf() | sparsegpt(bits=4)", "sparsegpt would round what nf has rounded"),
        ("hadamard() | hadamard()", "a second hadamard of the input changes nothing"),
        ("hadamard(output=True) | hadamard(input=False, output=True)", "of the output changes"),
        ("quantize_input() | quantize_input(format='int')", "the inputs are rounded twice"),
    ],
)
def test_a_chain_that_is_good_for_nothing_is_refused_where_it_is_run(text, reason):
    recipe = parse_recipe(text)  # read it is, as of an artifact that was made by it
    with pytest.raises(InputError, match=reason) as caught:
        check_chain(recipe)
    assert str(caught.value).startswith("recipe: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "rtn() | svd() | svd() | rilq() | quantize_adapter()",
        "wanda() | rtn() | slim_lora()",
        "rtn() | bcq(init='base')",
        "nf() | sparsegpt()",
        "hadamard() | hadamard(input=False, output=True) | e8p()",
        "magnitude() | svd()",
        "gptq() | e2e_qp() | lrec()",
        "quantize_input() | caldera(quantizer=gptq(bits=2))",
        "finetune(rank=4)",
        "rtn() | rilq(scope='block') | rilq(scope='linear')",
    ],
)
def test_a_chain_that_is_good_for_something_passes(text):
    assert check_chain(parse_recipe(text)) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rilq()", "no step before rilq changes a weight"),
        ("rilq(scope='block')", "no step before rilq changes a weight"),
        ("hadamard() | lrec()", "no step before lrec changes a weight"),
        ("rtn() | loftq(quantizer=nf(bits=2))", "loftq makes a base of its own in the place of rt"),
        ("gptq() | block_ap()", "block_ap begins at what gptq has rounded"),
    ],
)
def test_a_chain_that_is_seldom_meant_is_said(text, said):
    (line,) = check_chain(parse_recipe(text))
    assert line.startswith(f"recipe: {said}")


def test_steps_of_ones_own_may_do_anything():
    (svd,) = parse_recipe("svd()").steps
    assert check_chain(Recipe((replace(svd, name="mine"), svd))) == ()

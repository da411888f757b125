"""`lqec generate`: what a model writes after a prompt."""

import sys
from collections.abc import Iterable

from lqec_jax.cli.options import AnyModel, Check, Dtype, flag, json_of, option

Prompt = option(str, "TEXT", "What the model continues.")
MaxNewTokens = option(int, "N", "At most so many tokens; it ends before at the model's end token.")
Temperature = option(float, "T", "0 takes the likeliest token, 1 samples as the model says.")
TopP = option(float, "P", "Sample from the likeliest tokens that reach this probability together.")
Seed = option(int, "N", "The same seed gives the same text.")
Chat = flag("--chat", "The prompt is a user's message: put the model's chat template around it.")
Json = json_of("The text and what made it")


def generate(
    model: AnyModel,
    *,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat: Chat = False,
    dtype: Dtype = "auto",
    check: Check = "auto",
    json: Json = None,
) -> None:
    """Continue a text, or answer a message; the text appears as it is written."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json

    check_json(json)
    from lqec_jax import api
    from lqec_jax.evaluate.generate import brings_bos, stream_text

    writer = api.repack(api.load(model, dtype, check))
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
               "seed": seed}  # fmt: skip
    said = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = stream_text(writer, said, **options)
    if brings_bos(writer, said):
        print("the prompt brings its own BOS; it gets no second", file=sys.stderr)
    text = "".join(pieces) if json == STDOUT else _print_stream(pieces)
    if json is not None:
        row = {"model": model, "recipe": writer.recipe, "prompt": prompt, "chat": chat}
        write_json(json, row | options | {"text": text})


def _print_stream(pieces: Iterable[str]) -> str:
    """Prints pieces of a text as they come, and returns them joined."""
    text = ""
    for piece in pieces:
        text += piece
        sys.stdout.write(_tame(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return text


def _tame(text: str) -> str:
    """Replaces what would move a terminal's cursor, or worse; a model may write anything."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )

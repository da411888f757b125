"""Peaks are sums of named parts: what each part follows, and that XLA's own count agrees."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lqec_jax.models.decoder import model_fns
from lqec_jax.planning.memory import (
    PROCESS,
    RUNTIME,
    TextSize,
    device_peak,
    estimate_phases,
    host_peak,
    run_bytes,
)
from lqec_jax.planning.sizes import measure_model
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_jax.train.losses import rilq_terms
from lqec_jax.train.update import init_state, make_update
from tests.compiling import options_for_memory
from tests.planning.shapes import LLAMA_7B
from tests.train.tiny import draw_decoder, make_config

RECIPE = parse_recipe("rtn(bits=2, group_size=64) | rilq(rank=64)")
TEXT = TextSize(seqlen=512, windows=320, score=64)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven")
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return measure_model(str(folder), RECIPE)


def phases(sizes, text=TEXT, *, on_cpu=False, one_window=False, recipe=RECIPE):
    return estimate_phases(sizes, recipe, text, on_cpu=on_cpu, one_window=one_window)


def test_seven_billion_parameters_train_beside_their_packed_weights(sizes):
    stream, train = phases(sizes)
    assert train.device["the compressed model"] == sizes.student < 2.7e9
    assert train.device["adapters, their moments, the best"] == 4 * 4 * sizes.adapters
    assert sizes.adapters == 159_907_840  # rank 64
    assert stream.device["one dense block"] == sizes.dense_block < 0.05 * sizes.dense
    assert device_peak([stream, train]) < 12e9 < sizes.dense


def test_a_gram_is_counted_where_a_step_reads_it(sizes):
    part = "the gram of a linear's inputs, damped and factored"
    (swept,) = phases(sizes, recipe=parse_recipe("gptq(bits=2)"))
    assert swept.device[part] == 3 * 4 * 11008**2
    assert part not in phases(sizes)[0].device


def test_a_window_at_a_time_takes_an_eighth_of_the_activations(sizes):
    whole, single = (phases(sizes, one_window=one)[1].device for one in (False, True))
    assert whole["activations"] == 8 * single["activations"]
    assert whole["the compressed model"] == single["the compressed model"]


def test_streams_grow_with_the_text_and_weights_do_not(sizes):
    longer = dataclasses.replace(TEXT, windows=640)
    short, long = phases(sizes)[0], phases(sizes, longer)[0]
    mapped = "both ends of a stream, as mapped files"
    assert long.host[mapped] == 2 * short.host[mapped]
    assert long.device == short.device
    streams = run_bytes(sizes, RECIPE, longer, on_cpu=False)
    assert streams > run_bytes(sizes, RECIPE, TEXT, on_cpu=False) > sizes.student


def test_on_a_cpu_host_and_device_are_one_memory(sizes):
    parts = phases(sizes, on_cpu=True)
    largest = max(sum(p.host.values()) + sum(p.device.values()) for p in parts)
    assert host_peak(parts, on_cpu=True) == PROCESS + largest
    apart = phases(sizes)
    largest = max(sum(phase.host.values()) for phase in apart)
    assert host_peak(apart, on_cpu=False) == PROCESS + RUNTIME + largest


def test_accumulation_is_as_asked_or_as_the_machine_wants_it(sizes):
    def activations(recipe, on_cpu):
        parts = phases(sizes, recipe=parse_recipe(recipe), on_cpu=on_cpu)
        return parts[1].device["activations"]

    plain, four = "rtn(bits=2) | rilq(rank=64)", "rtn(bits=2) | rilq(rank=64, accumulate=4)"
    assert activations(plain, on_cpu=False) == 4 * activations(four, on_cpu=False)
    # 512 tokens a part on a CPU, in float32 and not bfloat16.
    assert activations(plain, on_cpu=True) == 2 * activations(plain, on_cpu=False) // 8


def test_xla_counts_as_much_for_an_update(tmp_path):
    layers, d, t, batch = 6, 256, 128, 4
    config = make_config(layers, d, 2 * d)
    shapes = jax.eval_shape(lambda: draw_decoder(config, (2,)))
    fns = model_fns(config, remat=False)

    def loss(params, batch):
        return rilq_terms(fns, batch["teacher"], params, batch["tokens"],
                          model_weight=0.5, token_weight=0.5, target="post_norm")  # fmt: skip

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), shapes)
    windows = {"tokens": jax.ShapeDtypeStruct((batch, t), jnp.int32),
               "teacher": jax.ShapeDtypeStruct((batch, t, d), jnp.float32)}  # fmt: skip
    lowered = make_update(loss, optimizer).lower(state, windows)
    compiled = lowered.compile(compiler_options=options_for_memory())
    held = compiled.memory_analysis().temp_size_in_bytes
    raw = {**LLAMA_7B, "hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": layers,
           "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
           "head_dim": config.head_dim, "vocab_size": config.vocab_size}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rank = next(c.a.shape[-1] for c in shapes["blocks"][0]["attn"]["q"]["kernel"].corrections)
    recipe = parse_recipe(f"rtn(bits=2, group_size=32) | rilq(rank={rank}, batch={batch})")
    sizes = measure_model(str(tmp_path), recipe)
    parts = phases(sizes, TextSize(t, batch, 1), on_cpu=True, recipe=recipe)[1].device
    planned = sum(parts[name] for name in ("gradients", "activations", "logits"))
    assert np.log(planned / held) == pytest.approx(0, abs=np.log(1.35))


# ---- block steps and the Fisher


def plan_block(sizes, recipe, text=TEXT, *, on_cpu=False):
    stream, block = phases(sizes, text, on_cpu=on_cpu, recipe=parse_recipe(recipe))
    return stream, block


def test_a_block_step_holds_one_block_whatever_the_depth(sizes):
    recipe = "block_ap(bits=2, group_size=64, batch=2)"
    stream, block = plan_block(sizes, recipe)
    assert block.name == "block_ap, one block"
    weights = sizes.weights // 32
    groups = weights // 64
    trained = 4 * (weights + 2 * groups)
    assert block.device["what is trained, its moments, the best"] == 4 * trained
    assert block.device["gradients"] == 2 * trained
    clips = plan_block(sizes, "omniquant(bits=2, group_size=64)")[1].device
    assert clips["what is trained, its moments, the best"] == 4 * 4 * 2 * groups
    assert device_peak([stream, block]) < 10e9  # of a model of 13.5 GB
    mapped = "both streams and the answers, as mapped files"
    assert block.host[mapped] == 3 * TEXT.windows * TEXT.seqlen * 4096 * 2


def test_weights_on_moments_hold_grams_and_one_weight_s_training(sizes):
    stream, block = plan_block(sizes, "apiq(bits=2, group_size=64, rank=64, scope='linear')")
    assert block.name == "apiq, one block"
    d, ff = 4096, 11008
    halves = 2 * ff * (ff + d)  # of training and of validation: a gram and a drift of mlp/down
    assert block.device["moments of what a group of linears reads"] == 4 * (halves + 4 * ff**2)
    largest = 2 * d * ff // 64 + 64 * (d + ff)
    assert block.device["what is trained of a weight, its moments, the best"] == 4 * 4 * largest
    assert block.host["both streams, as mapped files"] == 2 * 320 * 512 * d * 2
    # Another text does not make it larger, and no answer is kept.
    longer = TextSize(TEXT.seqlen, 2 * TEXT.windows, TEXT.score)
    assert plan_block(sizes, "apiq(scope='linear')", longer)[1].device == (
        plan_block(sizes, "apiq(scope='linear')")[1].device
    )
    kept = [run_bytes(sizes, parse_recipe(f"apiq(scope={scope!r})"), TEXT, on_cpu=False)
            for scope in ("block", "linear")]  # fmt: skip
    assert kept[0] - kept[1] == 320 * 512 * d * 2


def test_a_step_that_trains_scales_is_counted_by_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    recipe = parse_recipe("rtn(bits=2, group_size=64) | e2e_qp()")
    sizes = measure_model(str(tmp_path), recipe)
    train = phases(sizes, recipe=recipe)[1]
    assert train.name == "e2e_qp"
    assert train.device["gradients"] == 2 * 4 * sizes.weights // 64


def test_what_a_teacher_predicts_is_counted_where_it_is_kept(sizes):
    def plan(logits):
        recipe = parse_recipe(f"rtn(bits=2, group_size=64) | lrec(rank=64, logits={logits!r})")
        device = phases(sizes, recipe=recipe)[1].device
        held = device.get("what the teacher predicts of a batch", 0)
        return run_bytes(sizes, recipe, TEXT, on_cpu=False), held

    tokens = TEXT.windows * TEXT.seqlen
    plain, none = plan("recomputed")
    for logits, each in (("streamed", 2 * 32000), ("top_k", 8 * 64 + 4)):
        kept, held = plan(logits)
        assert (kept - plain, held, none) == (tokens * each, 8 * TEXT.seqlen * each, 0)


def test_both_streams_walk_all_windows_for_a_block_step(sizes):
    plain, block = (parse_recipe(r) for r in ("rtn(bits=2)", "omniquant(bits=2)"))
    slot = TEXT.seqlen * 4096 * 2
    more = run_bytes(sizes, block, TEXT, on_cpu=False) - run_bytes(sizes, plain, TEXT, on_cpu=False)
    assert more == slot * (2 * (TEXT.windows - TEXT.score) + TEXT.windows)


def test_the_fisher_keeps_what_enters_every_block(sizes):
    step = dataclasses.replace(parse_recipe("rtn(bits=2)").steps[0], needs=frozenset({"fisher"}))
    recipe = Recipe((step,))
    (stream,) = phases(sizes, recipe=recipe)
    assert stream.device["a window's gradients, and their squares"] == 8 * sizes.weights // 32
    plain = run_bytes(sizes, parse_recipe("rtn(bits=2, clip_search='output')"), TEXT, on_cpu=False)
    more = run_bytes(sizes, recipe, TEXT, on_cpu=False) - plain
    assert more == 33 * TEXT.windows * TEXT.seqlen * 4096 * 2 + 4 * sizes.weights

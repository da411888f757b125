"""The plan: verdicts follow memory, changes are the smallest that help, time follows arithmetic."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.planning import plan as module
from lqec_jax.planning.machines import GIB, MACHINES, Machine
from tests.golden.tiny_checkpoint import RAW
from tests.planning.shapes import LLAMA_7B

RECIPE = "rtn(bits=2, group_size=64) | rilq(rank=64)"


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven")
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return folder


@pytest.fixture(scope="module")
def facts(seven):
    return lqec.plan(seven, RECIPE)


def verdict(seven, monkeypatch, device: float, host: float = 100, **options):
    machine = Machine("small", int(device * GIB), int(host * GIB), 1e12)
    monkeypatch.setattr(module, "MACHINES", (machine,))
    return lqec.plan(seven, RECIPE, **options)["machines"][0]


def test_it_is_json_and_names_every_machine(facts):
    assert json.loads(json.dumps(facts)) == facts
    assert [machine["name"] for machine in facts["machines"]] == [m.name for m in MACHINES]
    assert facts["bits_per_weight"] == pytest.approx(2.676, abs=1e-3)
    assert facts["kept_bytes"] + facts["dense_bytes"] == pytest.approx(13.48e9, rel=1e-3)


def test_seven_billion_parameters_fit_a_t4_and_its_colab_host(facts):
    t4 = facts["machines"][0]
    assert (t4["name"], t4["fits"], t4["change"]) == ("Colab T4", True, None)
    assert t4["host_bytes"] == 12 * GIB > t4["host_peak_bytes"]


def test_the_smallest_change_is_named(seven, monkeypatch):
    enough = verdict(seven, monkeypatch, 16)
    peak = enough["device_peak_bytes"] / GIB / module.USABLE
    assert enough["fits"]
    assert verdict(seven, monkeypatch, peak * 1.001)["fits"]
    tight = verdict(seven, monkeypatch, peak * 0.999)
    assert (tight["fits"], tight["change"]) == (False, "rilq(accumulate=8)")
    single = lqec.plan(seven, "rtn(bits=2, group_size=64) | rilq(rank=64, accumulate=8)")
    one = single["machines"][0]
    least = one["device_peak_bytes"] / GIB / module.USABLE
    assert verdict(seven, monkeypatch, least * 0.999)["change"] == "rilq(accumulate=8), seqlen=256"
    assert verdict(seven, monkeypatch, 3)["change"].startswith("none that was tried")
    shallow = verdict(seven, monkeypatch, 16, host=5.8, windows=2000)
    assert shallow["change"].startswith("rilq(accumulate=8), seqlen=")


def test_time_is_arithmetic_over_speed(facts):
    seconds = {machine["name"]: machine["seconds"] for machine in facts["machines"]}
    assert seconds["Colab T4"] / seconds["H200"] == pytest.approx(989 / 65)
    # 400 updates of 8 windows at 6 operations a weight and token, and the passes around them.
    weights, tokens = 6.607e9, 8 * 512
    training = 6 * weights * tokens * 400 / (0.35 * 65e12)
    assert training < seconds["Colab T4"] < 1.5 * training


def test_a_recipe_without_training_costs_passes_only(seven, facts):
    plain = lqec.plan(seven, "rtn(bits=2, group_size=64)")
    assert plain["machines"][0]["seconds"] < 0.1 * facts["machines"][0]["seconds"]
    assert [phase["name"] for phase in plain["here"]["phases"]] == ["rtn"]


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("rtn(bits=9)", {}, "bits=9"),
        ("rtn(bits=2, group_size=100)", {}, "group_size=100"),
        (RECIPE, {"seqlen": 100_000}, "seqlen=100000"),
        (RECIPE, {"windows": 0}, "windows=0"),
        (RECIPE, {"val_ratio": 1.5}, "val_ratio=1.5"),
    ],
)
def test_it_refuses_what_compress_would(seven, recipe, options, said):
    with pytest.raises(InputError, match=said):
        lqec.plan(seven, recipe, **options)


def test_a_tiny_model_fits_everywhere(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    facts = lqec.plan(tmp_path, "rtn(bits=3, group_size=32)", seqlen=32, windows=4)
    assert all(machine["fits"] for machine in facts["machines"])
    assert facts["here"]["backend"] == "cpu" and facts["here"]["device_peak_bytes"] is None


def test_a_block_step_costs_its_epochs(seven):
    def seconds(recipe):
        return lqec.plan(seven, recipe)["machines"][0]["seconds"]

    one, two, three = (seconds(f"omniquant(epochs={n})") for n in (1, 2, 3))
    # An epoch is 3 passes over the training windows and one over the others.
    weights, speed = 6.476e9, 0.35 * 65e12
    epoch = 2 * weights * (3 * 256 + 64) * 512 / speed
    assert two - one == pytest.approx(epoch, rel=0.01)
    assert three - two == pytest.approx(two - one)
    assert seconds("omniquant(epochs=1)") > seconds("rtn()") + epoch


def test_training_on_moments_costs_its_updates_and_no_epochs(seven):
    def plan(arguments="", **options):
        recipe = f"apiq(rank=64, scope='linear'{arguments})"
        return lqec.plan(seven, recipe, **options)["machines"][0]

    def seconds(*arguments, **options):
        return plan(*arguments, **options)["seconds"]

    assert seconds(", epochs=1") == seconds(", epochs=9")
    # An update is two products of a gram with a weight, whatever the text.
    d, ff, speed = 4096, 11008, 0.35 * 65e12
    update = 32 * 4 * (4 * d**3 + 2 * d**2 * ff + ff**2 * d) / speed
    for windows in (64, 320):
        more = seconds(", updates=300", windows=windows) - seconds(", updates=200", windows=windows)
        assert more == pytest.approx(100 * update, rel=1e-6)
    assert seconds(windows=320) > seconds(windows=64)
    block = lqec.plan(seven, "apiq(rank=64, scope='block')")["machines"][0]
    assert plan()["host_peak_bytes"] < block["host_peak_bytes"]


def test_a_paper_s_accounting_is_asked_for(seven, facts):
    assert "int21" not in facts
    asked = lqec.plan(seven, RECIPE, paper="int2.1")
    assert asked.pop("int21")["bits"] == 2 and asked == facts
    with pytest.raises(InputError, match="plan: paper='int21'; one of 'int2.1' was wanted"):
        lqec.plan(seven, RECIPE, paper="int21")

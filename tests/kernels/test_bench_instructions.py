"""The count of instructions counts what a listing says, and the kernel keeps to its budget."""

import importlib.util
import json

import pytest

from tests.sources import ROOT

FILE = ROOT / "kernels" / "bench" / "instructions" / "bench.py"
LISTING = """
.text.multiply_rows:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0020*/              @P1  BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   LDS.64 R2, [R24+UR12] ;
        /*0040*/                   LOP3.LUT R20, R33, 0x30003, R7, 0xea, !PT ;
        /*0050*/                   IMAD.MOV.U32 R16, RZ, RZ, R4 ;
        /*0060*/                   IMAD R16, R4, 0x80, R5 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R20, R16, R8 ;
        /*0080*/             @!P0  LDGSTS.E.BYPASS.128 [R29], desc[UR12][R16.64] ;
        /*0090*/              @P0  BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""


@pytest.fixture(scope="module")
def bench():
    if not FILE.is_file():
        pytest.skip("benchmarks are not here: an installed package has none")
    spec = importlib.util.spec_from_file_location("instructions_bench", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_turn_is_the_loop_around_matrix_instructions(bench):
    turn, loops = bench.find_turn(LISTING)
    assert loops and len(turn) == 7 and turn[0].startswith("LDS") and "BRA" in turn[-1]
    everything, loops = bench.find_turn(LISTING.replace("HMMA", "FFMA"))
    assert not loops and len(everything) == 11


def test_each_instruction_is_in_one_class(bench):
    codes = bench.count_codes(bench.find_turn(LISTING)[0])
    assert codes["LDGSTS"] == codes["IMAD"] == codes["IMAD.MOV"] == 1
    shares = bench.classify(codes, 2)
    assert shares == {"tensor": 0.5, "integer": 1, "float": 0, "load": 1, "other": 1}


def test_the_table_says_what_was_counted(bench):
    results = json.loads((FILE.parent / "results.json").read_text())
    assert [row["bits"] for row in results["rows"]] == [c.bits for c in bench.list_cases()]
    for row in results["rows"]:
        assert sum(row["classes"].values()) == pytest.approx(row["a_weight"])
        assert row["shared_bytes"] <= bench.SHARED_BYTES
    assert bench.write_table(results) == (FILE.parent / "results.md").read_text()


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore")  # triton's own
@pytest.mark.parametrize(("rows", "budget"), [(1, 1.6), (16, 2.4)])
def test_a_weight_of_two_bits_keeps_to_its_instructions(bench, rows, budget):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("an older Triton passes x through shared memory once more")
    row = bench.count(bench.Case(8192, 28672, 2, rows, "fp16", "bf16"))
    assert row["counted"] == "turn" and row["a_weight"] <= budget
    # One pair of barriers a turn: no layout is changed through shared memory.
    assert row["codes"]["BAR"] <= 2
    assert row["bytes_in_flight"] >= 64 * 1024

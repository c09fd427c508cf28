"""The AMX unit of the CPU's tile kernels, its instructions in software (csrc/testing): numbers and use of the tiles."""

import ctypes
import itertools
import platform
import re
import subprocess
import sys

import cuda_host
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86-64's"),
    pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed"),
]

BF16, F32 = torch.bfloat16, torch.float32
NONE, AVX512, AMX = 0, 1, 2
TILE = 32
SMALLEST = 2.0**-126  # normal number of fp32


@pytest.fixture(scope="module")
def units():
    library = cuda_host.Library(cuda_host.compile_library("amx_units.cpp"))
    library.library.chosen_unit.restype = ctypes.c_int64
    library.library.ask_for_tiles()
    return library


def left(a):
    """[32, k] as steps of 32 k: the unit's A."""
    return a.reshape(TILE, -1, TILE).transpose(0, 1).contiguous()


def right(b):
    """[k, 32] as pairs of k: its B."""
    return b.reshape(-1, 2, TILE).transpose(1, 2).contiguous()


def operands(steps, whole_numbers):
    """Of whole numbers the products have no rounding, whatever the order of the sums."""
    shapes = ((TILE, steps * TILE), (steps * TILE, TILE), (TILE, TILE))
    a, b, c = (torch.randint(-9, 10, s).float() if whole_numbers else torch.randn(s) for s in shapes)
    return a.to(BF16), b.to(BF16), c


def single(*values):
    return torch.tensor(values, dtype=F32)


def pairs(*values):
    return torch.tensor(values, dtype=F32).to(BF16)


@pytest.mark.parametrize("add", [False, True], ids=["overwrite", "add"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10])
def test_a_tile_of_whole_numbers_is_exact(units, steps, add):
    a, b, c = operands(steps, whole_numbers=True)
    out = c.clone() if add else torch.full((TILE, TILE), float("nan"))
    units.call("multiply", AMX, left(a), right(b), steps, out, add)
    assert torch.equal(out, a.float() @ b.float() + (c if add else 0))


@pytest.mark.parametrize("add", [False, True], ids=["overwrite", "add"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_units_agree_to_the_rounding_of_fp32_sums(units, steps, add):
    a, b, c = operands(steps, whole_numbers=False)
    exact = a.double() @ b.double() + (c.double() if add else 0)
    size = (a.double().abs() @ b.double().abs()) + c.abs()
    for unit in (AMX, AVX512) if units.library.chosen_unit() != NONE else (AMX,):
        out = c.clone() if add else torch.full((TILE, TILE), float("nan"))
        units.call("multiply", unit, left(a), right(b), steps, out, add)
        assert ((out - exact).abs() <= 2e-7 * size).all(), unit


@pytest.mark.parametrize("add", [False, True], ids=["overwrite", "add"])
@pytest.mark.parametrize("words", [1, 7, 15, 16, 17, 40, 160])
def test_a_corner_is_that_part_of_the_tile_to_the_bit(units, words, add):
    steps = (words + 15) // 16
    a, b, c = operands(steps, whole_numbers=False)
    a[:, 2 * words :], b[2 * words :] = 0, 0
    whole = c.clone()
    units.call("multiply", AMX, left(a), right(b), steps, whole, add)
    for rows, columns in itertools.product((1, 8, 16, 17, 31, 32), repeat=2):
        out = c.clone()
        units.call("corner", AMX, left(a), right(b), words, out, add, rows, columns)
        assert torch.equal(out[:rows, :columns], whole[:rows, :columns]), (rows, columns)


def test_one_call_of_several_steps_is_several_calls_of_some(units):
    a, b, c = operands(5, whole_numbers=False)
    whole, parts = c.clone(), c.clone()
    units.call("multiply", AMX, left(a), right(b), 5, whole, True)
    units.call("multiply", AMX, left(a)[:2], right(b)[:32], 2, parts, True)
    units.call("multiply", AMX, left(a)[2:].contiguous(), right(b)[32:].contiguous(), 3, parts, True)
    assert torch.equal(whole, parts)


def test_nan_stays_in_its_row_and_its_column(units):
    a, b, _ = operands(2, whole_numbers=True)
    a[20, 33], b[50, 3] = float("nan"), float("inf")
    out = torch.zeros(TILE, TILE)
    units.call("multiply", AMX, left(a), right(b), 2, out, False)
    finite = torch.ones(TILE, TILE, dtype=torch.bool)
    finite[20], finite[:, 3] = False, False
    assert torch.equal(out.isfinite(), finite)
    assert out[20].isnan().all()


EPS = 2.0**-24
INSTRUCTION = {  # a pair of A, a pair of B, C and what the instruction makes of them
    "pair": ((2, 3), (5, 7), 1, 32),
    "half of the last digit goes to even": ((1, 0), (1, 0), EPS, 1),
    "and up from an odd one": ((1, 0), (1, 0), 3 * EPS, 1 + 4 * EPS),
    "the pair is summed before C": ((1, 1), (EPS, EPS), 1, 1 + 2 * EPS),
    "a denormal of A is 0": ((SMALLEST / 2, 0), (2.0**100, 0), 0, 0),
    "a denormal of B is 0": ((2.0**100, 0), (0, SMALLEST / 2), 0, 0),
    "a denormal of C is 0": ((0, 0), (0, 0), SMALLEST / 2, 0),
    "a denormal result is 0": ((SMALLEST, 0), (0.5, 0), 0, 0),
    "the smallest normal number stays": ((SMALLEST, 0), (1, 0), 0, SMALLEST),
    "an overflow is infinite": ((2.0**100, 0), (2.0**100, 0), 0, float("inf")),
    "infinity less infinity is no number": ((float("inf"), 1), (1, float("-inf")), 0, float("nan")),
}


@pytest.mark.parametrize("case", INSTRUCTION.values(), ids=INSTRUCTION)
def test_the_instruction_rounds_as_its_definition_says(units, case):
    a, b, c, expected = case
    out, truth = single(c), single(expected)
    units.call("multiply_pairs", pairs(*a), pairs(*b), out, 1)
    assert torch.equal(out.view(torch.int32), truth.view(torch.int32)) or (out.isnan() and truth.isnan())


MISTAKES = {
    "a tile without a configuration": ("ask_for_tiles(); l.zero_a_tile()", "used without a configuration"),
    "a unit before Linux was asked": ("begin()", "Linux was not asked"),
    "begin twice": ("ask_for_tiles(); l.begin(); l.begin()", "configured already since _tile_loadconfig"),
    "end twice": ("ask_for_tiles(); l.begin(); l.end(); l.end()", "no configuration to release"),
    "the process ends in between": ("ask_for_tiles(); l.begin()", "the end of .*configured"),
    "a thread ends in between": ("ask_for_tiles(); l.begin_on_a_thread()", "the end of a thread.*since _tile_load"),
    "a unit of another thread": ("ask_for_tiles(); l.begin(); t(l.zero_a_tile)", "used without a configuration"),
    "a tile that is not there": ("ask_for_tiles(); l.use_a_fourth_tile()", "leaves out"),
    "nine tiles": ("ask_for_tiles(); l.load_tiles(9, 16, 64)", "more than 8"),
    "a tile of 17 rows": ("ask_for_tiles(); l.load_tiles(8, 17, 64)", "larger than 16 rows"),
    "a tile without bytes": ("ask_for_tiles(); l.load_tiles(8, 16, 0)", "rows without bytes"),
    "rows that differ": ("ask_for_tiles(); l.multiply_tiles(16, 8, 16)", "shapes do not fit"),
    "words that differ": ("ask_for_tiles(); l.multiply_tiles(16, 16, 8)", "shapes do not fit"),
    "no mistake": ("ask_for_tiles(); l.begin(); l.end(); l.begin(); l.end()", None),
}


@pytest.mark.parametrize(("calls", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_use_of_the_tiles_ends_the_process_with_its_reason(units, calls, message):
    script = (
        "import ctypes, threading\n"
        f"l = ctypes.CDLL({units.library._name!r})\n"
        "def t(f):\n    one = threading.Thread(target=f)\n    one.start()\n    one.join()\n"
        f"l.{calls}"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == -6, done.stderr
        assert re.search(f"amx_on_host: .*{message}", done.stderr), done.stderr

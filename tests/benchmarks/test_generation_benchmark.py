"""The contestants of `python -m benchmarks generation` make the tokens that they are credited with."""

import pytest
import torch

from benchmarks import generation_budget as budget
from benchmarks.case import OURS, Case, Unavailable
from benchmarks.generation import SCALES, cases
from benchmarks.generation_ours import Sharing, host_share
from benchmarks.generation_peers import Continuous, Static, generate_batch
from benchmarks.generation_work import SLICE_TOKENS, Draws, Work, whole_bytes
from rlhf_kernels.generation import GenerationStats

TINY = SCALES["cpu"].model.tiny()
WORK = Work(7, (3, 9), (1, 6), vocabulary=TINY.vocabulary)


@pytest.fixture(scope="module")
def model():
    return TINY.build("cpu", torch.float32)


def test_a_shorter_list_of_prompts_is_the_beginning_of_a_longer_one():
    long, short = WORK.draw(), Work(3, WORK.prompt, WORK.new, vocabulary=WORK.vocabulary).draw()
    assert long.first(3) == short
    assert WORK.draw() == long


@pytest.mark.parametrize(("lengths", "mean"), [("uniform", 64.5), ("equal", 64), ("long tail", 21)])
def test_lengths_are_drawn_as_named(lengths, mean):
    new = Work(2000, (16, 96), (1, 128), lengths).draw().new
    assert sum(new) / len(new) == pytest.approx(mean, rel=0.1)
    assert (min(new), max(new)) == ((64, 64) if lengths == "equal" else (1, 128))


@pytest.mark.parametrize("static", [Static(3, 7), Static(2, 5, "prompt"), Static(7, 7, "length")], ids=str)
def test_a_static_batch_gives_every_prompt_what_it_wants(model, static):
    draws = WORK.draw()
    made = static.contestant(model, draws)()()
    assert [len(row) for batch in made for row in batch] == static.order(draws).new
    assert sum(map(len, (row for batch in made for row in batch))) == draws.first(static.prompts).tokens


def test_sorting_moves_lengths_along_with_prompts():
    draws = WORK.draw()
    for sort in ("prompt", "length"):
        ordered = Static(2, 7, sort).order(draws)
        keys = [len(p) for p in ordered.prompts] if sort == "prompt" else ordered.new
        assert keys == sorted(keys)
        assert sorted(zip(ordered.prompts, ordered.new)) == sorted(zip(draws.prompts, draws.new))


def test_padding_does_not_change_what_a_prompt_gives(model):
    """One token in a vocabulary towers above the rest, so that sampling has no choice."""
    sure = TINY.build("cpu", torch.float32)
    sure.lm_head.weight.mul_(1e4)
    short, long = WORK.draw().prompts[:2], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    together = generate_batch(sure, Draws(short + long, [4, 4, 4]))
    assert together[:2] == [generate_batch(sure, Draws([prompt], [4]))[0] for prompt in short]


def test_continuous_batching_gives_every_prompt_what_it_wants(model):
    draws = WORK.draw()
    found = Continuous(2, 5, 64).contestant(model, draws)()()
    assert [found[str(i)] for i in range(5)] == draws.new[:5]
    assert model.config._attn_implementation == "sdpa"  # the model it was given is as it was


def test_budgets_halve_and_hold_the_longest_sequence():
    draws = SCALES["cpu"].work(64).draw()
    each = SLICE_TOKENS * SCALES["cpu"].model.token_bytes()
    found = [size // each for size in budget.budgets(SCALES["cpu"].model, draws)]
    whole = sum(-(-(len(p) + n - 1) // SLICE_TOKENS) for p, n in zip(draws.prompts, draws.new))
    assert found == [whole // share for share in budget.SHARES]
    few = budget.budgets(SCALES["cpu"].model, draws.first(2))
    assert few[-1] // each == max(draws.slices(0), draws.slices(1))


@pytest.mark.slow
def test_the_allocator_holds_no_more_than_the_budget_and_tokens_stay():
    model = SCALES["cpu"].model.tiny()
    wide = type(model)(2, 512, 48, 2, 1, 97)
    held, differ = budget.checks(wide, Work(8, (300, 310), (4, 12), vocabulary=97), "cpu")
    assert held.what.startswith("bytes held")
    assert 0.9 < held.error <= 1
    assert differ.error == 0


def test_a_prompt_that_is_computed_twice_is_noticed():
    sharing = Sharing(WORK, n=4)
    once = sum(map(len, WORK.draw().prompts))
    for extra in (0, 5):
        (check,) = sharing.checks([GenerationStats(prompt_tokens_computed=once + extra)])
        assert check.error == extra
    with pytest.raises(Unavailable):
        sharing.checks([])


def test_the_hosts_share_is_of_the_calls_own_time():
    (check,) = host_share(GenerationStats(seconds=2.0, host_seconds=0.2, steps=3))
    assert (check.error, check.at_most) == (0.1, 0.05)
    with pytest.raises(Unavailable):
        host_share(GenerationStats())


def test_the_bytes_hold_so_many_of_the_longest_sequences():
    slices = -(-(9 + 6 - 1) // SLICE_TOKENS)
    assert whole_bytes(TINY, WORK, 3) == 3 * slices * SLICE_TOKENS * TINY.token_bytes()


@pytest.mark.parametrize(("device", "targets"), [("cpu", 6), ("cuda", 1)])
def test_cases_have_distinct_names_and_carry_the_targets(device, targets):
    """Listing the cases makes no model, so a machine without the device can list them."""
    listed = list(cases(device))
    assert len({case.name for case in listed}) == len(listed)
    assert sum(len(case.targets) for case in listed) == targets


@pytest.mark.parametrize("case", list(cases("cpu")), ids=lambda case: case.name)
def test_every_contestant_of_every_case_runs(case: Case):
    contestants = case.build(True)
    assert case.base in contestants
    assert set(case.tokens) <= set(contestants)
    for prepare in contestants.values():
        prepare()()
    for target in case.targets:
        assert OURS in contestants
        assert any(name.startswith(target.over) for name in contestants)

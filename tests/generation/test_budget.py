"""The KV budget changes how long a rollout takes, not what comes out. fp32: what is left is the rounding of GEMMs."""

import random

import pytest
from generation_models import NAMES, SLICE, WINDOWED, generator, greedy, model, prompts, slice_bytes

from rlhf_kernels.generation import SamplingParams, SlicedGenerator

LENGTHS = [1, 30, 4, 17, 8, 29, 12, 40, 5, 9, 33, 2, 26, 7, 40, 19]
NEW = 24
PARAMS = SamplingParams(max_new_tokens=NEW, seed=11)


def slices(prompt: int, new: int) -> int:
    return -(-(prompt + new - 1) // SLICE)


WHOLE = sum(slices(length, NEW) for length in LENGTHS)
LONGEST = max(slices(length, NEW) for length in LENGTHS)


@pytest.mark.parametrize("name", ["llama", "gpt2", WINDOWED])
def test_rollouts_do_not_depend_on_budget_or_order(name):
    lm, given = model(name), prompts(LENGTHS)
    gen = generator(lm, WHOLE)
    want = gen.generate(given, PARAMS, streams=range(100, 100 + len(given)))
    assert gen.stats.preemptions == 0
    for share, seed in ((1, 1), (4, 2), (16, 3)):
        order = list(range(len(given)))
        random.Random(seed).shuffle(order)
        gen = generator(lm, max(WHOLE // share, LONGEST))
        got = gen.generate([given[i] for i in order], PARAMS, streams=[100 + i for i in order])
        assert [r.tokens for r in got] == [want[i].tokens for i in order]
        assert gen.stats.peak_kv_bytes <= gen.kv_memory
        assert (gen.stats.preemptions > 0) == (share > 1)


@pytest.mark.parametrize("slice_tokens", [1, 7, 64])
def test_rollouts_do_not_depend_on_the_slice_size(slice_tokens):
    lm, given = model(), prompts(LENGTHS)
    got = SlicedGenerator(lm, "8MiB", slice_tokens=slice_tokens).generate(given, PARAMS)
    assert [r.tokens for r in got] == [r.tokens for r in generator(lm).generate(given, PARAMS)]


@pytest.mark.parametrize("options", [{"max_active": 1}, {"max_active": 3}, {"step_tokens": 1}, {"step_tokens": 1000}])
def test_rollouts_do_not_depend_on_how_many_run_together(options):
    lm, given = model(), prompts(LENGTHS)
    got = generator(lm, **options).generate(given, PARAMS)
    assert [r.tokens for r in got] == [r.tokens for r in generator(lm).generate(given, PARAMS)]


@pytest.mark.parametrize("budget", [WHOLE, 2 * LONGEST, LONGEST], ids=["roomy", "two", "one"])
def test_samples_of_a_prompt_do_not_depend_on_the_budget(budget):
    lm, given = model(), prompts([13, 40, 16, 3])
    params = SamplingParams(max_new_tokens=NEW, n=3, greedy_baseline=True)
    gen = generator(lm, budget)
    got = gen.generate(given, params)
    for i in range(len(given)):  # the greedy one is computed apart, with nothing shared
        (alone,) = generator(lm).generate([given[i]], greedy(max_new_tokens=NEW))
        assert got[4 * i + 3].tokens == alone.tokens
    assert [r.tokens for r in got] == [r.tokens for r in generator(lm).generate(given, params)]
    assert gen.stats.peak_kv_bytes <= gen.kv_memory


def test_a_prompt_that_fits_exactly_finishes_alone():
    lm = model()
    gen = generator(lm, slices(9, 8))
    (rollout,) = gen.generate(prompts([9]), SamplingParams(max_new_tokens=8))
    assert len(rollout.tokens) == 8
    assert gen.stats.peak_kv_bytes == slices(9, 8) * slice_bytes(lm)


BUDGETS = [1, 2, 4, 8, 16]
MATRIX_PARAMS = {
    "greedy": greedy(max_new_tokens=NEW),
    "sampled": SamplingParams(max_new_tokens=NEW, seed=11),
    "filtered": SamplingParams(max_new_tokens=NEW, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, seed=5),
}


def check_budgets(lm, params, slice_tokens, max_active, budgets, step_tokens=512):
    """The same tokens at every share of `whole at once`, each time with the prompts in another order."""
    given, streams = prompts(LENGTHS), [1000 - 3 * i for i in range(len(LENGTHS))]
    want = SlicedGenerator(lm, "16MiB").generate(given, params, streams=streams)
    each = [-(-(length + NEW - 1) // slice_tokens) for length in LENGTHS]
    size = slice_bytes(lm) // SLICE * slice_tokens
    for share in budgets:
        budget = max(sum(each) * size // share, max(each) * size)
        order = random.Random(share).sample(range(len(given)), len(given))
        gen = SlicedGenerator(lm, budget, slice_tokens, max_active, step_tokens)
        got = gen.generate([given[i] for i in order], params, streams=[streams[i] for i in order])
        assert [r.tokens for r in got] == [want[i].tokens for i in order], (share, slice_tokens, max_active)
        assert gen.stats.peak_kv_bytes <= gen._arena.nbytes <= budget


@pytest.mark.parametrize("slice_tokens", [8, 16, 64])
def test_a_sixteenth_of_the_whole_is_enough_at_every_slice_size(slice_tokens):
    check_budgets(model("qwen2"), MATRIX_PARAMS["filtered"], slice_tokens, 7, [1, 16])


@pytest.mark.slow
@pytest.mark.parametrize("max_active", [1, 2, 7, 64])
@pytest.mark.parametrize("slice_tokens", [8, 16, 64])
@pytest.mark.parametrize("params", MATRIX_PARAMS.values(), ids=MATRIX_PARAMS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same_at_every_budget_slice_size_order_and_number_together(
    name, params, slice_tokens, max_active
):
    check_budgets(model(name), params, slice_tokens, max_active, BUDGETS, step_tokens=37)

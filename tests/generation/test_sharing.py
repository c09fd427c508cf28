"""Equal prompts and equal heads are computed once, draws differ by stream and sample, and a pair is two rollouts."""

import pytest
from generation_models import NAMES, SLICE, generator, greedy, model, prompts

from rlhf_kernels.generation import SamplingParams


def test_equal_prompts_with_different_streams_differ():
    (prompt,) = prompts([9])
    a, b = generator(model()).generate([prompt, prompt], SamplingParams(max_new_tokens=12))
    assert a.tokens != b.tokens


def test_equal_prompts_with_equal_streams_are_equal():
    (prompt,) = prompts([9])
    a, b = generator(model()).generate([prompt, prompt], SamplingParams(max_new_tokens=12), streams=[5, 5])
    assert a.tokens == b.tokens


def test_samples_of_a_prompt_differ_and_its_prefill_is_done_once():
    gen = generator(model())
    rollouts = gen.generate(prompts([14]), SamplingParams(max_new_tokens=12, n=4))
    assert len({tuple(r.tokens) for r in rollouts}) == 4
    assert [r.sample_index for r in rollouts] == [0, 1, 2, 3]
    assert (gen.stats.prompt_tokens_computed, gen.stats.prefix_tokens_shared) == (14, 3 * 14)


def test_samples_that_wait_their_turn_still_share():
    gen = generator(model(), max_active=1)
    rollouts = gen.generate(prompts([14]), SamplingParams(max_new_tokens=12, n=4))
    assert rollouts == generator(model(), max_active=1).generate(prompts([14]), SamplingParams(max_new_tokens=12, n=4))
    assert gen.stats.prompt_tokens_computed == 14


def test_a_sample_is_the_same_with_more_or_fewer_beside_it():
    few = generator(model()).generate(prompts([14]), SamplingParams(max_new_tokens=12, n=2))
    many = generator(model()).generate(prompts([14]), SamplingParams(max_new_tokens=12, n=5))
    assert [r.tokens for r in few] == [r.tokens for r in many[:2]]


def test_the_greedy_baseline_is_a_greedy_call_and_costs_no_second_prefill():
    lm, given = model(), prompts([14, 5, 21])
    gen = generator(lm)
    pairs = gen.generate(given, SamplingParams(max_new_tokens=12, greedy_baseline=True))
    stats = gen.stats
    apart = gen.generate(given, greedy(max_new_tokens=12))
    sampled = gen.generate(given, SamplingParams(max_new_tokens=12))
    assert [r.tokens for r in pairs[1::2]] == [r.tokens for r in apart]
    assert [r.tokens for r in pairs[0::2]] == [r.tokens for r in sampled]
    assert [r.greedy for r in pairs] == [False, True] * 3
    assert (stats.prompt_tokens_computed, stats.prefix_tokens_shared) == (40, 40)


def test_different_prompts_share_an_equal_head():
    head = prompts([3 * SLICE + 1])[0]
    given = [head + tail for tail in prompts([4, 6, 2], seed=1)]
    gen = generator(model())
    got = gen.generate(given, greedy(max_new_tokens=6))
    assert gen.stats.prefix_tokens_shared == 2 * 3 * SLICE
    alone = [generator(model()).generate([prompt], greedy(max_new_tokens=6))[0].tokens for prompt in given]
    assert [r.tokens for r in got] == alone


def test_many_samples_draw_from_one_row_in_pieces(monkeypatch):
    from rlhf_kernels.generation import engine

    want = generator(model()).generate(prompts([6]), SamplingParams(max_new_tokens=2, n=7, greedy_baseline=True))
    monkeypatch.setattr(engine, "DRAW_BYTES", 3 * 131 * 4)
    got = generator(model()).generate(prompts([6]), SamplingParams(max_new_tokens=2, n=7, greedy_baseline=True))
    assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.parametrize("name", NAMES)
def test_a_pairs_halves_are_what_two_calls_give(name):
    """ReMax: the greedy half is greedy decoding; the others are those of calls with n=1, by (seed, stream, sample)."""
    lm, given, streams = model(name), prompts([14, 5, 21, 5]), [7, -3, 2**40, 11]
    options = {"max_new_tokens": 10, "temperature": 0.7, "top_p": 0.9, "seed": 4}
    pairs = generator(lm, 40).generate(given, SamplingParams(n=2, greedy_baseline=True, **options), streams=streams)
    apart = [generator(lm).generate([p], SamplingParams(**options), streams=[s]) for p, s in zip(given, streams)]
    baseline = generator(lm).generate(given, greedy(max_new_tokens=10))
    assert [r.tokens for r in pairs[0::3]] == [r.tokens for (r,) in apart]
    assert [r.tokens for r in pairs[2::3]] == [r.tokens for r in baseline]
    assert all(a.tokens != b.tokens for a, b in zip(pairs[0::3], pairs[1::3]))

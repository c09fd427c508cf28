"""Random calls of a generator give what the definition gives: one full forward a token and a draw in Python floats."""

import random

import pytest
from generation_models import NAMES, model
from reference_generation import check_rollout

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.generation.graphs import SWITCH

VOCABULARY = 131
INT64 = 2**63


def some_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=rng.choice([1, 2, 5, 9, 16]),
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 3, 40, 131, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.0, 0.3, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.2, 1.0]),
        n=rng.choice([1, 1, 1, 2, 4]),
        greedy_baseline=rng.random() < 0.25,
        stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice([0, 0, 3, 20]))),
        ignore_eos=rng.random() < 0.3,
        seed=rng.choice([0, 1, -1, rng.randrange(-INT64, INT64)]),
    )


def some_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Some equal, some with an equal head, some alone."""
    heads = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    prompts = []
    for _ in range(count):
        kind = rng.random()
        tail = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))]
        prompts.append(list(rng.choice(heads)) if kind < 0.3 else rng.choice(heads) + tail if kind < 0.6 else tail)
    return prompts


def check_call(name: str, seed: int, most_prompts: int) -> tuple[int, int]:
    """One random call; returns its tokens and how many of them were close calls."""
    rng = random.Random(seed)
    lm = model(name)
    end = rng.sample(range(VOCABULARY), rng.choice([0, 1, 10]))
    lm.generation_config.eos_token_id = end or None
    given = some_prompts(rng, rng.randint(1, most_prompts))
    params = [some_params(rng) for _ in given] if rng.random() < 0.7 else [some_params(rng)] * len(given)
    streams = [rng.choice([i, 7, rng.randrange(-INT64, INT64)]) for i in range(len(given))]
    slice_tokens = rng.choice([1, 2, 3, 8, 16, 64])
    slice_bytes = SlicedGenerator(lm, "64MiB", slice_tokens=slice_tokens)._arena.slice_bytes
    need = [-(-(len(p) + each.max_new_tokens - 1) // slice_tokens) for p, each in zip(given, params)]
    budget = max(max(need), int(sum(need) * rng.choice([0.0, 0.2, 0.5, 1.0, 4.0]))) * slice_bytes
    gen = SlicedGenerator(
        lm, budget, slice_tokens, max_active=rng.choice([None, 1, 2, 5, 64]), step_tokens=rng.choice([1, 7, 32, 512])
    )
    rollouts = gen.generate(given, params, streams=streams)
    expected = [(i, s) for i, each in enumerate(params) for s in range(each.rollouts)]
    assert [(r.prompt_index, r.sample_index) for r in rollouts] == expected
    assert gen.stats.peak_kv_bytes <= gen._arena.nbytes <= budget
    assert gen.stats.generated_tokens == sum(len(r.tokens) for r in rollouts)
    close = sum(
        check_rollout(lm, given[r.prompt_index], params[r.prompt_index], streams[r.prompt_index], r, end)
        for r in rollouts
    )
    return gen.stats.generated_tokens, close


@pytest.mark.parametrize("seed", range(len(NAMES)))
def test_random_calls_give_what_the_definition_gives(seed):
    tokens, close = check_call(NAMES[seed], seed, most_prompts=5)
    assert close <= 1 + tokens // 1000


@pytest.mark.parametrize("seed", [8, 9])
def test_random_calls_in_static_steps_give_what_the_definition_gives(seed, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    tokens, close = check_call(NAMES[seed % len(NAMES)], seed, most_prompts=5)
    assert close <= 1 + tokens // 1000


@pytest.mark.slow
@pytest.mark.parametrize("static", ["0", "1"], ids=["steps as they come", "static steps"])
@pytest.mark.parametrize("name", NAMES)
def test_many_random_calls_give_what_the_definition_gives(name, static, monkeypatch):
    monkeypatch.setenv(SWITCH, static)
    tokens, close = map(sum, zip(*(check_call(name, 1000 + seed, most_prompts=9) for seed in range(60))))
    assert tokens > 1500
    assert close <= 1 + tokens // 1000

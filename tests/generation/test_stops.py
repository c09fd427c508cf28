"""When a rollout ends, and what is refused before anything is generated."""

import pytest
import torch
from generation_models import NAMES, SLICE, generator, greedy, model, prompts, slice_bytes

from rlhf_kernels.generation import KVBudgetError, SamplingParams

PROMPT = prompts([6])
NEW = 12


@pytest.fixture(scope="module")
def lm():
    return model()


@pytest.fixture(scope="module")
def free(lm) -> list[int]:
    """Its greedy tokens with nothing to stop them, all different up to the place the tests stop at."""
    (rollout,) = generator(lm).generate(PROMPT, greedy(max_new_tokens=NEW))
    assert len(set(rollout.tokens[:5])) == 5
    return rollout.tokens


@pytest.fixture
def ending_at(lm, monkeypatch):
    """Gives the model end tokens (and perhaps a pad token) for one test."""

    def give(eos, pad=None):
        monkeypatch.setattr(lm.generation_config, "eos_token_id", eos)
        monkeypatch.setattr(lm.generation_config, "pad_token_id", pad)

    return give


def run(lm, **options):
    (rollout,) = generator(lm).generate(PROMPT, greedy(max_new_tokens=NEW, **options))
    assert len(rollout.logprobs) == len(rollout.tokens)
    return rollout.tokens, rollout.finish_reason


def test_an_end_token_that_comes_first_is_a_rollout_of_one_token(lm, free, ending_at):
    ending_at(free[0])
    assert run(lm) == (free[:1], "eos")
    gen = generator(lm)
    rollouts = gen.generate(PROMPT, greedy(max_new_tokens=NEW, n=3, greedy_baseline=True))
    assert [r.tokens for r in rollouts] == [free[:1]] * 4
    assert gen.stats.steps == 1


def test_an_end_token_in_the_prompt_does_not_end_anything(lm, free, ending_at):
    ending_at(PROMPT[0][-1])
    assert PROMPT[0][-1] not in free
    assert run(lm) == (free, "length")


def test_a_pad_token_that_is_the_end_token_changes_nothing(lm, free, ending_at):
    ending_at(free[3], pad=free[3])
    assert run(lm) == (free[:4], "eos")
    ending_at(None, pad=free[3])
    assert run(lm) == (free, "length")


def test_the_first_of_several_end_and_stop_tokens_ends_it(lm, free, ending_at):
    ending_at([free[4], free[2]])
    assert run(lm) == (free[:3], "eos")
    assert run(lm, stop_token_ids=(free[4], free[1])) == (free[:2], "stop")
    assert run(lm, stop_token_ids=(free[3],)) == (free[:3], "eos")


def test_an_end_token_among_the_stop_tokens_is_an_end_unless_ends_are_ignored(lm, free, ending_at):
    ending_at(free[2])
    assert run(lm, stop_token_ids=(free[2],)) == (free[:3], "eos")
    assert run(lm, stop_token_ids=(free[2],), ignore_eos=True) == (free[:3], "stop")
    assert run(lm, ignore_eos=True) == (free, "length")


def test_a_stop_at_the_last_token_allowed_is_a_stop_and_not_a_length(lm, free, ending_at):
    ending_at(free[4])
    (rollout,) = generator(lm).generate(PROMPT, greedy(max_new_tokens=5))
    assert (rollout.tokens, rollout.finish_reason) == (free[:5], "eos")


def test_one_new_token_needs_no_place_for_itself(lm, free):
    gen = generator(lm, -(-len(PROMPT[0]) // SLICE))
    rollouts = gen.generate(PROMPT, SamplingParams(max_new_tokens=1, n=5, greedy_baseline=True))
    assert [len(r.tokens) for r in rollouts] == [1] * 6
    assert rollouts[-1].tokens == free[:1]
    assert {r.finish_reason for r in rollouts} == {"length"}
    assert gen.stats.steps == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_may_fill_the_models_positions_but_not_exceed_them(name):
    lm = model(name)
    most = lm.config.max_position_embeddings
    gen = generator(lm)
    (full,) = gen.generate(prompts([most - 3]), greedy(max_new_tokens=3))
    ids = torch.tensor(prompts([most - 3]))
    want = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, pad_token_id=0)
    assert full.tokens == want[0, -3:].tolist()
    with pytest.raises(ValueError, match=rf"prompts\[1\] has {most - 2} tokens.* max_position_embeddings of {most}"):
        gen.stream(prompts([4, most - 2]), greedy(max_new_tokens=3))
    assert gen.stats.generated_tokens == 3  # of the call before


@pytest.mark.parametrize("slice_tokens", [1, SLICE, 64])
def test_the_budget_error_names_exactly_the_bytes_that_suffice(lm, slice_tokens):
    from rlhf_kernels.generation import SlicedGenerator

    each = slice_bytes(lm) // SLICE * slice_tokens
    need = -(-(17 + 8 - 1) // slice_tokens) * each
    if need > each:
        gen = SlicedGenerator(lm, need - 1, slice_tokens)
        with pytest.raises(KVBudgetError, match=rf"prompts\[0\].* need {need} bytes, and kv_memory is {need - 1}"):
            gen.generate(prompts([17]), greedy(max_new_tokens=8))
    gen = SlicedGenerator(lm, need, slice_tokens)
    assert len(gen.generate(prompts([17]), greedy(max_new_tokens=8))[0].tokens) == 8
    assert gen.stats.peak_kv_bytes == need


@pytest.mark.parametrize("seed", range(4))
def test_end_tokens_at_random_leave_the_others_alone(lm, ending_at, seed):
    """Ragged ends in a tight budget: whoever is cut is cut from what it would have said."""
    given = prompts([9, 3, 17, 5, 30, 9, 1, 12], seed=seed)
    params = SamplingParams(max_new_tokens=20, n=2, seed=seed)
    whole = generator(lm).generate(given, params)
    ends = prompts([20], seed=100 + seed)[0]
    ending_at(ends)
    gen = generator(lm, 14, max_active=5)
    for cut, full in zip(gen.generate(given, params), whole):
        count = next((i + 1 for i, token in enumerate(full.tokens) if token in ends), 20)
        assert cut.tokens == full.tokens[:count]
        assert cut.finish_reason == ("eos" if full.tokens[count - 1] in ends else "length")

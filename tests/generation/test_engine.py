"""SlicedGenerator computes what transformers computes, and its rollouts carry the logprobs of what it sampled."""

import copy
import sys

import pytest
import torch
from generation_models import NAMES, generator, greedy, model, prompts, record_logits

from rlhf_kernels.generation import SamplingParams

LENGTHS = [1, 3, 4, 17, 8, 29, 12]
NEW = 14


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_tokens_equal_transformers_generate(name):
    lm, given = model(name), prompts(LENGTHS)
    rollouts = generator(lm, step_tokens=13).generate(given, greedy(max_new_tokens=NEW))
    for prompt, rollout in zip(given, rollouts):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        want = lm.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        assert rollout.tokens == want[0, len(prompt) :].tolist()
        assert rollout.finish_reason == "length"


@pytest.mark.parametrize("budget", [400, 14], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_every_step_equal_a_full_forward(name, budget, monkeypatch):
    lm, given = model(name), prompts(LENGTHS)
    logits = record_logits(monkeypatch)
    rollouts = generator(lm, budget, step_tokens=13).generate(given, SamplingParams(max_new_tokens=NEW))
    for prompt, rollout in zip(given, rollouts):
        ids = torch.tensor([prompt + rollout.tokens])
        full = lm(ids).logits[0, len(prompt) - 1 : -1]
        got = torch.stack([logits[rollout.prompt_index, len(prompt) + i] for i in range(NEW)])
        assert (got - full).norm(dim=-1).div(full.norm(dim=-1)).max() < 1e-5
        chosen = full.log_softmax(-1).gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        bound = max(1e-5, 4e-6 * full.std().item())
        assert (torch.tensor(rollout.logprobs) - chosen).abs().max() <= bound


def test_the_model_is_left_as_it_was():
    lm = model()
    config = lm.config
    lm.train()
    lm.model.layers[0].eval()
    before = {name: module.training for name, module in lm.named_modules()}
    gen = generator(lm)
    stream = gen.stream(prompts([5, 5]), SamplingParams(max_new_tokens=3))
    for _ in stream:
        assert lm.config is config
        assert config._attn_implementation == "eager"
        assert {name: module.training for name, module in lm.named_modules()} == before
    assert not any(p.requires_grad is False or p.grad is not None for p in lm.parameters())


def test_dropout_is_off_while_generating():
    lm = model("gpt2")
    want = generator(lm).generate(prompts([6]), greedy(max_new_tokens=8))
    assert generator(lm.train()).generate(prompts([6]), greedy(max_new_tokens=8)) == want
    lm.eval().transformer.drop.train()  # a part of it alone
    assert generator(lm).generate(prompts([6]), greedy(max_new_tokens=8)) == want
    assert lm.transformer.drop.training


@pytest.mark.parametrize("eos", [int, list], ids=["int", "list"])
@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_the_models_end_token_ends_a_rollout(eos, place):
    lm, given = model(), prompts([6])
    free = generator(lm).generate(given, greedy(max_new_tokens=12))[0].tokens
    cut = free.index(free[5])
    lm.generation_config.eos_token_id = None
    getattr(lm, place).eos_token_id = free[5] if eos is int else [130, free[5]]
    (stopped,) = generator(lm).generate(given, greedy(max_new_tokens=12))
    assert (stopped.tokens, stopped.finish_reason) == (free[: cut + 1], "eos")
    (ignoring,) = generator(lm).generate(given, greedy(max_new_tokens=12, ignore_eos=True))
    assert (ignoring.tokens, ignoring.finish_reason) == (free, "length")


def test_a_stop_token_ends_a_rollout_and_stays_in_it():
    lm, given = model(), prompts([6])
    free = generator(lm).generate(given, greedy(max_new_tokens=12))[0].tokens
    cut = free.index(free[3])
    params = greedy(max_new_tokens=12, stop_token_ids=(free[3],), ignore_eos=True)
    (stopped,) = generator(lm).generate(given, params)
    assert (stopped.tokens, stopped.finish_reason) == (free[: cut + 1], "stop")
    assert len(stopped.logprobs) == cut + 1


def test_every_prompt_has_its_own_parameters():
    lm, given = model(), prompts([5, 9, 7, 3])
    each = [
        greedy(max_new_tokens=3),
        SamplingParams(max_new_tokens=6, temperature=0.7, top_k=4, seed=3),
        SamplingParams(max_new_tokens=1, n=2),
        SamplingParams(max_new_tokens=5, top_p=0.5, min_p=0.1, seed=9, greedy_baseline=True),
    ]
    together = generator(lm).generate(given, each)
    assert [(r.prompt_index, r.sample_index) for r in together] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert [r.greedy for r in together] == [True, False, False, False, False, True]
    alone = [r for i in range(4) for r in generator(lm).generate([given[i]], each[i], streams=[i])]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [len(r.tokens) for r in together] == [3, 6, 1, 1, 5, 5]


def test_logprobs_are_of_the_whole_distribution_at_the_temperature(monkeypatch):
    logits = record_logits(monkeypatch)
    params = SamplingParams(max_new_tokens=6, temperature=0.5, top_k=2)
    (rollout,) = generator(model()).generate(prompts([5]), params)
    for i, (token, logprob) in enumerate(zip(rollout.tokens, rollout.logprobs)):
        row = logits[0, 5 + i].double() / 0.5
        assert logprob == pytest.approx(row.log_softmax(-1)[token].item(), abs=1e-5)
        assert token in row.topk(2).indices


@torch.no_grad()
def test_bf16_logprobs_are_as_exact_as_transformers_own():
    lm, given = model().bfloat16(), prompts(LENGTHS)
    rollouts = generator(lm).generate(given, SamplingParams(max_new_tokens=NEW))
    exact = copy.deepcopy(lm).double()
    ours, theirs = [], []
    for prompt, rollout in zip(given, rollouts):
        ids, chosen = torch.tensor([prompt + rollout.tokens]), torch.tensor(rollout.tokens)[:, None]
        rows = slice(len(prompt) - 1, -1)
        want, full = (m(ids).logits[0, rows].double().log_softmax(-1).gather(-1, chosen)[:, 0] for m in (exact, lm))
        ours.append((torch.tensor(rollout.logprobs) - want).square())
        theirs.append((full - want).square())
    assert torch.cat(ours).mean() <= 1.5 * torch.cat(theirs).mean()


def test_stream_yields_each_rollout_as_it_finishes():
    lm, given = model(), prompts([5, 5, 5])
    each = [SamplingParams(max_new_tokens=n) for n in (9, 2, 5)]
    gen = generator(lm)
    streamed = list(gen.stream(given, each))
    assert [r.prompt_index for r in streamed] == [1, 2, 0]
    assert sorted(streamed, key=lambda r: r.prompt_index) == gen.generate(given, each)


def test_no_prompts_give_no_rollouts():
    assert generator(model()).generate([], SamplingParams()) == []


def test_sleep_gives_the_bytes_back_and_the_next_call_wakes():
    gen = generator(model())
    assert not gen._arena.held
    first = gen.generate(prompts([5]), SamplingParams(max_new_tokens=4))
    assert gen._arena.held
    gen.sleep()
    assert not gen._arena.held
    assert gen.generate(prompts([5]), SamplingParams(max_new_tokens=4)) == first


def test_weights_that_change_between_calls_change_the_rollouts():
    lm = model()
    gen, given = generator(lm), prompts([9])
    before = gen.generate(given, greedy(max_new_tokens=8))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(1.3)
    after = gen.generate(given, greedy(max_new_tokens=8))
    assert after == generator(lm).generate(given, greedy(max_new_tokens=8))
    assert after != before


def test_stats_count_the_call():
    gen = generator(model(), max_active=2)
    gen.generate(prompts([5, 6, 7, 8]), SamplingParams(max_new_tokens=6))
    stats = gen.stats
    assert stats.generated_tokens == 24
    assert stats.prompt_tokens_computed == 5 + 6 + 7 + 8
    assert 1 < stats.mean_active <= 2
    assert stats.steps == 12
    assert 0 < stats.host_seconds < stats.seconds
    assert stats.tokens_per_second == pytest.approx(24 / stats.seconds)
    assert 0 < stats.peak_kv_bytes <= 7 * gen._arena.slice_bytes


def test_a_stream_may_hand_out_in_groups():
    gen = generator(model())
    call = prompts([5] * 5), [SamplingParams(max_new_tokens=n) for n in (2, 3, 4, 5, 6)]
    found = []
    for rollout in gen.stream(*call, every=2):
        found.append((rollout.prompt_index, gen.stats.steps))
    assert found == [(0, 3), (1, 3), (2, 5), (3, 5), (4, 6)]
    with pytest.raises(ValueError, match="every is 0; it must be at least 1"):
        gen.stream(*call, every=0)


@pytest.mark.parametrize("queued", [20, 2000])
def test_a_step_costs_the_host_the_same_however_many_wait(queued, monkeypatch):
    lines = []
    for given in (prompts([4] * 6), prompts([4] * queued)):
        gen = generator(model(), max_active=4)
        stream = gen.stream(given, SamplingParams(max_new_tokens=3))
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line" and "rlhf_kernels/generation" in frame.f_code.co_filename
            return trace

        sys.settrace(trace)
        try:
            next(stream)
        finally:
            sys.settrace(None)
        lines.append(count)
    assert lines[0] == lines[1]
    assert gen.stats.host_seconds < gen.stats.seconds

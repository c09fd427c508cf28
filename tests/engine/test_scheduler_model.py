"""The scheduler does, step by step, what its rules say; and nobody starves, whoever comes after."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import Modelled, SchedulerModel

from rlhf_kernels import _engine

EOS = 0


@st.composite
def calls(draw, shared: bool):
    """Prompts (with `shared`, of equal heads), new tokens asked for and made, slices, slice_tokens, limits."""
    slice_tokens = draw(st.integers(1, 5))
    heads = [[1] * draw(st.integers(1, 9)), [2] * draw(st.integers(1, 9))]
    prompts, mosts, ends = [], [], []
    for i in range(draw(st.integers(1, 9))):
        length = draw(st.integers(1, 14))
        own = [3 + i] * length
        prompts.append(draw(st.sampled_from(heads)) + own[: length // 3] if shared else own)
        mosts.append(draw(st.integers(1, 12)))
        ends.append(draw(st.integers(1, 12)))
    longest = max(-(-(len(p) + n - 1) // slice_tokens) for p, n in zip(prompts, mosts))
    slices = longest + draw(st.integers(0, 2 * longest))
    return prompts, mosts, ends, slices, slice_tokens, draw(st.integers(1, 6)), draw(st.integers(1, 12))


def start(call, count=None):
    prompts, mosts, _, *limits = call
    core = _engine.Scheduler(*limits)
    rule = core.add_rule([EOS], [])
    for prompt, most in list(zip(prompts, mosts))[:count]:
        core.add(prompt, most, rule)
    return core


def commit(core, step, made, ends):
    """Draws a token for all; a sequence ends with its `ends`-th. Returns who finished."""
    tokens = []
    for number in step.draw_sequences:
        made[number] = made.get(number, 0) + 1
        tokens.append(EOS if made[number] >= ends[number] else 1)
    return core.commit(np.array(tokens, np.int64), np.zeros(len(tokens), np.float32))


@settings(max_examples=200, deadline=None)
@given(calls(shared=False))
def test_the_scheduler_follows_its_rules_step_by_step(call):
    prompts, mosts, ends, *limits = call
    core = start(call)
    model = SchedulerModel(*limits, [Modelled(len(p), n) for p, n in zip(prompts, mosts)])
    made: dict[int, int] = {}
    while core.unfinished:
        step = core.plan()
        assert list(zip(step.rows.tolist(), step.context_lens.tolist())) == model.step()
        assert (core.used_slices, core.preemptions) == (model.used, model.preemptions)
        finished = commit(core, step, made, ends)
        for number in finished:
            model.finish(number)
        assert {n: model.sequences[n].made for n in made} == made
    assert model.used == 0


def finishing_steps(call, count=None):
    """number -> the step with which it finished."""
    core, made, found, steps = start(call, count), {}, {}, 0
    while core.unfinished:
        steps += 1
        for number in commit(core, core.plan(), made, call[2]):
            found[number] = steps
    return found


@settings(max_examples=150, deadline=None)
@given(calls(shared=True), st.integers(0, 8))
def test_no_one_starves(call, last):
    """A sequence finishes within a number of steps that its own tokens and those of the sequences before it bound: how
    many come after it, and how long they are, does not matter."""
    prompts, mosts, ends = call[:3]
    finished, allowed = finishing_steps(call), 0
    for number, (prompt, most, end) in enumerate(zip(prompts, mosts, ends)):
        allowed += len(prompt) + 2 * min(most, end)  # one token a step; and a step lost whenever another gives way
        assert finished[number] <= allowed


@settings(max_examples=150, deadline=None)
@given(calls(shared=True))
def test_the_oldest_gets_on_in_every_step(call):
    core, made = start(call), {}
    fed: dict[int, int] = {}
    waited = 0
    while core.unfinished:
        oldest = next(n for n in range(len(call[0])) if core.outcome(n)[2] == "")
        step = core.plan()
        now = dict(zip(step.rows.tolist(), step.context_lens.tolist()))
        waited = waited + 1 if now.get(oldest, 0) <= fed.get(oldest, 0) and oldest not in step.draw_sequences else 0
        assert waited <= 1  # a step in which another writes the very slice that it is about to share
        fed.update(now)
        commit(core, step, made, call[2])


def test_the_arena_is_kept_full_while_many_wait():
    slices, count = 60, 60
    prompts = [[3 + i] * 20 for i in range(count)]
    core = start((prompts, [40] * count, None, slices, 4, 64, 64))
    ends, made, used, seen = {n: 10 + n % 30 for n in range(count)}, {}, [], 0
    while core.unfinished:
        step = core.plan()
        seen = max(seen, int(step.rows.max()))
        if seen < count - 1:  # someone waits still
            used.append(core.used_slices / slices)
        commit(core, step, made, ends)
    assert np.mean(used) > 0.85
    assert core.recomputed_tokens < 0.15 * (core.prompt_tokens_computed + core.generated_tokens)


def fastest_step(queued: int) -> float:
    """Seconds of the quickest of many steps, planned, packed and committed, with `queued` sequences in all."""
    core = _engine.Scheduler(64, 4, 16, 64)
    rule = core.add_rule([EOS], [])
    for i in range(queued):
        core.add(np.array([1 + i, 2, 3, 4, 5, 6], np.int32), 12, rule)
    column = np.zeros(queued)
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "stream", "sample_index", "greedy")
    core.set_draws(**dict.fromkeys(names, column))
    buffer, times = np.zeros(1 << 16, np.uint8), []
    for _ in range(120):
        start = time.perf_counter()
        sizes = core.plan().sizes
        core.pack(buffer, *sizes)
        for number in core.commit(np.ones(sizes[4], np.int64), np.zeros(sizes[4], np.float32)):
            core.take(number)
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_step_costs_the_same_however_many_wait():
    assert fastest_step(50_000) < 4 * fastest_step(400)  # work for each of them would be a hundred times as much

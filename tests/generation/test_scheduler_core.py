"""The engine's C++ core by itself: no slice is lost or freed twice, and every row reads exactly its own tokens.

A stand-in for the model remembers, for every slot of the arena, the whole prefix whose keys were written there. A row
that finds anything but its own prefixes in its slices would have read another sequence's keys.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels import _engine

EOS = 0


def next_token(prefix: tuple[int, ...], number: int, vocabulary: int) -> int:
    return hash((prefix, number)) % vocabulary


def run_to_end(core, prompts: list[list[int]], slices: int, slice_tokens: int, vocabulary: int = 9) -> list[list[int]]:
    """Steps until all is done, checking every step; returns each sequence's prompt and completion."""
    known = [list(prompt) for prompt in prompts]
    written = np.zeros(slices * slice_tokens, dtype=object)
    offsets = np.arange(slice_tokens)
    while core.unfinished:
        step = core.plan()
        if step.copies:
            source, target = (np.array(side)[:, None] * slice_tokens + offsets for side in zip(*step.copies))
            written[target] = written[source]
        borders = list(zip(step.cu_q, step.cu_q[1:]))
        for number, (begin, end) in zip(step.rows, borders):
            for i in range(begin, end):
                position = step.position_ids[i]
                assert step.input_ids[i] == known[number][position]
                written[step.slots[i]] = tuple(known[number][: position + 1])
        for number, table, length in zip(step.rows, step.slice_table, step.context_lens):
            for position in range(length):
                slot = table[position // slice_tokens] * slice_tokens + position % slice_tokens
                assert written[slot] == tuple(known[number][: position + 1])
        assert core.used_slices <= slices
        drawn = []
        for row, number, position in zip(step.draw_rows, step.draw_sequences, step.draw_positions):
            assert position == len(known[number])
            at = step.logit_rows[row]
            reader = step.rows[next(r for r, (begin, end) in enumerate(borders) if begin <= at < end)]
            assert known[reader][: step.position_ids[at] + 1] == known[number]
            drawn.append(next_token(tuple(known[number]), int(number), vocabulary))
        numbers = step.draw_sequences.tolist()
        assert len(set(numbers)) == len(numbers)
        core.commit(np.array(drawn, np.int64), np.zeros(len(drawn), np.float32))
        for number, token in zip(numbers, drawn):
            known[number].append(token)
        core.check()
    assert core.used_slices == 0
    return known


def expected(prompt: list[int], number: int, new: int, vocabulary: int = 9) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tuple(tokens), number, vocabulary))
        if tokens[-1] == EOS:
            break
    return tokens


@st.composite
def calls(draw):
    """A generate call: prompts that share heads, some of them equal, and a budget from the longest one up."""
    slice_tokens = draw(st.integers(1, 5))
    heads = draw(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=3))
    prompts, news = [], []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(heads)) + draw(st.lists(st.integers(1, 2), max_size=4))
        new = draw(st.integers(1, 8))
        for _ in range(draw(st.integers(1, 4))):
            prompts.append(prompt)
            news.append(new)
    longest = max(-(-(len(p) + n - 1) // slice_tokens) for p, n in zip(prompts, news))
    slices = longest + draw(st.integers(0, 2 * longest))
    return prompts, news, slices, slice_tokens, draw(st.integers(1, 6)), draw(st.integers(1, 12))


@settings(max_examples=300, deadline=None)
@given(calls())
def test_every_row_reads_its_own_tokens_and_every_slice_comes_back(call):
    prompts, news, slices, slice_tokens, max_active, step_tokens = call
    core = _engine.Scheduler(slices, slice_tokens, max_active, step_tokens)
    rule = core.add_rule([EOS], [])
    for prompt, new in zip(prompts, news):
        core.add(prompt, new, rule)
    known = run_to_end(core, prompts, slices, slice_tokens)
    assert known == [expected(p, i, n) for i, (p, n) in enumerate(zip(prompts, news))]
    assert [core.outcome(i)[0] for i in range(len(prompts))] == [k[len(p) :] for k, p in zip(known, prompts)]
    assert core.peak_slices <= slices


@pytest.mark.slow
@settings(max_examples=20000, deadline=None)
@given(calls())
def test_every_row_reads_its_own_tokens_at_length(call):
    test_every_row_reads_its_own_tokens_and_every_slice_comes_back.hypothesis.inner_test(call)


def make(prompts, slices, slice_tokens=4, new=4, max_active=8, step_tokens=64):
    core = _engine.Scheduler(slices, slice_tokens, max_active, step_tokens)
    rule = core.add_rule([], [])
    for prompt in prompts:
        core.add(prompt, new, rule)
    return core


def test_equal_prompts_are_computed_once_with_the_tail():
    prompts = [list(range(10, 20))] * 4
    core = make(prompts, 40)
    run_to_end(core, prompts, 40, 4)
    assert (core.prompt_tokens_computed, core.prefix_tokens_shared) == (10, 30)


def test_equal_prompts_are_computed_once_when_they_cannot_run_together():
    prompts = [list(range(10, 20))] * 4
    core = make(prompts, 40, max_active=1)
    run_to_end(core, prompts, 40, 4)
    assert (core.prompt_tokens_computed, core.prefix_tokens_shared) == (10, 30)


def test_different_prompts_share_the_full_slices_of_an_equal_head():
    head = list(range(10, 20))  # two full slices and two tokens
    prompts = [[*head, 1], [*head, 2, 3], [*head, 4]]
    core = make(prompts, 40)
    run_to_end(core, prompts, 40, 4)
    assert core.prefix_tokens_shared == 2 * 8


def test_a_head_nobody_waits_for_is_not_kept():
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    core = make(prompts, 8, max_active=1)
    core.plan()
    while core.outcome(0)[2] == "":
        core.commit(np.array([1], np.int64), np.zeros(1, np.float32))
        if core.outcome(0)[2] == "":
            core.plan()
    assert core.used_slices == 0


def test_the_youngest_gives_way_and_keeps_its_tokens():
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    core = make(prompts, 6, new=16)
    known = run_to_end(core, prompts, 6, 4)
    assert core.preemptions > 0
    assert core.recomputed_tokens > 0
    assert [len(k) for k in known] == [19, 19, 19]


def test_a_prompt_longer_than_a_step_enters_in_pieces():
    core = make([list(range(20))], 8, step_tokens=6)
    pieces = []
    while not len(core.plan().draw_rows):
        pieces.append(1)
        core.commit(np.empty(0, np.int64), np.empty(0, np.float32))
    assert len(pieces) == 3


@pytest.mark.parametrize(("token", "reason"), [(3, "eos"), (5, "stop"), (1, "length")])
def test_finish_reasons(token, reason):
    core = _engine.Scheduler(8, 4, 8, 64)
    core.add([1, 2], 2, core.add_rule([3], [5]))
    while core.unfinished:
        core.plan()
        core.commit(np.array([token], np.int64), np.zeros(1, np.float32))
    assert core.outcome(0)[2] == reason
    assert len(core.outcome(0)[0]) == (2 if reason == "length" else 1)


def test_commit_refuses_a_wrong_number_of_tokens():
    core = make([[1, 2]], 8)
    core.plan()
    with pytest.raises(ValueError, match="2 tokens for 1 draws"):
        core.commit(np.zeros(2, np.int64), np.zeros(2, np.float32))


def test_a_sequence_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        make([[1, 2, 3]], 1, new=3)

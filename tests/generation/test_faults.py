"""Whatever is raised, wherever: the generator can be used again, and gives the tokens of one that nothing happened to.

A tracer counts the lines that a call runs in the engine's own files and raises at one of them, drawn at random.
"""

import random
import sys
from pathlib import Path

import pytest
from generation_models import generator, greedy, model, prompts

from rlhf_kernels.generation import SamplingParams, engine, graphs

OWN = ("engine", "scheduler", "step_buffers", "graphs", "arena")
FILES = {str(Path(engine.__file__).with_name(f"{name}.py")) for name in OWN}
GIVEN = prompts([9, 20, 4, 5, 9])
EACH = [
    SamplingParams(max_new_tokens=6, n=2, greedy_baseline=True),
    SamplingParams(max_new_tokens=9, temperature=0.8, top_k=7),
    SamplingParams(max_new_tokens=3),
    greedy(max_new_tokens=7),
    SamplingParams(max_new_tokens=5, seed=4),
]
BUDGET = 9  # slices: some give way


class Fault(Exception):
    """Nothing catches it by mistake."""


class RaiseAt:
    """Raises `error` at the n-th line of FILES; with n None it only counts them."""

    def __init__(self, n=None, error=Fault):
        self.n, self.error, self.lines = n, error, 0

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, argument):
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                sys.settrace(None)
                raise self.error
        return self._line


def call(gen):
    return gen.generate(GIVEN, EACH)


def read(gen):
    return sorted(gen.stream(GIVEN, EACH), key=lambda r: (r.prompt_index, r.sample_index))


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("switch", ["0", "1"], ids=["eager", "static"])
@pytest.mark.parametrize("run", [call, read], ids=["generate", "stream"])
def test_a_fault_at_any_line_leaves_the_generator_whole(run, switch, error, monkeypatch):
    monkeypatch.setenv(graphs.SWITCH, switch)
    lm = model().train()
    want = generator(lm, BUDGET).generate(GIVEN, EACH)
    gen = generator(lm, BUDGET)
    assert run(gen) == want
    gen.sleep()
    with RaiseAt() as whole:
        run(gen)
    gen.sleep()
    draw, faults = random.Random(f"{run} {switch} {error}"), 0
    for _ in range(8):
        at = draw.randrange(1, whole.lines)
        try:
            with RaiseAt(at, error):
                run(gen)
        except error as caught:
            kept = caught  # with its traceback, as a notebook keeps it  # noqa: F841
            faults += 1
        assert lm.training
        assert lm.config._attn_implementation == "eager"
        gen.close()
        gen.sleep()
        assert not gen._arena.held
        assert run(gen) == want
        assert gen.stats.peak_kv_bytes <= gen.kv_memory
        gen.sleep()
    assert faults == 8


@pytest.mark.parametrize("switch", ["0", "1"], ids=["eager", "static"])
def test_a_fault_in_the_model_or_the_core_leaves_the_generator_whole(switch, monkeypatch):
    monkeypatch.setenv(graphs.SWITCH, switch)
    lm, draw = model(), random.Random(0)
    gen = generator(lm, BUDGET)
    want = gen.generate(GIVEN, EACH)
    steps = gen.stats.steps

    def fail(*_):
        calls.append(1)
        if len(calls) == at:
            raise Fault

    for module in (lm.model.layers[1].self_attn, lm.lm_head, lm.model.embed_tokens) * 2:
        calls, at = [], draw.randrange(1, steps)
        handle = module.register_forward_hook(fail)
        with pytest.raises(Fault):
            gen.generate(GIVEN, EACH)
        handle.remove()
        assert gen.generate(GIVEN, EACH) == want


def read_until(gen, stop):
    for i, _ in enumerate(gen.stream(GIVEN, EACH), 1):
        if i == stop:
            raise Fault


def test_a_reader_that_raises_leaves_the_generator_whole():
    gen = generator(model(), BUDGET)
    want = gen.generate(GIVEN, EACH)
    for stop in range(1, len(want)):
        with pytest.raises(Fault):
            read_until(gen, stop)
        assert gen.generate(GIVEN, EACH) == want


def test_a_stream_out_of_reach_can_be_closed():
    gen = generator(model(), BUDGET)
    want = gen.generate(GIVEN, EACH)
    stream = gen.stream(GIVEN, EACH)  # still held, as a traceback would hold it
    next(stream)
    with pytest.raises(RuntimeError, match=r"in the middle of a stream.*this generator"):
        gen.generate(GIVEN, EACH)
    gen.close()
    assert gen.generate(GIVEN, EACH) == want
    assert list(stream) == []
    gen.close()  # nothing is open

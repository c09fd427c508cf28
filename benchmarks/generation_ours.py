"""How rlhf_kernels generates: all prompts in one call, samples that share a prompt, a long queue, an adapter."""

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from benchmarks.case import OURS, Check, Prepare, Run, Unavailable
from benchmarks.generation_work import Draws, Work, own_copy
from rlhf_kernels.generation import GenerationStats, Rollout, SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec

WARM_TOKENS = 4
RANK = 16


@dataclass
class Sliced:
    """One of our contestants; `stats` are those of its last run."""

    model: Any
    draws: Draws
    kv_memory: int
    active: int
    stats: GenerationStats = field(default_factory=GenerationStats)

    def prepare(self) -> Run:
        """A run of all prompts; what it made has the wanted lengths."""
        params = sampled(self.draws.new)

        def run() -> list[Rollout]:
            rollouts = self.generate(generator, self.draws.prompts, params)
            assert [len(rollout.tokens) for rollout in rollouts] == self.draws.new
            return rollouts

        generator = self.generator()
        return run

    def generator(self) -> SlicedGenerator:
        """Warmed up: its arena is there, and steps of its size have run."""
        generator = SlicedGenerator(self.model, self.kv_memory, max_active=self.active)
        few = self.draws.first(2 * self.active)
        generator.generate(few.prompts, sampled([min(new, WARM_TOKENS) for new in few.new]))
        return generator

    def generate(self, generator: SlicedGenerator, prompts: list[list[int]], params: Any) -> list[Rollout]:
        rollouts = generator.generate(prompts, params)
        self.stats = generator.stats
        return rollouts


def sampled(lengths: list[int]) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=new, ignore_eos=True) for new in lengths]


@dataclass(frozen=True)
class Sharing:
    """Several rollouts of every prompt: a greedy and a sampled one, as ReMax wants them, or `n` sampled ones."""

    work: Work
    n: int
    greedy: bool = False

    @property
    def rollouts(self) -> int:
        return self.n + self.greedy

    def params(self) -> SamplingParams:
        new = self.work.new[1]
        return SamplingParams(max_new_tokens=new, ignore_eos=True, n=self.n, greedy_baseline=self.greedy)

    def contestants(self, model: Any, kv_memory: int, active: int, stats: list[GenerationStats]) -> dict[str, Prepare]:
        """Ours appends its `stats`. "Separate prompts" are as many as there are rollouts, all different, so that
        nothing can be shared; a pair may also be made by two calls, as trainers do whose engine has no such pair."""
        prompts = self.work.draw()
        many = Work(self.rollouts * self.work.prompts, self.work.prompt, self.work.new, vocabulary=self.work.vocabulary)
        sliced, apart = Sliced(model, prompts, kv_memory, active), Sliced(model, many.draw(), kv_memory, active)
        new = self.work.new[1]
        sample, greedy = (
            SamplingParams(max_new_tokens=new, ignore_eos=True, temperature=float(hot)) for hot in (True, False)
        )
        each = [greedy if self.greedy and i % 2 else sample for i in range(many.prompts)]

        def shared() -> Run:
            generator = sliced.generator()

            def run() -> object:
                rollouts = sliced.generate(generator, prompts.prompts, self.params())
                stats.append(sliced.stats)
                return rollouts

            return run

        def separate() -> Run:
            generator = apart.generator()
            return lambda: generator.generate(apart.draws.prompts, each)

        def two_calls() -> Run:
            generator = sliced.generator()
            return lambda: [generator.generate(prompts.prompts, one) for one in (sample, greedy)]

        found: dict[str, Prepare] = {OURS: shared, SEPARATE: separate}
        return found | ({TWO_CALLS: two_calls} if self.greedy else {})

    def checks(self, stats: list[GenerationStats]) -> list[Check]:
        """Every prompt goes through the model once, whatever the number of its rollouts."""
        if not stats:
            raise Unavailable("did not run")
        once = sum(map(len, self.work.draw().prompts))
        return [Check("prompt tokens computed twice", stats[-1].prompt_tokens_computed - once, 0, "count")]


SEPARATE, TWO_CALLS = "separate prompts", "two calls"


def queued(sliced: Sliced, rollouts: int) -> Prepare:
    """Streams until so many rollouts are there and leaves the rest of the queue. Keeps the time of the steps after the
    first rollout: the prompts are checked and queued once a call, before it."""

    def prepare() -> Run:
        generator, params = sliced.generator(), sampled(sliced.draws.new)

        def run() -> object:
            stream = generator.stream(sliced.draws.prompts, params)
            found = [next(stream)]
            begin = replace(generator.stats)
            found += islice(stream, rollouts - 1)
            end = generator.stats
            sliced.stats = GenerationStats(
                seconds=end.seconds - begin.seconds,
                host_seconds=end.host_seconds - begin.host_seconds,
                steps=end.steps - begin.steps,
            )
            stream.close()  # type: ignore[attr-defined]
            return found

        return run

    return prepare


def host_share(stats: GenerationStats) -> list[Check]:
    """What planning, arrays, book-keeping and handing out take of the steps' time."""
    if not stats.steps:
        raise Unavailable("did not run")
    return [Check("host share of a step", stats.host_seconds / stats.seconds, 0.05, "share")]


def with_adapter(model: Any) -> HydraModel:
    """Hydra's actor on the same weights, with an adapter that changes what they give."""
    hydra = HydraModel({"base": own_copy(model)}, adapters={"actor": LoraSpec(r=RANK, alpha=2 * RANK)})
    torch.manual_seed(1)
    for parameter in hydra.trainable_parameters("actor"):
        torch.nn.init.normal_(parameter, std=0.02)
    return hydra

"""`SlicedGenerator` beside transformers' `generate` and continuous batching: useful tokens a second, and what it keeps.

The workload with targets first: prompts of mixed lengths, each with its own number of new tokens. Then other
distributions of lengths, budgets from whole down to a sixteenth, rows at a time, samples that share a prompt, a long
queue, and an adapter. Peers that a few prompts measure as well as all get a few; their names say so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks import generation_budget as budget
from benchmarks.case import OURS, Case, Check, Prepare, Target
from benchmarks.generation_ours import RANK, SEPARATE, Sharing, Sliced, host_share, queued, with_adapter
from benchmarks.generation_peers import CONTINUOUS, DEFAULTS, GENERATE, Continuous, Static
from benchmarks.generation_work import Lengths, Llama, Work, whole_bytes
from rlhf_kernels.generation import GenerationStats

PLAIN = "plain model"


@dataclass(frozen=True)
class Scale:
    """What a device is given. `batches`: generate's and how many prompts each takes; speeds refer to the first."""

    model: Llama
    prompt: tuple[int, int]
    new: tuple[int, int]
    prompts: int
    active: int
    batches: tuple[Static, ...]
    targets: tuple[Target, ...]
    continuous: tuple[int, ...]  # at a time
    few: int  # of the peers' prompts, and of the smaller cases
    shared_prompt: int
    shared_new: int
    rows: tuple[int, ...]
    queue: int = 10_000

    def work(self, prompts: int, lengths: Lengths = "uniform") -> Work:
        return Work(prompts, self.prompt, self.new, lengths, self.model.vocabulary)

    def tiny(self) -> "Scale":
        """The same cases in a second: for tests, and to warm up before memory is measured."""
        batches = tuple(replace(static, batch=4, prompts=min(static.prompts, 6)) for static in self.batches)
        return replace(self, model=self.model.tiny(), batches=batches, active=3)


SCALES = {
    "cpu": Scale(
        Llama(8, 512, 1376, 8, 8, 8192), (16, 96), (1, 128), prompts=512, active=64,
        batches=(
            Static(64, 128), Static(128, 128), Static(64, 128, "prompt"), Static(64, 128, "length"),
        ),
        targets=(
            Target(GENERATE, at_least=5), Target(f"{CONTINUOUS},", at_least=15),
            Target(CONTINUOUS + DEFAULTS, at_least=15),
        ),
        continuous=(32, 64), few=64, shared_prompt=96, shared_new=32, rows=(1, 2, 4, 8, 16, 32, 64),
    ),
    "cuda": Scale(  # Llama-3-8B
        Llama(32, 4096, 14336, 32, 8, 128256, 8192), (1024, 1024), (1, 1024), prompts=512, active=256,
        batches=(
            Static(256, 256), Static(128, 128), Static(256, 256, compiled=True), Static(128, 128, compiled=True),
            Static(128, 128, "length"),
        ),
        targets=(Target(GENERATE, at_least=4),),
        continuous=(256,), few=64, shared_prompt=1024, shared_new=128, rows=(1, 8, 64, 256),
    ),
}  # fmt: skip
BUDGET_S = 40.0  # of one contestant's timed runs in the workload: slow peers get one round
SHORT_BUDGET_S = 8.0
TINY_SHARE = 0.02  # of the free memory, for a cache in a test beside others
ROUNDS = 3


def cases(device: str = "cpu") -> Iterator[Case]:
    scale = SCALES[device]
    yield _workload(scale, device)
    if device == "cpu":
        yield _few(scale, device)
    for lengths in ("equal", "long tail"):
        yield _lengths(scale, device, lengths)
    yield _budgets(scale, device)
    yield _rows(scale, device)
    pair = Sharing(Work(scale.few, *_fixed(scale), vocabulary=scale.model.vocabulary), n=1, greedy=True)
    four = Sharing(Work(scale.few // 2, *_fixed(scale), vocabulary=scale.model.vocabulary), n=4)
    yield _sharing(scale, device, "ReMax pair, greedy and sampled", pair, 1.3)
    yield _sharing(scale, device, "n = 4", four, 1.6)
    yield _queue(scale, device)
    yield _adapter(scale, device)


def _fixed(scale: Scale) -> tuple[tuple[int, int], tuple[int, int]]:
    return (scale.shared_prompt, scale.shared_prompt), (scale.shared_new, scale.shared_new)


def _case(name: str, build: Callable[[bool], dict[str, Prepare]], base: str, tokens: dict[str, int], **rest) -> Case:
    options = {"memory": False, "budget_s": SHORT_BUDGET_S, "rounds": ROUNDS, "warmed": True} | rest
    return Case(name, build, base, tokens=tokens, **options)


def _against_peers(
    name: str, scale: Scale, device: str, work: Work, batches: tuple[Static, ...], active: tuple[int, ...], **rest
) -> Case:
    """Ours on all of the work, peers on as much as they take, all with the same bytes of keys and values for
    `scale.active` of the longest sequences; a larger static batch takes more of them."""
    kv_memory = whole_bytes(scale.model, work, scale.active)
    draws, of = work.draw(), work.prompts
    kv_tokens = kv_memory // scale.model.token_bytes()
    continuous = [Continuous(n, min(of, 2 * n), kv_tokens) for n in active]
    continuous += [Continuous(n, min(of, 2 * n), kv_tokens, tuned=False) for n in active[-1:]]
    peers: list[Static | Continuous] = [*batches, *continuous]

    def build(tiny: bool) -> dict[str, Prepare]:
        used, small = (scale.tiny(), work.tiny()) if tiny else (scale, work)
        model, given = used.model.build(device), small.draw()
        bytes_, most = whole_bytes(used.model, small, used.active), len(given.prompts)
        found = {OURS: Sliced(model, given, bytes_, used.active).prepare}
        for peer in peers:
            mine = replace(peer, prompts=min(peer.prompts, most))
            if tiny and isinstance(mine, Continuous):
                mine = replace(mine, memory_share=TINY_SHARE)
            found[peer.name(of)] = mine.contestant(model, given)
        return found

    tokens = {peer.name(of): draws.first(peer.prompts).tokens for peer in peers} | {OURS: draws.tokens}
    return _case(name, build, batches[0].name(of), tokens, **rest)


def _workload(scale: Scale, device: str) -> Case:
    work = scale.work(scale.prompts)
    name = f"{work.text()}, at most {scale.active} active"
    options = {"targets": scale.targets, "budget_s": BUDGET_S}
    return _against_peers(name, scale, device, work, scale.batches, scale.continuous, **options)


def _few(scale: Scale, device: str) -> Case:
    """Nothing to refill: one batch."""
    work = scale.work(scale.few)
    batches = tuple(Static(scale.few // part, scale.few) for part in (1, 2, 4))
    target = Target(GENERATE, at_least=3.5)
    return _against_peers(work.text(), scale, device, work, batches, (), targets=(target,))


def _lengths(scale: Scale, device: str, lengths: Lengths) -> Case:
    work = scale.work(4 * scale.few, lengths)
    return _against_peers(work.text(), scale, device, work, (Static(scale.few, scale.few),), ())


def _budgets(scale: Scale, device: str) -> Case:
    work = scale.work(scale.few // 2)
    names = [OURS, *(f"1/{share} of the bytes" for share in budget.SHARES[1:])]

    def build(tiny: bool) -> dict[str, Prepare]:
        used, small = (scale.tiny(), work.tiny()) if tiny else (scale, work)
        model, draws = used.model.build(device), small.draw()
        bytes_ = budget.budgets(used.model, draws)
        return {name: Sliced(model, draws, kv, budget.ACTIVE).prepare for name, kv in zip(names, bytes_)}

    def checks() -> list[Check]:
        return budget.checks(_fp32(scale.model), scale.work(scale.few // 4), device)

    megabytes = budget.budgets(scale.model, work.draw())[0] / 2**20
    name = f"budgets of KV bytes from {megabytes:.0f} MiB down: {work.text()}"
    tokens = dict.fromkeys(names, work.draw().tokens)
    return _case(name, build, OURS, tokens, checks=checks)


def _fp32(model: Llama) -> Llama:
    """Of a large model a few layers: that tokens and bytes are right does not depend on how many there are."""
    return replace(model, layers=min(model.layers, 8))


def _rows(scale: Scale, device: str) -> Case:
    """As many prompts as rows, all of one length, so that every step has them all."""
    works = {n: scale.work(n, "equal") for n in scale.rows}
    names = {n: f"{OURS}, {n} row{'s' * (n > 1)}" for n in scale.rows}
    static = {n: Static(n, n) for n in (scale.rows[0], scale.rows[len(scale.rows) // 2], scale.rows[-1])}

    def build(tiny: bool) -> dict[str, Prepare]:
        used = scale.tiny() if tiny else scale
        model, found = used.model.build(device), {}
        for n, work in works.items():
            small = work.tiny() if tiny else work
            draws, bytes_ = small.draw(), whole_bytes(used.model, small, n)
            found[names[n]] = Sliced(model, draws, bytes_, n).prepare
            if n in static:
                found[static[n].name(n)] = static[n].contestant(model, draws)
        return found

    tokens = {names[n]: work.draw().tokens for n, work in works.items()}
    tokens |= {peer.name(n): works[n].draw().tokens for n, peer in static.items()}
    return _case("rows at a time", build, names[scale.rows[0]], tokens)


def _sharing(scale: Scale, device: str, name: str, sharing: Sharing, at_least: float) -> Case:
    stats: list[GenerationStats] = []

    def build(tiny: bool) -> dict[str, Prepare]:
        used = scale.tiny() if tiny else scale
        mine = replace(sharing, work=sharing.work.tiny()) if tiny else sharing
        bytes_ = whole_bytes(used.model, mine.work, used.active)
        return mine.contestants(used.model.build(device), bytes_, used.active, [] if tiny else stats)

    whole = f"{name}: {sharing.work.text()}"
    names = sharing.contestants(None, 0, 1, [])
    tokens = dict.fromkeys(names, sharing.rollouts * sharing.work.draw().tokens)
    targets = (Target(SEPARATE, at_least=at_least),) if device == "cpu" else ()
    return _case(whole, build, SEPARATE, tokens, targets=targets, checks=lambda: sharing.checks(stats))


def _queue(scale: Scale, device: str) -> Case:
    last: list[Sliced] = []
    lengths = (scale.queue, 2 * scale.active)
    names = {lengths[0]: OURS, lengths[1]: f"{lengths[1]} prompts queued"}
    rollouts = scale.active

    def build(tiny: bool) -> dict[str, Prepare]:
        used, found = scale.tiny() if tiny else scale, {}
        model = used.model.build(device)
        for queue in lengths:
            work = scale.work(9).tiny() if tiny else scale.work(queue)
            draws = work.draw()
            sliced = Sliced(model, draws, whole_bytes(used.model, work, used.active), used.active)
            found[names[queue]] = queued(sliced, 2 if tiny else rollouts)
            if queue == scale.queue and not tiny:
                last[:] = [sliced]
        return found

    def checks() -> list[Check]:
        return host_share(last[0].stats if last else GenerationStats())

    name = f"{scale.queue} prompts queued, until {rollouts} are done"
    return _case(name, build, names[lengths[1]], {}, checks=checks)


def _adapter(scale: Scale, device: str) -> Case:
    work = scale.work(scale.few)

    def build(tiny: bool) -> dict[str, Prepare]:
        used, small = (scale.tiny(), work.tiny()) if tiny else (scale, work)
        model, draws = used.model.build(device), small.draw()
        bytes_ = whole_bytes(used.model, small, used.active)
        plain = Sliced(model, draws, bytes_, used.active)
        return {OURS: replace(plain, model=with_adapter(model)).prepare, PLAIN: plain.prepare}

    name = f"Hydra's actor, adapter of rank {RANK}: {work.text()}"
    return _case(name, build, PLAIN, dict.fromkeys((OURS, PLAIN), work.draw().tokens))

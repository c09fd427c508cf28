"""`lora_linear` beside every peer: one layer forward and backward, decoding, several roles in one call, whole blocks.

Shapes are layers of 0.5B, 3B and 8B models; a CPU gets fewer rows than a GPU. Every contestant gets the same x, frozen
weight, adapters and gradient of y. "Frozen linear" is the yardstick: the layer without adapters, which is the least
that the work can take.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import lora_block as blocks
from benchmarks import lora_peers as peers
from benchmarks import lora_sweep as sweep
from benchmarks.case import OURS, Case, Check, Prepare, Run, Target
from benchmarks.lora_block import ACTOR, CRITIC, Block
from benchmarks.lora_layer import Layer, Work, captured, make_inputs, runs

NAMES: dict[Work, str] = {"forward": "forward only", "both": "forward + backward"}
RANKS = (8, 16, 64, 128)
MODELS = {  # the widest layer, in -> out, and the narrowest of each
    "0.5B": ((896, 4864), (896, 896)),
    "3B": ((3072, 8192), (3072, 3072)),
    "8B": ((4096, 14336), (4096, 4096)),
}
RANKS_OF = "3B"  # whose narrow layer takes every rank
LAYER_ROWS = {"cpu": 512, "cuda": 8192}
WIDTH = {"cpu": 2048, "cuda": 4096}  # of the layers with targets
CONTRACT_ROWS = {"cpu": 1024, "cuda": 8192}
DECODE_ROWS = (1, 4, 16, 64)
DECODE_ADAPTERS = 8
ROLE_ROWS = (1024, 16, 4)
MANY_ADAPTERS = 32
SWEEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROUNDS = {"cpu": 5, "cuda": 6}
TARGET_ROUNDS = {"cpu": 15, "cuda": 20}
BUDGET_S = {"cpu": 2.5, "cuda": 1.0}  # of one contestant's timed runs in a case; six minutes in all
LONG_BUDGET_S = {"cpu": 8.0, "cuda": 3.0}  # in cases with targets, and of blocks

ALONE = (Target(peers.PEFT_LOW, at_least=1.0), Target(peers.ADDMM, at_least=1.0))
CONTRACT_TARGETS = {
    ("cpu", 16): (Target(peers.FROZEN, at_most=1.10), Target(peers.PEFT, at_least=1.25), *ALONE),
    ("cpu", 64): (Target(peers.FROZEN, at_most=1.15), Target(peers.PEFT, at_least=1.4), *ALONE),
    ("cuda", 16): (Target(peers.FROZEN, at_most=1.10), Target(peers.PEFT, at_least=1.6), *ALONE),
}
ROLE_TARGETS = {1024: 1.17, 16: 2.3, 4: 3.6}  # over three passes of PEFT


def cases(device: str = "cpu") -> Iterator[Case]:
    """Memory is measured for the layers with targets and for one adapter on a block."""
    width = WIDTH[device]
    for r in (16, 64):
        contract = Layer(CONTRACT_ROWS[device], width, width, r)
        yield _layer("both", contract, device, peers.ONE_ADAPTER, CONTRACT_TARGETS.get((device, r), ()), memory=True)
    yield from _roles(device)
    yield from _blocks(device)
    if device == "cpu":
        one = tuple(name for name in peers.ONE_ADAPTER if name not in (peers.OURS_FP32, peers.PEFT_LOW))
        yield _layer("both", Layer(1024, width, width, dtype=torch.float32), device, one)
    yield from _layers(device)
    yield from _many(device)
    yield from _decode(device)
    yield from _sweep(device)


def _layers(device: str) -> Iterator[Case]:
    for model, sizes in MODELS.items():
        for width, out in sizes:
            for r in RANKS if model == RANKS_OF and width == out else (16,):
                for work in NAMES:
                    layer = Layer(LAYER_ROWS[device], width, out, r)
                    yield _layer(work, layer, device, peers.ONE_ADAPTER, note=f" ({model})")


def _roles(device: str) -> Iterator[Case]:
    for rows in ROLE_ROWS:
        layer = Layer(3 * rows, WIDTH["cpu"], WIDTH["cpu"], adapters=2, routed="roles")
        faster = Target(peers.PEFT_PASSES, at_least=ROLE_TARGETS[rows])
        targets = (faster, Target(peers.PEFT_LOW_PASSES, at_least=1.0)) if device == "cpu" else ()
        name = f"actor, critic and no adapter, {rows} rows each, in one call"
        yield _layer("forward", layer, device, peers.ROLES, targets, name=name)


def _many(device: str) -> Iterator[Case]:
    layer = Layer(CONTRACT_ROWS[device], WIDTH[device], WIDTH[device], adapters=MANY_ADAPTERS, routed="scattered")
    for work in NAMES:
        yield _layer(work, layer, device, peers.MANY, name=f"{MANY_ADAPTERS} adapters, rows scattered, {NAMES[work]}")


def _decode(device: str) -> Iterator[Case]:
    wide = MODELS["8B"][0]
    for width, out in ((WIDTH["cpu"], WIDTH["cpu"]), wide):
        for rows in DECODE_ROWS:
            one = Layer(rows, width, out)
            yield _layer("forward", one, device, peers.DECODE, name="decode, one adapter")
            if rows > 1:
                mixed = replace(one, adapters=DECODE_ADAPTERS, routed="mixed")
                name = f"decode, {DECODE_ADAPTERS} adapters and none in turns"
                yield _layer("forward", mixed, device, peers.DECODE_MIXED, name=name)


def _sweep(device: str) -> Iterator[Case]:
    """From how many rows on which of our backends is the fastest; only where it is asked for."""
    for rows in SWEEP_ROWS:
        for work in NAMES:
            layer = Layer(rows, WIDTH[device], WIDTH[device])
            case = _layer(work, layer, device, (peers.FROZEN, OURS), name=f"sweep of rows, {NAMES[work]}")
            yield replace(case, build=partial(_with_tiers, case.build, layer, work, device), extra=True)


def _with_tiers(
    build: Callable[[bool], dict[str, Prepare]], layer: Layer, work: Work, device: str, tiny: bool
) -> dict[str, Prepare]:
    inputs = make_inputs(layer.tiny() if tiny else layer, device)
    found = {name: sweep.alone(module, work, inputs) for name, module in sweep.names(device).items()}
    return build(tiny) | found


def _layer(
    work: Work,
    layer: Layer,
    device: str,
    who: tuple[str, ...],
    targets: tuple[Target, ...] = (),
    memory: bool = False,
    name: str = "",
    note: str = "",
) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        inputs = make_inputs(layer.tiny() if tiny else layer, device)

        def prepare(load: peers.Loader) -> Run:
            linear = load(inputs)
            run = runs(linear, work, inputs)
            decodes = device == "cuda" and name.startswith("decode") and not tiny
            return captured(run) if decodes and linear.captures else run

        return {each: partial(prepare, peers.PEERS[each]) for each in who}

    base = peers.PEFT_PASSES if layer.routed == "roles" else peers.FROZEN
    return _case(f"{name or NAMES[work]}: {layer.text()}{note}", build, base, device, targets, memory)


def _blocks(device: str) -> Iterator[Case]:
    """A block of a 0.5B model and one 2,048 wide (a 1B model's)."""
    for small in (Block(896, 4864, 14, 2), Block(2048, 8192, 32, 8)):
        block = replace(small, sequences=8, tokens=1024) if device == "cuda" else small
        yield _block("Llama block, one adapter", block, device, memory=True)
        hydra = replace(block, r=128, adapters=(ACTOR, CRITIC))
        yield _block("Llama block, actor and critic on half the sequences each", hydra, device)


def _block(name: str, block: Block, device: str, memory: bool = False) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        return blocks.contestants(block.tiny() if tiny else block, device)

    checks = partial(blocks.same_step, block, device)
    return _case(f"{name}, forward + backward: {block.text()}", build, blocks.PEFT, device, (), memory, checks)


def _case(
    name: str,
    build: Callable[[bool], dict[str, Prepare]],
    base: str,
    device: str,
    targets: tuple[Target, ...],
    memory: bool,
    checks: Callable[[], list[Check]] | None = None,
) -> Case:
    """A case with targets gets more rounds; it and a block get more time."""
    rounds = (TARGET_ROUNDS if targets else ROUNDS)[device]
    long = targets or checks
    budget = (LONG_BUDGET_S if long else BUDGET_S)[device]
    return Case(name, build, base, targets, memory, budget, 3 if long else 1, rounds, checks)

"""Decode steps at static sizes: buffers overwritten between replays give what steps of their own size give.

Without CUDA a replay calls the captured function on the same buffers; on a device (--device cuda) it replays the graph.
"""

import pytest
import torch
from generation_models import SLICE, generator, greedy, model, prompts
from torch import nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator, graphs
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_kernels.nn.lora import lora_layers

LENGTHS = [5, 13, 1, 30, 9, 22, 7]
EACH = [
    greedy(max_new_tokens=9),
    SamplingParams(max_new_tokens=14, temperature=0.7, top_k=4, seed=3),
    SamplingParams(max_new_tokens=5, n=3, top_p=0.8),
    SamplingParams(max_new_tokens=20, temperature=1.3, min_p=0.05, greedy_baseline=True),
    SamplingParams(max_new_tokens=17, seed=-5),
    SamplingParams(max_new_tokens=1),
    SamplingParams(max_new_tokens=12, n=2, greedy_baseline=True),
]


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv(graphs.SWITCH, "1")


def eager(monkeypatch, make, *arguments, **options):
    """What the same generator gives with its steps at their own sizes."""
    with monkeypatch.context() as patch:
        patch.setenv(graphs.SWITCH, "0")
        gen = make()
        rollouts = gen.generate(*arguments, **options)
        assert gen.stats.replayed_steps == 0
        return rollouts


@pytest.mark.parametrize("budget", [400, 14], ids=["roomy", "tight"])
@pytest.mark.parametrize("max_active", [1, 3, 8, 11])
@pytest.mark.usefixtures("static")
def test_replays_give_the_tokens_of_eager_steps(budget, max_active, monkeypatch):
    lm, given = model(), prompts(LENGTHS)
    gen = generator(lm, budget, max_active=max_active)
    got = gen.generate(given, EACH)
    want = eager(monkeypatch, lambda: generator(lm, budget, max_active=max_active), given, EACH)
    assert [r.tokens for r in got] == [r.tokens for r in want]
    for ours, theirs in zip(got, want):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert 0 < gen.stats.replayed_steps < gen.stats.steps
    assert gen.stats.peak_kv_bytes <= gen.kv_memory


@pytest.mark.usefixtures("static")
def test_a_few_sizes_serve_every_number_of_rows():
    gen = generator(model(), max_active=12)
    news = list(range(2, 14))
    gen.generate(prompts([6] * 12), [SamplingParams(max_new_tokens=n) for n in news])
    assert sorted(size[0] for size in gen._graphs._captured) == [1, 2, 4, 8, 12]
    assert gen.stats.replayed_steps == max(news) - 1


@pytest.mark.usefixtures("static")
def test_replays_go_on_across_calls_until_what_they_read_changes():
    lm = model()
    gen = generator(lm, max_active=4)
    call = prompts([6, 9]), greedy(max_new_tokens=8)
    first = gen.generate(*call)
    kept = dict(gen._graphs._captured)
    assert gen.generate(*call) == first
    assert gen._graphs._captured == kept
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(1.3)
    assert gen.generate(*call) == generator(lm, max_active=4).generate(*call) != first
    assert gen._graphs._captured.keys() == kept.keys()
    assert not set(gen._graphs._captured.values()) & set(kept.values())


@pytest.mark.usefixtures("static")
def test_replaced_parameters_are_read(monkeypatch):
    lm = model()
    gen = generator(lm)
    call = prompts([6, 9]), greedy(max_new_tokens=8)
    first = gen.generate(*call)
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach().flip(0).clone())
    assert gen.generate(*call) == eager(monkeypatch, lambda: generator(lm), *call) != first


@pytest.mark.usefixtures("static")
def test_sleep_gives_the_graphs_back_too():
    gen = generator(model())
    first = gen.generate(prompts([6]), greedy(max_new_tokens=8))
    gen.sleep()
    assert not gen._graphs._captured
    assert gen.generate(prompts([6]), greedy(max_new_tokens=8)) == first


@pytest.mark.usefixtures("static")
def test_roles_do_not_share_a_graph(monkeypatch):
    torch.manual_seed(0)
    adapters = {"actor": LoraSpec(r=4, alpha=8), "critic": LoraSpec(r=3, alpha=3)}
    hydra = HydraModel({"base": model()}, adapters=adapters)
    for layer in lora_layers(hydra).values():
        nn.init.normal_(layer.lora_B["actor"], std=0.1)

    def make():
        return SlicedGenerator(hydra, "1MiB", slice_tokens=SLICE)

    gen, call = make(), (prompts([6, 9]), greedy(max_new_tokens=8))
    for role in ("actor", "reference", "actor"):
        got = gen.generate(*call, role=role)
        assert gen.stats.replayed_steps > 0
        assert got == eager(monkeypatch, make, *call, role=role)


def test_graphs_are_for_cuda_unless_asked_for(monkeypatch):
    wanted = graphs.DecodeGraphs().wanted
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(graphs, "checks_values", lambda tensor: False)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    for value, answers in {"": (False, True), "0": (False, False), "1": (True, True)}.items():
        monkeypatch.setenv(graphs.SWITCH, value)
        assert (wanted(cpu), wanted(cuda)) == answers
    monkeypatch.setenv(graphs.SWITCH, "yes")
    with pytest.raises(ValueError, match="RLHF_KERNELS_GRAPHS is 'yes'; it must be 0 or 1"):
        wanted(cpu)


@pytest.mark.usefixtures("static")
def test_a_step_that_cannot_be_captured_runs_as_ever(monkeypatch):
    lm, call = model(), (prompts([6, 9]), greedy(max_new_tokens=8))

    def refuse(*_):
        raise graphs.CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.StaticStep, "replay", refuse)
    gen = generator(lm)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: operation not permitted"):
        got = gen.generate(*call)
    assert got == eager(monkeypatch, lambda: generator(lm), *call)
    assert gen.stats.replayed_steps == 0


@pytest.fixture
def cuda(request, monkeypatch):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("a CUDA graph needs a CUDA device (--device cuda)")
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)  # it makes the host read values back


@pytest.mark.usefixtures("cuda")
def test_captured_graphs_give_the_tokens_of_eager_steps(monkeypatch):
    lm, given = model().cuda(), prompts(LENGTHS)
    gen = generator(lm, max_active=8)
    for _ in range(2):  # captured in the first call, replayed from the beginning in the second
        got = gen.generate(given, EACH)
        assert gen.stats.replayed_steps > 0
    want = eager(monkeypatch, lambda: generator(lm, max_active=8), given, EACH)
    assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.usefixtures("cuda")
def test_sleep_gives_the_bytes_of_arena_and_graphs_back():
    gen = generator(model().cuda(), max_active=8)
    before = torch.cuda.memory_allocated()
    gen.generate(prompts(LENGTHS), EACH)
    gen.sleep()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)

"""Live bytes on the meta device: what is counted, how stretches add up, and that four layers tell of many."""

import pytest
import torch
from transformers import LlamaConfig

from rlhf_kernels import memory_step
from rlhf_kernels.memory import plan
from rlhf_kernels.memory_meter import Meter, Stretch, Timeline


def no_scratch(*_):
    return 0


def test_a_storage_counts_from_its_making_to_its_end_and_its_views_do_not():
    meter = Meter([], no_scratch)
    with meter:
        x = torch.empty(100, dtype=torch.float32, device="meta")  # 400 bytes
        y = x.view(10, 10)[2:]
        z = y + 1  # 320
        del x, y
        w = z * 2  # 320, beside z alone
        del z
    meter.finish()
    assert w.shape == (8, 10)
    assert [(s.net, s.peak) for s in meter.stretches] == [(320, 720)]


def test_what_was_there_before_is_not_counted():
    x = torch.empty(50, device="meta")
    meter = Meter([x], no_scratch)
    with meter:
        x.add_(1)
        x.view(5, 10).mul_(2)
    meter.finish()
    assert [(s.net, s.peak) for s in meter.stretches] == [(0, 0)]


def test_what_an_op_holds_inside_rises_and_falls():
    def inside(func, args, kwargs, results):
        assert all(isinstance(t, torch.Tensor) for t in results)
        return 1000 if func is torch.ops.aten.mm.default else 0

    x = torch.empty(10, 10, device="meta")
    meter = Meter([x], inside)
    with meter:
        y = x @ x
    meter.finish()
    assert [(s.net, s.peak) for s in meter.stretches] == [(y.nbytes, 1000 + y.nbytes)]


@pytest.mark.parametrize(
    ("stretches", "peak", "net"),
    [
        ([(10, 15, 1), (-10, 2, 1)], 15, 0),
        ([(10, 15, 3)], 35, 30),  # the third begins at 20
        ([(30, 30, 1), (-10, 4, 3)], 34, 0),  # the first of the three is the highest
        ([(10, 15, 0), (5, 7, 1)], 7, 5),
    ],
)
def test_stretches_follow_one_another_and_are_repeated(stretches, peak, net):
    timeline = Timeline(tuple((Stretch("", n, p), times) for n, p, times in stretches))
    assert (timeline.peak, timeline.net) == (peak, net)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("algorithm", ["hydra-ppo", "sft", "dpo"])
def test_four_layers_tell_of_all(algorithm, checkpointing, monkeypatch):
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=9, num_attention_heads=2,
    )  # fmt: skip

    def peaks(micro_batches):
        settings = {"batch": 3, "prompt": 8, "response": 5, "gradient_checkpointing": checkpointing}
        return plan(config, algorithm, micro_batches=micro_batches, dtype="float32", **settings).peaks

    short = [peaks(1), peaks(2)]
    monkeypatch.setattr(memory_step, "LAYERS", 100)
    whole = [peaks(1), peaks(2)]
    for some, every in zip(short, whole):
        assert some.keys() == every.keys()
        for phase in some:
            assert some[phase] == pytest.approx(every[phase], rel=2e-3), phase

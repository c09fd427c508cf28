"""Attention over the arena in a captured CUDA graph: a replay follows what tables, lengths and slots then hold."""

import pytest
import torch

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import naive, sliced_attention

pytestmark = pytest.mark.usefixtures("device", "kernels", "cuda")

HEADS, KV_HEADS, D, SLICE, LAYER = 8, 2, 64, 16, 0
BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.fixture
def cuda(request, monkeypatch):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("a CUDA graph needs a CUDA device (--device cuda)")
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)  # it makes the host read lengths and slices


class Step:
    """A captured step of `rows` sequences, a token each: writes their keys and values, then attends."""

    def __init__(self, rows, width, dtype, **options):
        self.arena = Arena([(KV_HEADS, D, D)], "16MiB", SLICE, dtype, "cuda")
        for plane in (self.arena.keys[LAYER], self.arena.values[LAYER]):
            plane.fill_(float("nan"))
        self.q, self.k, self.v = (torch.zeros(rows, n, D, dtype=dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.slots = torch.full((rows,), -1)
        self.table = torch.zeros(rows, width, dtype=torch.int32)
        self.context = torch.zeros(rows, dtype=torch.int32)
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32)
        self.options = options
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self.run()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.run()

    def run(self):
        self.arena.write(LAYER, self.slots, self.k, self.v)
        places = self.table, self.context, self.cu_q
        return sliced_attention(self.q, self.arena, LAYER, *places, **self.options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [4, 200], ids=["one-split", "splits"])
@pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 5.0}], ids=["plain", "window-softcap"])
def test_sequences_grow_end_and_begin_between_replays(dtype, width, options):
    step = Step(4, width, dtype, **options)
    room = min(width * SLICE, 1400)
    order = torch.randperm(step.arena.num_slices)[: 4 * width].view(4, -1).int()
    step.table[:, : order.shape[1]] = order
    past = [[torch.zeros(0, KV_HEADS, D, dtype=dtype)] * 2 for _ in range(4)]
    for context in ([3, 0, room, 17], [4, 1, 0, 18], [5, room - 1, 2, 0]):  # 0: this row is padding
        for b, n in enumerate(context):
            k, v = (torch.randn(n, KV_HEADS, D).to(dtype) for _ in range(2))
            past[b] = [k, v]
            place = torch.arange(max(0, n - 1))
            slots = step.table[b].long()[place // SLICE] * SLICE + place % SLICE
            step.arena.write(LAYER, slots, k[: len(place)], v[: len(place)])
            if n:
                step.k[b], step.v[b] = k[-1], v[-1]
            step.slots[b] = step.table[b, (n - 1) // SLICE] * SLICE + (n - 1) % SLICE if n else -1
        step.q.copy_(torch.randn(4, HEADS, D))
        step.context.copy_(torch.tensor(context))
        step.graph.replay()
        for b, (n, (k, v)) in enumerate(zip(context, past, strict=True)):
            wide = [x.double() for x in (step.q[b : b + 1], k, v)]
            exact = naive.attend(*wide, D**-0.5, options.get("window"), options.get("softcap"))[0]
            if n == 0:
                assert (step.out[b] == 0).all()
            else:
                assert (step.out[b].double() - exact).norm() <= BOUND[dtype] * exact.norm()

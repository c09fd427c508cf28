"""Sliced attention where sequences share slices, where contexts are long, and a whole step in one op."""

from itertools import accumulate

import pytest
import torch

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import naive, native, sliced_attention, sliced_step, varlen_attention

pytestmark = pytest.mark.host
compiled = pytest.mark.skipif(not native.AVAILABLE, reason="the compiled ops are not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def filled_arena(slices: int, slice_tokens: int, kv_heads: int, d: int, dtype: torch.dtype) -> Arena:
    arena = Arena(
        [(kv_heads, d, d)], slices * slice_tokens * kv_heads * 2 * d * dtype.itemsize + 256, slice_tokens, dtype
    )
    for view in (arena.keys[0], arena.values[0]):
        view.normal_()
    return arena


# Slices of 16 of each sequence, and its length: a family is what generation makes of prompts with samples.
FAMILIES = {
    "pair": [([5, 2, 9, 0], 60), ([5, 2, 9, 7], 64)],
    "the-tail-only-apart": [([3, 1, 4, 6, 8], 66), ([3, 1, 4, 6, 2], 80)],
    "less-than-a-block": [([3, 1], 20), ([3, 4], 32)],
    "system-prompt-then-samples": [
        ([0, 1, 2, 3, 4, 5, 6], 100),
        ([0, 1, 7, 8, 9], 70),
        ([0, 1, 2, 3, 4, 5, 10], 112),
        ([11, 12], 17),
        ([0, 1, 7, 8, 13], 79),
        ([0, 1], 32),
    ],
    "one-is-the-beginning-of-another": [([0, 1, 2], 40), ([0, 1, 2, 3, 4], 75), ([0, 1, 2, 3, 4, 5], 90)],
    "the-same-table-twice": [([0, 1, 2, 3], 64), ([0, 1, 2, 3], 64), ([0, 1, 2, 3], 63)],
}


@compiled
@DTYPES
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_sharing_slices_does_not_change_a_bit(family, group, window, dtype):
    """Each sequence alone gives the same as all of them in one call, in any order."""
    kv_heads, d = 2, 48
    arena = filled_arena(20, 16, kv_heads, d, dtype)
    q = torch.randn(len(family), kv_heads * group, d).to(dtype)
    table = torch.full((len(family), 8), -7, dtype=torch.int32)
    for row, (slices, _) in zip(table, family, strict=True):
        row[: len(slices)] = torch.tensor(slices)
    lengths = torch.tensor([length for _, length in family], dtype=torch.int32)

    def attend(rows: list[int]) -> torch.Tensor:
        cu = borders([1] * len(rows))
        return sliced_attention(q[rows], arena, 0, table[rows], lengths[rows], cu, window=window)

    alone = torch.cat([attend([b]) for b in range(len(family))])
    for order in (list(range(len(family))), list(reversed(range(len(family))))):
        assert torch.equal(attend(order), alone[order])


@compiled
@DTYPES
def test_many_samples_beside_prefill_pieces_match_the_definition(dtype):
    """More rows than one piece takes, some sequences with several queries between them."""
    kv_heads, group, d, slice_tokens = 1, 4, 32, 8
    samples, prompt = 70, 9
    arena = filled_arena(prompt + samples + 40, slice_tokens, kv_heads, d, dtype)
    order = torch.randperm(arena.num_slices).int()
    table = torch.full((samples + 2, 12), -1, dtype=torch.int32)
    table[:, :prompt] = order[:prompt]
    table[:samples, prompt] = order[prompt : prompt + samples]
    table[samples:, :12] = order[-24:].view(2, 12)
    lengths, new = [73 + b % 8 for b in range(samples)] + [90, 33], [1] * samples + [30, 33]
    shuffled = torch.randperm(samples + 2).tolist()
    lengths, new, table = [lengths[b] for b in shuffled], [new[b] for b in shuffled], table[shuffled]
    q = torch.randn(sum(new), kv_heads * group, d).to(dtype)
    places = table, torch.tensor(lengths, dtype=torch.int32), borders(new)
    out = sliced_attention(q, arena, 0, *places)
    keys, values = arena.keys[0], arena.values[0]
    exact = naive.sliced_attention(q.double(), keys.double(), values.double(), *places, d**-0.5)
    plain = naive.sliced_attention(q, keys, values, *places, d**-0.5)
    error, allowed = (out.double() - exact).abs(), (plain.double() - exact).abs().max()
    assert (error <= torch.maximum(2 * allowed, 2e-7 * (1 + exact.abs()))).all()


@compiled
@DTYPES
@pytest.mark.parametrize("window", [None, 700])
def test_long_contexts_keep_their_bits_and_their_digits(dtype, window):
    """Chunks of the context are summed apart: in a whole sequence, in pieces, in decode steps, on any threads."""
    n, heads, kv_heads, d, slice_tokens = 1300, 3, 1, 32, 32
    q, k, v = (torch.randn(n, h, d).to(dtype) for h in (heads, kv_heads, kv_heads))
    whole = varlen_attention(q, k, v, borders([n]), window=window)
    arena = filled_arena(41, slice_tokens, kv_heads, d, dtype)
    table = torch.randperm(41)[None].int()
    place = torch.arange(n)
    arena.write(0, table[0].long()[place // slice_tokens] * slice_tokens + place % slice_tokens, k, v)

    def attend(end: int, new: int) -> torch.Tensor:
        lengths = torch.tensor([end], dtype=torch.int32)
        return sliced_attention(q[end - new : end], arena, 0, table, lengths, borders([new]), window=window)

    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(varlen_attention(q, k, v, borders([n]), window=window), whole)
            assert torch.equal(torch.cat([attend(500, 500), attend(1111, 611), attend(n, 189)]), whole)
            for end in (1, 480, 481, 511, 512, 513, 544, 1024, 1025, n):
                assert torch.equal(attend(end, 1), whole[end - 1 : end]), (count, end)
    finally:
        torch.set_num_threads(threads)
    wide = [x.double() for x in (q, k, v)]
    exact = naive.varlen_attention(*wide, borders([n]), d**-0.5, window)
    plain = naive.varlen_attention(q, k, v, borders([n]), d**-0.5, window)
    error, allowed = (whole.double() - exact).abs(), (plain.double() - exact).abs().max()
    assert (error <= torch.maximum(2 * allowed, 2e-7 * (1 + exact.abs()))).all()
    assert error.norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()


@pytest.fixture(params=["native", "naive"])
def backend(request, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", request.param)
    return request.param


@DTYPES
def test_a_step_writes_everything_before_it_reads(dtype, backend):
    """Sequence 0 reads a slice that sequence 1 fills in the same step; k and v are strided as models give them."""
    arena, twin = (filled_arena(6, 4, 2, 16, dtype) for _ in range(2))
    for ours, theirs in zip((*arena.keys, *arena.values), (*twin.keys, *twin.values), strict=True):
        theirs.copy_(ours)
    q, k, v = (torch.randn(1, h, 5, 16).to(dtype)[0].transpose(0, 1) for h in (4, 2, 2))
    table = torch.tensor([[1, 5], [1, 3]], dtype=torch.int32)
    slots = torch.tensor([20, 4, 5, 6, 7])
    places = table, torch.tensor([5, 4], dtype=torch.int32), borders([1, 4])
    out = sliced_step(q, k, v, arena, 0, slots, *places, softcap=9.0)
    twin.write(0, slots, k, v)
    assert torch.equal(out, sliced_attention(q, twin, 0, *places, softcap=9.0))
    assert torch.equal(arena.keys[0], twin.keys[0])
    assert torch.equal(arena.values[0], twin.values[0])


def test_a_step_takes_rows_of_another_dtype_and_keeps_no_gradients(backend):
    arena = filled_arena(2, 4, 1, 8, torch.bfloat16)
    q, k, v = (torch.randn(1, 1, 8, requires_grad=True) for _ in range(3))
    places = torch.tensor([[1]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), borders([1])
    out = sliced_step(q.bfloat16(), k, v, arena, 0, torch.tensor([4]), *places)
    assert not out.requires_grad
    assert torch.equal(out, v.detach().bfloat16())


BAD_STEPS = {
    "slot": ({"slots": torch.tensor([99])}, IndexError, "slots holds 99"),
    "slots-dtype": ({"slots": torch.tensor([4.0])}, TypeError, "slots is torch.float32"),
    "k-shape": ({"k": torch.zeros(2, 1, 8)}, ValueError, "k has shape"),
    "v-shape": ({"v": torch.zeros(1, 1, 9)}, ValueError, "v has shape"),
    "slice": ({"slice_table": torch.tensor([[7]], dtype=torch.int32)}, IndexError, r"slice_table\[0, 0\] is 7"),
    "lens": ({"context_lens": torch.tensor([9], dtype=torch.int32)}, ValueError, r"context_lens\[0\] is 9"),
    "layer": ({"layer": 3}, IndexError, "3|range"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_bad_arguments_of_a_step_are_named(change, error, words, backend):
    arguments = {
        "q": torch.zeros(1, 1, 8),
        "k": torch.zeros(1, 1, 8),
        "v": torch.zeros(1, 1, 8),
        "arena": filled_arena(2, 4, 1, 8, torch.float32),
        "layer": 0,
        "slots": torch.tensor([4]),
        "slice_table": torch.tensor([[1]], dtype=torch.int32),
        "context_lens": torch.tensor([1], dtype=torch.int32),
        "cu_q": borders([1]),
    }
    with pytest.raises(error, match=words):
        sliced_step(**arguments | change)


@compiled
def test_the_step_is_registered_properly():
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    keys, values = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4, 6)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    places = torch.tensor([9, 4, 5]), table, torch.tensor([6, 3], dtype=torch.int32), borders([1, 2])
    torch.library.opcheck(torch.ops.rlhf_kernels.sliced_step.default, (q, k, v, keys, values, *places, 0.3, 4, 2.0))

"""The arena's Triton write, and attention over an arena that it filled."""

import pytest
import torch
from ops.attention_cases import F16, F32, F64, as_exact_as_plain, borders, rows

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import naive, sliced_attention, triton_tier


def planes(device, heads, d, dv, dtype, slices=5, slice_tokens=6):
    shapes = ((slices, heads, slice_tokens, dim) for dim in (d, dv))
    return [torch.full(shape, -1.0, dtype=dtype, device=device) for shape in shapes]


@pytest.mark.parametrize(("heads", "d", "dv"), [(2, 8, 8), (3, 5, 24), (70, 64, 128), (1, 1, 1)])
@pytest.mark.parametrize(("given", "kept"), [(F32, F32), (F32, F16), (F64, F64)], ids=["fp32", "to-fp16", "fp64"])
def test_tokens_lie_in_their_slots_and_a_slot_outside_is_skipped(heads, d, dv, given, kept, device):
    keys, values = planes(device, heads, d, dv, kept)
    slots = torch.tensor([9, -1, 2, 29, 30, -7])
    k, v = rows(6, heads, d, given, device), torch.randn(6, heads, dv, dtype=given, device=device)
    triton_tier.arena_write(keys, values, slots.to(device), k, v)
    for plane, x in ((keys, k), (values, v)):
        expected = torch.full_like(plane, -1.0)
        for token, slot in enumerate(slots.tolist()):
            if 0 <= slot < 30:
                expected[slot // 6, :, slot % 6] = x[token].to(kept)
        assert torch.equal(plane, expected)


def test_no_tokens_write_nothing(device):
    keys, values = planes(device, 2, 8, 8, F32)
    none = torch.empty(0, 2, 8, device=device)
    triton_tier.arena_write(keys, values, torch.empty(0, dtype=torch.int64, device=device), none, none)
    assert (keys == -1).all()


@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_an_arena_written_token_by_token_attends_as_the_definition(dtype, device):
    arena = Arena([(2, 16, 24)], "64KiB", 4, dtype, device)
    k, v, q = rows(11, 2, 16, F32, device), rows(11, 2, 24, F32, device), rows(11, 4, 16, dtype, device)
    slices = torch.randperm(arena.num_slices)[:3]
    table = slices.int()[None].to(device)
    count = lambda n: torch.tensor([n], dtype=torch.int32, device=device)  # noqa: E731
    found = []
    for begin, end in ((0, 6), (6, 7), (7, 11)):  # a piece of a prompt, a token, another piece
        place = torch.arange(begin, end)
        arena.write(0, (slices[place // 4] * 4 + place % 4).to(device), k[begin:end], v[begin:end])
        lens = borders([end - begin], device)
        found.append(sliced_attention(q[begin:end], arena, 0, table, count(end), lens, softcap=3.0))
    k, v = k.to(dtype), v.to(dtype)
    plain, exact = (naive.attend(*(x.to(wide) for x in (q, k, v)), 0.25, None, 3.0) for wide in (dtype, F64))
    as_exact_as_plain("out", torch.cat(found), plain, exact, 2)


@pytest.mark.slow
def test_the_ops_pass_opcheck(device):
    ops = torch.ops.rlhf_kernels
    keys, values = planes(device, 2, 8, 6, F32)
    k, v, q = rows(3, 2, 8, F32, device), rows(3, 2, 6, F32, device), rows(3, 4, 8, F32, device)
    whole = dict.fromkeys(("test_schema", "test_faketensor"))
    slots = torch.tensor([7, 0, -1], device=device)
    torch.library.opcheck(ops.triton_arena_write.default, (keys, values, slots, k, v), test_utils=tuple(whole))
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=device)
    context = torch.tensor([8, 3], dtype=torch.int32, device=device)
    places = (table, context, borders([1, 2], device))
    torch.library.opcheck(ops.triton_sliced_attention.default, (q, keys, values, *places, 0.3, 4, 2.0))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.triton_varlen_attention.default, (*leaves, borders([1, 2], device), 0.3, 4, 2.0))

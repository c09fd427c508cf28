"""The arena: one buffer within its budget, views by layer, writes, copies, release."""

import pytest
import torch

from rlhf_kernels.generation.arena import ALIGNMENT, Arena, layer_shapes
from rlhf_kernels.memory_size import parse_bytes

LAYERS = [(2, 8, 8), (1, 5, 3), (4, 16, 32)]


def filled(layers=LAYERS, kv_memory=1 << 16, slice_tokens=4, dtype=torch.float32) -> Arena:
    arena = Arena(layers, kv_memory, slice_tokens, dtype)
    for view in (*arena.keys, *arena.values):
        view.fill_(-1.0)
    return arena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slice_tokens", [1, 3, 16])
@pytest.mark.parametrize("kv_memory", [15003, 20011, "100KB", "1MiB"])
def test_buffer_never_exceeds_the_budget_and_wastes_less_than_two_slices(kv_memory, slice_tokens, dtype):
    arena = Arena(LAYERS, kv_memory, slice_tokens, dtype)
    budget = parse_bytes(kv_memory)
    assert arena.keys[0].untyped_storage().nbytes() == arena.nbytes <= budget
    assert budget - arena.nbytes < 2 * arena.slice_bytes + 2 * len(LAYERS) * ALIGNMENT
    assert arena.num_slices == arena.keys[0].shape[0]


def test_budget_of_whole_slices_gives_exactly_that_many():
    arena = Arena([(2, 16, 16)] * 3, 7 * Arena([(2, 16, 16)] * 3, "1MiB", 16).slice_bytes, 16)
    assert arena.num_slices == 7
    assert arena.nbytes == arena.kv_memory == 7 * 3 * 2 * (2 * 16 * 16 * 4)


def test_views_share_one_aligned_buffer_without_overlap():
    arena = filled()
    views = [*arena.keys, *arena.values]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    for i, view in enumerate(views):
        assert view.data_ptr() % ALIGNMENT == 0
        view.fill_(float(i))
    for i, view in enumerate(views):
        assert (view == i).all()
    for view, (heads, k_dim, _) in zip(arena.keys, LAYERS, strict=True):
        assert view.shape == (arena.num_slices, heads, 4, k_dim)
    for view, (heads, _, v_dim) in zip(arena.values, LAYERS, strict=True):
        assert view.shape == (arena.num_slices, heads, 4, v_dim)


@pytest.mark.parametrize("backend", ["naive", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_write_puts_tokens_in_their_slots_and_nothing_else(backend, dtype, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    arena = filled(dtype=dtype)
    slots = torch.tensor([9, 2, 31])
    k = torch.rand(1, 2, 3, 8)[0].transpose(0, 1).requires_grad_()  # as models give it: [heads, tokens] in memory
    v = torch.rand(3, 2, 8)
    arena.write(0, slots, k, v)
    expected = torch.full_like(arena.keys[0], -1.0)
    for token, slot in enumerate(slots.tolist()):
        expected[slot // 4, :, slot % 4] = k[token].detach().to(dtype)
        assert torch.equal(arena.values[0][slot // 4, :, slot % 4], v[token].to(dtype))
    assert torch.equal(arena.keys[0], expected)
    assert (arena.values[0] == -1).sum() == arena.values[0].numel() - v.numel()
    assert (arena.keys[1] == -1).all()
    assert not arena.keys[0].requires_grad


@pytest.mark.parametrize("backend", ["naive", "native"])
def test_buffer_made_under_inference_mode_is_writable_with_grad_enabled(backend, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    arena = Arena(LAYERS, 1 << 16, 4)
    with torch.inference_mode():
        arena.acquire()
        arena.write(0, torch.tensor([0]), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
        from_inference = torch.full((1, 2, 8), 2.0)
    k = torch.ones(1, 2, 8, requires_grad=True)
    arena.write(0, torch.tensor([1]), k * 3, k)
    arena.write(0, torch.tensor([2]), from_inference, from_inference)
    assert not arena.keys[0].requires_grad
    assert arena.keys[0].is_leaf
    assert arena.keys[0][0, 0, :3, 0].tolist() == [1.0, 3.0, 2.0]


@pytest.mark.parametrize("tokens", [None, 0, 3])
def test_copy_slices_copies_the_first_tokens_of_every_layer(tokens):
    arena = filled()
    for view in (*arena.keys, *arena.values):
        view[5] = torch.randn(view[5].shape)
    arena.copy_slices([(5, 2)], tokens)
    count = 4 if tokens is None else tokens
    for view in (*arena.keys, *arena.values):
        assert torch.equal(view[2, :, :count], view[5, :, :count])
        assert (view[2, :, count:] == -1).all()
        assert (view[3] == -1).all()


def test_release_gives_the_bytes_back_and_the_next_use_takes_them_again():
    arena = filled()
    nbytes = arena.nbytes
    arena.release()
    assert not arena.held
    assert arena.nbytes == nbytes
    arena.write(0, torch.tensor([0]), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    assert arena.held
    assert arena.keys[0].untyped_storage().nbytes() == nbytes


def test_nothing_is_allocated_before_the_first_use():
    assert not Arena(LAYERS, "1GiB", 4).held


def test_config_sizes_by_its_kv_heads_and_head_dims():
    from transformers import DeepseekV3Config, Gemma4TextConfig, GPT2Config, LlamaConfig

    llama = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3)
    assert layer_shapes(llama) == [(2, 8, 8)] * 3
    assert layer_shapes(GPT2Config(n_embd=48, n_head=4, n_layer=2)) == [(4, 12, 12)] * 2
    latent = DeepseekV3Config(
        num_attention_heads=4, num_hidden_layers=1, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20
    )
    assert layer_shapes(latent) == [(4, 24, 20)]
    mixed = Gemma4TextConfig(
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, head_dim=8, global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert layer_shapes(mixed) == [(2, 8, 8), (2, 16, 16)]
    arena = Arena.from_config(llama, "1MiB", slice_tokens=16, dtype=torch.bfloat16)
    assert arena.keys[2].shape[1:] == (2, 16, 8)
    assert arena.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a: Arena(LAYERS, 100, 4), ValueError, "kv_memory is 100 bytes"),
        (lambda a: Arena(LAYERS, "a lot", 4), ValueError, "a lot"),
        (lambda a: Arena(LAYERS, "1MiB", 0), ValueError, "slice_tokens is 0"),
        (lambda a: Arena([], "1MiB", 4), ValueError, "layers"),
        (lambda a: Arena(LAYERS, "1MiB", 4, torch.int8), TypeError, "dtype"),
        (lambda a: a.copy_slices([(0, a.num_slices)]), IndexError, "target"),
        (lambda a: a.copy_slices([(-1, 0)]), IndexError, "source"),
        (lambda a: a.copy_slices([(0, 1)], 5), ValueError, "tokens is 5"),
        (lambda a: a.write(0, torch.tensor([-1]), torch.ones(1, 2, 8), torch.ones(1, 2, 8)), IndexError, "slots"),
        (lambda a: a.write(0, torch.tensor([1 << 40]), torch.ones(1, 2, 8), torch.ones(1, 2, 8)), IndexError, "slots"),
        (lambda a: a.write(0, torch.tensor([0]), torch.ones(1, 2, 7), torch.ones(1, 2, 8)), ValueError, "k has shape"),
        (lambda a: a.write(0, torch.tensor([0]), torch.ones(1, 2, 8), torch.ones(2, 2, 8)), ValueError, "v has shape"),
        (lambda a: a.write(0, torch.zeros(1), torch.ones(1, 2, 8), torch.ones(1, 2, 8)), TypeError, "slots"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    arena = filled()
    with pytest.raises(error, match=words):
        call(arena)
    assert all((view == -1).all() for view in (*arena.keys, *arena.values))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 2gib ", 2 << 30),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", [-1, "", "MiB", "-3MiB", "1 parsec", "1e9", "nan", None, 1.5, True])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="size is"):
        parse_bytes(text)

"""Which models run on packed rows, which are refused, and that the refusal names the reason."""

import pytest
import torch
import transformers as T
from architectures import CONFIGS, EXTRA, GATED, SIZES, build

from rlhf_kernels.integrations.transformers import PackedRows, check_decoder, head_shape, use_packed_attention

LENGTHS = [9, 1, 14]


@pytest.mark.parametrize("name", [*CONFIGS, *EXTRA])
def test_a_packed_forward_equals_each_sequence_alone_gradients_too(name):
    packed, alone = build(name), build(name)
    use_packed_attention(packed)
    tokens = torch.randint(0, 131, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    got = packed(tokens[None], position_ids=positions[None], use_cache=False, packed=PackedRows(cu_seqlens)).logits[0]
    want = torch.cat([alone(ids[None]).logits[0] for ids in tokens.split(LENGTHS)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for logits in (got, want):
        (logits.square().sum() / 100).backward()
    for (path, mine), theirs in zip(packed.named_parameters(), alone.parameters()):
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-3)
        assert error < 1e-4, path


def test_the_attention_can_be_put_back():
    model, ids = build("llama"), torch.arange(7)[None]
    want = model(ids).logits
    undo = use_packed_attention(model)
    with pytest.raises(ValueError, match="packed"):
        model(ids)
    undo()
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("llama", {"softcap": None, "logit_scale": 1.0}),
        ("gemma2", {"softcap": 3.0, "logit_scale": 1.0}),
        ("granite", {"softcap": None, "logit_scale": 0.25}),
        ("cohere", {"softcap": None, "logit_scale": 0.25}),
    ],
)
def test_what_follows_the_head_is_read_from_the_config(name, want):
    assert head_shape(build(name)) == want


def rope(kind):
    settings = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    return T.LlamaConfig(**SIZES, **GATED, rope_parameters=settings)


ENCODER = {name: value for name, value in SIZES.items() if name != "tie_word_embeddings"} | {"intermediate_size": 80}
REFUSED = {
    "mixture of experts": (
        lambda: T.MixtralConfig(**SIZES, **GATED, num_local_experts=2), "mixture-of-experts weights as 3-D parameters",
    ),
    "recurrent": (
        lambda: T.MambaConfig(vocab_size=131, hidden_size=48, num_hidden_layers=2), "recurrent or hybrid layers",
    ),
    "hybrid": (
        lambda: T.Qwen3NextConfig(**SIZES, **GATED, num_experts=2, num_experts_per_tok=1, head_dim=8), "recurrent",
    ),
    "bloom": (lambda: T.BloomConfig(vocab_size=131, hidden_size=48, n_layer=2, n_head=6), "attention interface"),
    "bert": (lambda: T.BertConfig(**ENCODER), "not causal"),
    "roberta": (lambda: T.RobertaConfig(**ENCODER | {"pad_token_id": 1}, is_decoder=True), "padding token's id"),
    "rope dynamic": (lambda: rope("dynamic"), "rope type dynamic"),
    "rope longrope": (lambda: rope("longrope"), "rope type longrope"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_it_would_be_wrong_for_is_refused(config, reason):
    model = T.AutoModelForCausalLM.from_config(config())
    attention = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"model: {type(model).__name__} is not supported: .*{reason}"):
        use_packed_attention(model)
    assert model.config._attn_implementation == attention


def test_an_encoder_decoder_is_refused():
    config = T.T5Config(vocab_size=131, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_decoder(T.T5ForConditionalGeneration(config))


def test_a_model_with_a_mask_of_its_own_is_refused():
    config = T.DogeConfig(**SIZES, **GATED, is_moe=False)
    model = T.AutoModelForCausalLM.from_config(config)
    use_packed_attention(model)
    rows = PackedRows(torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="DogeAttention is not supported: it makes an attention mask of its own"):
        model(torch.arange(7)[None], position_ids=torch.arange(7)[None], use_cache=False, packed=rows)


def test_a_model_whose_layers_lose_the_keyword_says_so():
    model = T.AutoModelForCausalLM.from_config(T.NemotronConfig(**SIZES, **GATED, head_dim=8))
    use_packed_attention(model)
    rows = PackedRows(torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(ValueError, match="hands no keywords down to its attention, and the model is not supported"):
        model(torch.arange(7)[None], position_ids=torch.arange(7)[None], use_cache=False, packed=rows)

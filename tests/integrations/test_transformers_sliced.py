"""attn_implementation="rlhf_kernels_sliced" gives what transformers' own attention gives, or says why it does not."""

import pytest
import torch
from architectures import CONFIGS, build
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from rlhf_kernels.integrations.transformers import SLICED, register

IDS = torch.randint(3, 131, (3, 11), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones(3, 11, dtype=torch.long), torch.ones(3, 11, dtype=torch.long)
LEFT[0, :4], LEFT[2, :1] = 0, 0
RIGHT[1, 6:], RIGHT[2, 10:] = 0, 0


@pytest.fixture(autouse=True)
def registered():
    undo = register()
    yield
    undo()


def pair(name="llama", dtype=torch.float32):
    ours, eager = build(name, dtype), build(name, dtype)
    ours.set_attn_implementation(SLICED)
    return ours, eager


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


def close(got, want, mask):
    torch.testing.assert_close(got[mask > 0], want[mask > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no padding", "padding left", "padding right"])
def test_logits_and_gradients_are_the_eager_attentions(name, mask):
    kept = torch.ones_like(IDS) if mask is None else mask
    inputs = {"attention_mask": mask, "position_ids": positions(kept)}
    logits, grads = [], []
    for model in pair(name):
        logits.append(model(IDS, **inputs).logits)
        (logits[-1].square() * kept[..., None]).sum().div(100).backward()
        grads.append([p.grad for p in model.parameters()])
    close(*logits, kept)
    for mine, theirs in zip(*grads):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm().clamp_min(1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(name, cache):
    tokens = [
        model.generate(
            IDS, attention_mask=LEFT, max_new_tokens=9, do_sample=False, cache_implementation=cache, pad_token_id=0
        )
        for model in pair(name)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no padding", "padding left"])
@torch.no_grad()
def test_pieces_of_a_prompt_through_a_cache_are_the_whole_prompt(name, mask):
    ours, eager = pair(name)
    kept = torch.ones_like(IDS) if mask is None else mask
    want = eager(IDS, attention_mask=kept, position_ids=positions(kept)).logits
    for cache in (DynamicCache(config=ours.config), StaticCache(config=ours.config, max_cache_len=16)):
        pieces = [
            ours(
                IDS[:, a:b],
                attention_mask=None if mask is None else mask[:, :b],
                position_ids=positions(kept)[:, a:b],
                past_key_values=cache,
            ).logits
            for a, b in ((0, 3), (3, 8), (8, 9), (9, 11))
        ]
        close(torch.cat(pieces, 1), want, kept)


def test_packed_sequences_told_apart_by_positions_do_not_see_each_other():
    ours, eager = pair()
    place = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]])
    got = ours(IDS[:1], position_ids=place, use_cache=False).logits
    want = torch.cat([eager(part[None]).logits for part in IDS[0].split([4, 2, 5])], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"position_ids: .* attention_mask=None and use_cache=False"):
        ours(IDS[:1], position_ids=place, use_cache=True)


def test_a_hole_in_the_mask_is_left_out_and_refused_under_a_window():
    mask = torch.ones_like(IDS)
    mask[1, 4] = 0
    ours, eager = pair()
    close(ours(IDS, attention_mask=mask).logits, eager(IDS, attention_mask=mask).logits, mask)
    with pytest.raises(ValueError, match="attention_mask: it leaves out tokens inside a sequence"):
        pair("mistral")[0](IDS, attention_mask=mask)


def test_checkpointed_layers_give_the_same_gradients():
    want, grads = None, []
    for reentrant in (None, False, True):
        model = build("llama").train()
        model.set_attn_implementation(SLICED)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, attention_mask=LEFT, position_ids=positions(LEFT), labels=IDS).loss.backward()
        grads = [p.grad for p in model.parameters()]
        want = want or grads
        assert all(torch.equal(a, b) for a, b in zip(grads, want))


def padded(rows):
    """On the right, by hand: no tokenizer is needed."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def packed(rows):
    """In one row, told apart by their positions."""
    place = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    return {"input_ids": ids, "position_ids": place, "labels": ids.masked_fill(place == 0, -100), "use_cache": False}


@pytest.mark.parametrize("collate", [padded, packed])
def test_transformers_trainer_takes_the_same_steps(collate, tmp_path):
    rows = [{"input_ids": IDS[i % 3, : 5 + i % 4].tolist()} for i in range(8)]
    losses = []
    for model in pair():
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


@torch.no_grad()
def test_bf16_and_autocast_run():
    ours, eager = pair(dtype=torch.bfloat16)
    torch.testing.assert_close(ours(IDS).logits, eager(IDS).logits, rtol=0.1, atol=0.1)
    ours, eager = pair()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(IDS).logits, eager(IDS).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "inputs", "match"),
    [
        ({"attention_dropout": 0.1}, {}, "dropout is 0.1"),
        ({}, {"output_attentions": True}, "output_attentions"),
        (
            {},
            {"attention_mask": torch.ones(3, 1, 11, 11, dtype=torch.bool)},
            r"attention_mask: .* got \[3, 1, 11, 11\]",
        ),
        ({"is_causal": False}, {}, "not causal"),
        ({"layer_types": ["chunked_attention"] * 2}, {"use_cache": False}, "chunked_attention"),
    ],
    ids=["dropout", "weights asked for", "a mask of one's own", "not causal", "chunks"],
)
def test_what_it_does_not_compute_is_one_clear_error(change, inputs, match):
    ours, _ = pair()
    for key, value in change.items():
        setattr(ours.config, key, value)
        for layer in ours.model.layers:
            setattr(layer.self_attn, key, value)
    with pytest.raises(ValueError, match=match):
        ours.train()(IDS, **inputs)


def test_a_cache_has_no_gradient_and_says_so():
    ours, _ = pair()
    with torch.no_grad():
        past = ours(IDS[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values: .* no gradient"):
        ours(IDS[:, 6:], past_key_values=past)


def test_the_name_is_there_between_register_and_undo(tmp_path):
    build("llama").save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=SLICED, dtype=torch.float32)
    torch.testing.assert_close(ours(IDS).logits, build("llama")(IDS).logits, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = register()
    again()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=SLICED):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=SLICED)

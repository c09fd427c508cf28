"""What PEFT does to a model works on an accelerated one, and accelerating can be undone."""

import contextlib
import copy
import pickle

import pytest
import torch
from architectures import build
from peft_models import IDS, both, config, peft, run, same, stir, theirs
from torch import nn

from rlhf_kernels.integrations.peft import accelerate, accelerated, restore, route


def test_adapters_added_deleted_and_activated_later_are_served():
    own, mine = both()
    for model in (own, mine):
        model.add_adapter("later", config(r=5))
        model.set_adapter("later")
        stir(model)
    same(run(mine), run(own))
    for model in (own, mine):
        model.delete_adapter("default")
    same(run(mine), run(own))


def test_accelerating_again_is_harmless_whatever_adapters_are_left():
    pair = both("llama", {"plain": {}, "biased": {"lora_bias": True}})
    for model in pair:
        model.set_adapter("biased")
        model.delete_adapter("plain")
    accelerate(pair[1])
    same(run(pair[1]), run(pair[0]))


def test_a_layer_added_later_waits_for_the_next_call():
    own, mine = both(target_modules=["q_proj"])
    for model in (own, mine):
        model.add_adapter("wide", config(target_modules=["q_proj", "v_proj"]))
        model.set_adapter("wide")
        stir(model)
    same(run(mine), run(own))
    assert set(accelerated(mine).values()) == {None, "accelerate was not called"}
    index = torch.zeros(4, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"v_proj cannot be routed: .* call accelerate again"),
        route(mine, index, ["wide"]),
    ):
        pass
    accelerate(mine)
    assert set(accelerated(mine).values()) == {None}
    same(run(mine), run(own))


def test_a_model_with_adapters_of_transformers_own_is_accelerated_and_routed():
    own, mine = build("llama"), build("llama")
    for model in (own, mine):
        for name in ("actor", "critic"):
            model.add_adapter(config(), name)
        stir(model).train()
        model.set_adapter("actor")
    accelerate(mine)
    expected = run(own)
    same(run(mine), expected)
    with route(mine, torch.tensor([1, 0, -1, 0]), ["actor", "critic"]):
        logits = mine(input_ids=IDS).logits
    torch.testing.assert_close(logits[[1, 3]], expected[0][[1, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2:3], build("llama")(input_ids=IDS[2:3]).logits, rtol=1e-5, atol=1e-5)


def test_adapters_are_saved_and_loaded_as_pefts(tmp_path):
    own, mine = both()
    theirs_state, state = peft.get_peft_model_state_dict(own), peft.get_peft_model_state_dict(mine)
    assert state.keys() == theirs_state.keys()
    assert all(torch.equal(state[k], theirs_state[k]) for k in state)
    assert mine.state_dict().keys() == own.state_dict().keys()
    assert [id(p) for p in mine.parameters()] == [id(p) for p in accelerate(mine).parameters()]
    mine.save_pretrained(tmp_path)
    again = accelerate(peft.PeftModel.from_pretrained(build("llama"), tmp_path))
    plain = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    expected = own.eval()(input_ids=IDS).logits
    for model in (again, plain):
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_restore_is_as_if_never_accelerated():
    own, mine = both()
    accelerate(accelerate(mine))
    run(mine)
    types = [type(m) for m in own.modules()]
    assert [type(m) for m in mine.modules()] != types
    restore(mine)
    assert [type(m) for m in mine.modules()] == types
    assert [m.__dict__.keys() for m in mine.modules()] == [m.__dict__.keys() for m in own.modules()]
    expected, got = run(own), run(mine)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][k], v) for k, v in expected[1].items())
    assert restore(mine) is mine
    mine.gradient_checkpointing_enable({"use_reentrant": False})
    before = {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in mine.modules()}
    with route(accelerate(mine), torch.zeros(4, dtype=torch.long), ["default"]):
        mine(input_ids=IDS)
    restore(mine)
    assert before == {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in mine.modules()}
    with pytest.raises(ValueError, match="in training mode"):
        mine(input_ids=IDS, adapter_names=["default"] * 4)


def test_a_layer_whose_class_something_else_exchanged_is_not_restored_behind_its_back():
    mine = accelerate(theirs())
    layer = mine.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    before, layer.__class__ = type(layer), type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match="v_proj is a Sharded by now"):
        restore(mine)
    layer.__class__ = before
    restore(mine)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_accelerated_and_on_its_own(how):
    _, mine = both("llama", {"actor": {}, "critic": {}})
    expected = run(mine)
    twin = how(mine)
    assert set(accelerated(twin).values()) == {None}
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.zero_()
    with route(mine, torch.zeros(4, dtype=torch.long), ["critic"]):  # routes the one, not the other
        same(run(twin), expected)


def test_layers_that_are_not_supported_keep_pefts_forward(caplog):
    layers = {"target_modules": ["embed_tokens", "q_proj", "v_proj"]}
    own, mine = theirs(**layers), accelerate(theirs(**layers))
    left = {path: why for path, why in accelerated(mine).items() if why}
    assert left == {"base_model.model.model.embed_tokens": "PEFT's Embedding layer is not supported"}
    assert "1 of 5 LoRA layers keep PEFT's forward" in caplog.text
    same(run(mine), run(own))
    with pytest.raises(ValueError, match="in training mode"):
        mine(input_ids=IDS, adapter_names=["default"] * 4)
    names = ["default", "__base__"] * 2
    expected = own.eval()(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(mine.eval()(input_ids=IDS, adapter_names=names).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"use_dora": True}, "no plain LoRA .DoraLinearVariant"), ({"lora_bias": True}, "no plain LoRA .lora_bias")],
    ids=["DoRA", "lora_bias"],
)
def test_a_model_without_a_supported_layer_is_an_error(options, why):
    model = theirs("gpt2", **options)
    with pytest.raises(ValueError, match=why):
        accelerate(model)
    with pytest.raises(ValueError, match="it has none"):
        accelerate(build("gpt2"))


def test_an_unsupported_adapter_beside_a_supported_one_is_pefts():
    adapters = {"actor": {}, "critic": {"lora_bias": True}, "dora": {"use_dora": True}}
    own, mine = both("gpt2", adapters)
    for active in (["actor"], ["critic"], ["dora"], ["actor", "critic"]):
        for model in (own, mine):
            model.base_model.set_adapter(active)
        same(run(mine), run(own))


def test_modules_to_save_train_and_cannot_be_mixed_in_training():
    own, mine = both("llama", modules_to_save=["lm_head"])
    same(run(mine), run(own))
    index = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="takes one adapter a forward"), route(mine, index, ["default"]):
        pass


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "rlhf_kernels.integrations.peft_layers")
    monkeypatch.setattr("rlhf_kernels.integrations.peft_layers", None, raising=False)
    monkeypatch.delattr("rlhf_kernels.integrations.peft_layers")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"rlhf-kernels\[peft\]"):
        accelerate(nn.Linear(2, 2))


def test_compiled_models_work():
    torch._dynamo.reset()
    own, mine = both("llama", target_modules=["q_proj", "down_proj"])
    expected = run(own)
    logits, found = run(torch.compile(mine, backend="aot_eager"))
    same((logits, {path.removeprefix("_orig_mod."): grad for path, grad in found.items()}), expected)


def test_a_layer_compiles_whole():
    torch._dynamo.reset()
    own, mine = both()
    x = torch.randn(2, 3, 48, requires_grad=True)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    compiled = torch.compile(mine.get_submodule(path), fullgraph=True, backend="aot_eager")
    for context in (contextlib.nullcontext, mine.disable_adapter):
        with context():
            y = compiled(x)
            torch.testing.assert_close(y, mine.get_submodule(path)(x))
    torch.testing.assert_close(compiled(x), own.get_submodule(path)(x), rtol=1e-5, atol=1e-6)

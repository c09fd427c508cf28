"""What HydraModel writes is what PEFT and transformers read, and what it reads back is what it wrote, bit for bit."""

import json

import pytest
import torch
from architectures import CONFIGS, build
from safetensors.torch import save_file
from torch import nn

from rlhf_kernels.integrations.peft_layout import base_fingerprint, save_adapter, saved_fingerprint
from rlhf_kernels.integrations.transformers import PackedRows
from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_kernels.nn.lora import attach_adapters, lora_layers

IDS = torch.arange(3, 20)


def hydra(name="llama", spec=None, **options):
    torch.manual_seed(0)
    spec = spec or LoraSpec(r=4, alpha=6)
    options.setdefault("adapters", {"actor": spec, "critic": LoraSpec(r=2)})
    model = HydraModel({"base": build(name)}, **options)
    for layer in lora_layers(model.bases["base"]).values():
        for parameter in layer.lora_B.values():
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, role="actor"):
    n = len(IDS)
    return model.decode(
        role, IDS, torch.arange(n), PackedRows(torch.tensor([0, n], dtype=torch.int32)), torch.arange(n)
    )


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_adapter_loads_in_peft_and_gives_the_same_logits(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = hydra(name)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "actor")
    torch.testing.assert_close(logits(model), theirs(input_ids=IDS[None]).logits[0], rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(model, "reference")).abs().max() > 0.1


@torch.no_grad()
def test_an_adapter_on_some_layers_only_loads_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = hydra(spec=LoraSpec(r=3, target_modules=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "actor")
    torch.testing.assert_close(logits(model), theirs(input_ids=IDS[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("known", [True, False], ids=["into the same adapters", "as new adapters"])
def test_adapters_and_heads_load_back_bit_equal(name, known, tmp_path):
    model = hydra(name)
    model.save_pretrained(tmp_path)
    build(name).save_pretrained(tmp_path / "checkpoint")
    adapters = {"actor": LoraSpec(r=4, alpha=6), "critic": LoraSpec(r=2)} if known else {}
    again = HydraModel.from_pretrained(tmp_path / "checkpoint", adapters, dtype=None)
    assert sorted(again.load_adapters(tmp_path)) == ["actor", "critic"]
    again.roles["actor"] = Role("actor")
    assert torch.equal(logits(again), logits(model))
    for key, head in model.heads.items():
        assert torch.equal(again.heads[key].weight, head.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trained_base_loads_back_here_and_in_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = hydra(name, train_base=True)
    with torch.no_grad():
        for parameter in model.bases["base"].parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    again = HydraModel.from_pretrained(tmp_path, dtype=None)
    for path, parameter in again.bases["base"].named_parameters():
        assert torch.equal(parameter, model.bases["base"].get_parameter(path)), path
    # to rounding: without adapters the base's linears are torch's own
    torch.testing.assert_close(logits(again, "reference"), logits(model, "reference"), rtol=1e-5, atol=1e-5)
    assert torch.equal(again.heads["reward"].weight, model.heads["reward"].weight)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(theirs(IDS[None]).logits[0], logits(model, "reference"), rtol=1e-5, atol=1e-5)


def test_heads_beside_a_checkpoint_are_picked_up_for_every_base(tmp_path):
    build("llama").save_pretrained(tmp_path)
    first = HydraModel.from_pretrained(tmp_path, dtype=None)
    first.save_pretrained(tmp_path)
    several = HydraModel.from_pretrained(tmp_path, bases={"critic": tmp_path, "reward": tmp_path}, dtype=None)
    assert torch.equal(several.heads["reward:reward"].weight, first.heads["reward"].weight)
    assert torch.equal(several.heads["critic:value"].weight, first.heads["value"].weight)


@pytest.mark.parametrize(
    "path", ["./no/such/model", "/no/such/model", "../no-such-model", "~/no-such-model", "a/b/c", "tests/missing"]
)
def test_a_path_that_is_not_there_is_no_hub_id(path):
    with pytest.raises(ValueError, match=f"model: '{path}': no such directory"):
        HydraModel.from_pretrained(path)


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        HydraModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no adapter"):
        hydra().load_adapters(tmp_path)


def test_an_adapter_of_other_shape_or_kind_is_an_error(tmp_path):
    model = hydra()
    model.save_pretrained(tmp_path)
    other = hydra(spec=LoraSpec(r=5, alpha=6))
    with pytest.raises(ValueError, match=r"lora_A of adapter 'actor' is \[4, 48\]; it must be \[5, 48\]"):
        other.load_adapters(tmp_path)
    file = tmp_path / "actor" / "adapter_config.json"
    for key, value in (("peft_type", "IA3"), ("use_dora", True), ("bias", "all")):
        good = json.loads(file.read_text())
        file.write_text(json.dumps(good | {key: value}))
        with pytest.raises(ValueError, match=key):
            hydra(adapters={}).load_adapters(tmp_path)
        file.write_text(json.dumps(good))
    (tmp_path / "actor" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        hydra().load_adapters(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_on_disk_knows_the_base_it_was_trained_on(name, tmp_path):
    """The same in float32 and bfloat16, with adapters or without; another where each weight moved by a thousandth."""
    model = build(name)
    bare = base_fingerprint(model)
    assert base_fingerprint(build(name).bfloat16()) == bare
    attach_adapters(model, {"a": LoraSpec(r=2)})
    assert base_fingerprint(model) == bare
    save_adapter(model, "a", tmp_path)
    assert saved_fingerprint(tmp_path) == bare
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    assert base_fingerprint(model) != bare
    assert base_fingerprint(build(name, seed=1)) != bare


def test_an_adapter_of_another_program_does_not_say(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert saved_fingerprint(tmp_path) is None

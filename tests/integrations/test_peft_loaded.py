"""Adapters of PEFT's, in each of its forms: the same function here and back in PEFT, or a refusal that says why."""

import json

import pytest
import torch
from architectures import build
from peft_models import IDS, config, peft, stir, theirs

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_kernels.nn.lora import lora_layers

FORMS = {
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers.1.*v_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 5, "layers.0.mlp.up_proj": 1}},
    "both patterns under rsLoRA": {
        "use_rslora": True, "rank_pattern": {"k_proj": 1, "mlp.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "o_proj": 9},
    },
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "dropout": {"lora_dropout": 0.5},
    "another start": {"init_lora_weights": "orthogonal"},
}  # fmt: skip


def hydra(**options):
    return HydraModel({"base": build("llama")}, **options)


def logprob(model, role="actor"):
    flat, lengths = IDS.flatten(), [IDS.shape[1]] * len(IDS)
    return model.score(flat, lengths, roles=(role,))[role].logprob.view(len(IDS), -1)


@torch.no_grad()
def expected(model):
    return model.eval()(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_pefts_is_the_same_function_here_and_back_in_peft(form, tmp_path):
    there = theirs(**FORMS[form])
    there.save_pretrained(tmp_path / "peft")
    model = hydra()
    assert model.load_adapters(tmp_path / "peft", names={"default": "actor"}) == ["actor"]
    model.roles["actor"] = Role("actor")
    torch.testing.assert_close(logprob(model), expected(there), rtol=1e-4, atol=1e-5)
    assert (logprob(model) - logprob(model, "reference")).abs().max() > 0.1
    model.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours" / "actor")
    torch.testing.assert_close(expected(back), expected(there), rtol=1e-4, atol=1e-5)
    again = hydra()
    again.load_adapters(tmp_path / "ours")
    again.roles["actor"] = Role("actor")
    torch.testing.assert_close(logprob(again), logprob(model), rtol=1e-6, atol=1e-6)


def test_several_adapters_of_one_peft_model_load_under_their_names(tmp_path):
    there = theirs(adapters={"default": {}, "critic": {"r": 2, "use_rslora": True}})
    there.save_pretrained(tmp_path)
    model = hydra()
    assert model.load_adapters(tmp_path) == ["default", "critic"]
    for name in ("default", "critic"):
        there.set_adapter(name)
        model.roles[name] = Role(name)
        torch.testing.assert_close(logprob(model, name), expected(there), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"names: 'actor' is not in .*, which holds default, critic"):
        hydra().load_adapters(tmp_path, names={"actor": "x"})
    with pytest.raises(ValueError, match="two adapters one name"):
        hydra().load_adapters(tmp_path, names={"default": "critic"})


def test_an_adapter_loads_into_one_of_another_alpha_as_the_same_function(tmp_path):
    there = theirs()
    there.save_pretrained(tmp_path / "actor")
    model = hydra(adapters={"actor": LoraSpec(r=4, alpha=32)})
    model.load_adapters(tmp_path)
    torch.testing.assert_close(logprob(model), expected(there), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["rank_pattern", "both patterns under rsLoRA"])
def test_an_adapter_of_several_ranks_generates(form, tmp_path):
    there = theirs(**FORMS[form])
    there.save_pretrained(tmp_path)
    model = hydra()
    model.load_adapters(tmp_path, {"default": "actor"})
    model.roles["actor"] = Role("actor")
    params = SamplingParams(max_new_tokens=6, temperature=0)
    tokens = SlicedGenerator(model, "1MiB").generate([IDS[0].tolist()], params)[0].tokens
    want = there.eval().generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)[
        0, IDS.shape[1] :
    ]
    assert tokens == want.tolist()


def test_ranks_of_ones_own_train_and_load_in_peft(tmp_path):
    torch.manual_seed(0)
    spec = LoraSpec(r=4, alpha=8, use_rslora=True, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6})
    model = hydra(adapters={"actor": spec})
    ranks = {path: layer.lora_A["actor"].shape[0] for path, layer in lora_layers(model.bases["base"]).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.mlp.up_proj"] == 6
    assert ranks["model.layers.0.mlp.up_proj"] == 4
    optimizer = torch.optim.SGD(model.trainable_parameters("actor"), lr=1.0)
    for _ in range(2):
        model(IDS.flatten(), [6] * 4, roles=("actor",))["actor"].logprob.mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "actor")
    torch.testing.assert_close(logprob(model), expected(back), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rank_pattern names 'w_proj', which is none of its layers"):
        hydra(adapters={"actor": LoraSpec(rank_pattern={"w_proj": 2})})
    with pytest.raises(ValueError, match=r"rank_pattern\['q_proj'\] is 0"):
        LoraSpec(rank_pattern={"q_proj": 0})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora is True, .* merge_and_unload"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'; biases would change the bypassed rows"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], .* bypass share"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*is no LoRA matrix of a Linear"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*is no LoRA matrix of a Linear"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
    ids=lambda x: next(iter(x)) + " " + str(next(iter(x.values()))) if isinstance(x, dict) else "",
)
def test_what_is_no_plain_lora_is_refused_and_nothing_is_changed(options, match, tmp_path):
    base = build("llama")
    there = stir(peft.get_peft_model(base, config(**options)))
    there.save_pretrained(tmp_path / "odd")
    model = hydra(adapters={"actor": LoraSpec(r=2)})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        model.load_adapters(tmp_path)
    assert list(model.adapters) == ["actor"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_kinds_of_adapters_are_refused(tmp_path):
    peft.get_peft_model(build("llama"), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'IA3'; only LORA"):
        hydra().load_adapters(tmp_path)


def test_a_directory_of_adapters_given_as_a_model_says_what_to_do(tmp_path):
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/base"}))
    with pytest.raises(ValueError, match=r"holds adapters: load their base \(some/base\), then call load_adapters"):
        HydraModel.from_pretrained(tmp_path)


def test_a_merged_model_is_a_model_for_what_is_refused(tmp_path):
    there = theirs(use_dora=True)
    want = expected(there)
    there.merge_and_unload().save_pretrained(tmp_path)
    model = HydraModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logprob(model, "reference"), want, rtol=1e-3, atol=1e-4)

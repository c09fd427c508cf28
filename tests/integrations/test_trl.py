"""TRL's own trainers log the same numbers, step by step, whether they run on our kernels or on TRL's and PEFT's."""

import pytest
import torch
from trl_trainers import adapter, both, forbidden, history, peft, same, trainer, trl

from rlhf_kernels.integrations import peft as accelerated_peft
from rlhf_kernels.integrations.trl import patch, patched, patching, unpatch

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("sft", False), ("dpo", False), ("grpo", False), ("rloo", False), ("sft", True), ("dpo", True),
        pytest.param("kto", False, marks=SLOW), pytest.param("kto", True, marks=SLOW),
        pytest.param("grpo", True, marks=SLOW), pytest.param("rloo", True, marks=SLOW),
    ],
)  # fmt: skip
def test_every_logged_number_is_that_of_the_trainer_as_it_is(kind, lora, tmp_path, monkeypatch):
    expected, found = both(kind, tmp_path, monkeypatch, lora=lora)
    same(found, expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"loss_type": "dft"}),
        ("sft", {"packing": True, "max_length": 16}),
        pytest.param("sft", {"gradient_accumulation_steps": 2, "completion_only_loss": False}, marks=SLOW),
        ("dpo", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
        ("dpo", {"loss_type": "ipo", "ld_alpha": 0.5, "precompute_ref_log_probs": True}),
        pytest.param("dpo", {"loss_type": "sigmoid_norm", "model": "gemma2"}, marks=SLOW),
        pytest.param("kto", {"loss_type": "apo_zero_unpaired"}, marks=SLOW),
        ("grpo", {"loss_type": "grpo", "top_entropy_quantile": 0.5, "importance_sampling_level": "sequence"}),
        pytest.param("grpo", {"entropy_coef": 0.1, "cast_lm_head_to_fp32": True, "num_iterations": 2}, marks=SLOW),
        ("grpo", {"loss_type": "dr_grpo", "gradient_checkpointing": True, "lora": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_options_of_the_loss_are_served(kind, options, tmp_path, monkeypatch):
    expected, found = both(kind, tmp_path, monkeypatch, **options)
    same(found, expected)


def test_label_smoothing_trains_on_trl_s_own_logits_and_its_metrics_on_our_kernel(tmp_path, monkeypatch):
    expected, found = both("sft", tmp_path, monkeypatch, label_smoothing_factor=0.1)
    same(found, expected)


def test_mixed_precision_serves_a_reference_model_whose_forward_accelerate_wrapped(tmp_path, monkeypatch):
    expected, found = both("dpo", tmp_path, monkeypatch, bf16=True)
    same(found, expected, atol=0.05)


def test_heads_of_policy_and_reference_are_served_and_given_back(tmp_path, monkeypatch):
    made = trainer("dpo", tmp_path)
    assert patched(made) == {"model": "patch was not called", "ref_model": "patch was not called"}
    with patching(made):
        assert patched(made) == {"model": None, "ref_model": None}
    assert patched(made) == {"model": "patch was not called", "ref_model": "patch was not called"}
    monkeypatch.setattr("trl.kernels.ChunkedLogProbFunction.forward", staticmethod(forbidden))
    with pytest.raises(AssertionError, match="TRL's kernel was called"):
        made.train()


def test_lora_layers_are_accelerated_with_the_patch_and_given_back(tmp_path):
    made = trainer("sft", tmp_path, lora=True)
    patch(made)
    assert set(accelerated_peft.accelerated(made.model).values()) == {None}
    unpatch(made)
    assert None not in accelerated_peft.accelerated(made.model).values()
    patch(made, lora=False)
    assert None not in accelerated_peft.accelerated(made.model).values()


def test_layers_accelerated_before_the_patch_stay_so_after_it(tmp_path):
    made = trainer("sft", tmp_path, lora=True)
    accelerated_peft.accelerate(made.model)
    unpatch(patch(made))
    assert set(accelerated_peft.accelerated(made.model).values()) == {None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["a head trained beside adapters", "virtual tokens"],
)
def test_what_else_peft_does_to_the_head_s_rows_and_weight_is_served(config, tmp_path, monkeypatch):
    def build():
        torch.manual_seed(0)
        return trainer("sft", tmp_path, arguments={"peft_config": config})

    expected = history(build())
    made = patch(build())
    monkeypatch.setattr("trl.kernels.ChunkedLogProbFunction.forward", staticmethod(forbidden))
    same(history(made), expected)


@pytest.mark.parametrize("options", [{"r": 4, "use_dora": True}, {"r": 4, "lora_bias": True}], ids=["DoRA", "biases"])
def test_adapters_that_are_not_served_leave_the_head_served(options, tmp_path):
    config = adapter()
    for name, value in options.items():
        setattr(config, name, value)
    made = patch(trainer("sft", tmp_path, arguments={"peft_config": config}))
    assert set(patched(made).values()) == {None}


class Bonus(trl.GRPOTrainer):
    """A loss of one's own, of the entropies."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        kept = inputs["completion_ids"].shape[1]
        _, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, kept, compute_entropy=True)
        return -entropies.mean()


def test_a_subclass_may_differentiate_entropies(tmp_path, monkeypatch):
    expected, found = both("grpo", tmp_path, monkeypatch, base=Bonus)
    same(found, expected)
    assert all(row["grad_norm"] > 0 for row in found if "grad_norm" in row)


def test_trl_s_own_grpo_takes_gradients_through_entropies_for_its_bonus_alone(tmp_path):
    def wants(**options):
        made = patch(trainer("grpo", tmp_path, **options))
        ids = torch.arange(3, 11)[None]
        return made.model(input_ids=ids, labels=ids, fused_lm_head=True).entropy.requires_grad

    assert not wants()
    assert wants(entropy_coef=0.1)


def test_training_goes_on_when_patched_between_two_runs(tmp_path):
    made, other = trainer("sft", tmp_path, bf16=True), trainer("sft", tmp_path, bf16=True)
    history(made), history(other)
    same(history(patch(made)), history(other), atol=0.05)

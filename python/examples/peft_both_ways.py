"""An adapter that PEFT made is trained further here and goes back to PEFT; what is no plain LoRA is refused."""

import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.demo import checkpoint_path


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)


ids = torch.arange(5, 25)
with tempfile.TemporaryDirectory() as directory:
    config = peft.LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 8},
        target_modules="all-linear", init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(f"{directory}/peft")

    model = HydraModel.from_pretrained(base())
    model.load_adapters(f"{directory}/peft", names={"default": "actor"})
    model.roles["actor"] = Role("actor")
    logprob = model(ids, [20], roles=("actor",))["actor"].logprob
    expected = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    print("from PEFT: largest difference", (logprob - expected).abs().max().item())

    (-logprob.mean()).backward()
    torch.optim.SGD(model.trainable_parameters("actor"), lr=0.1).step()
    model.save_pretrained(f"{directory}/ours")
    back = peft.PeftModel.from_pretrained(base(), f"{directory}/ours/actor").eval()
    logprob = model.score(ids, [20], roles=("actor",))["actor"].logprob
    expected = back(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    print("to PEFT:   largest difference", (logprob - expected).abs().max().item())
    assert torch.allclose(logprob, expected, atol=1e-4)

    peft.get_peft_model(base(), peft.LoraConfig(use_dora=True, target_modules="all-linear")).save_pretrained(directory)
    try:
        model.load_adapters(directory)
    except ValueError as error:
        print("refused:", str(error).partition(": ")[2])

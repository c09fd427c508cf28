"""TRL's own trainers on small local models and data, and what a short training of one gives."""

import atexit
import shutil
import tempfile
from functools import cache

import pytest
import torch
from architectures import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_kernels.integrations.trl import patch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402

PROMPTS = ["t5 t6 t7", "t9 t8", "t20 t21 t22 t23", "t40", "t50 t51", "t60 t61 t62", "t70", "t80 t81"]
CHOSEN = [" " + " ".join(f"t{(17 * i + 5 * j) % 120 + 3}" for j in range(3 + i % 4)) for i in range(len(PROMPTS))]
REJECTED = [" " + " ".join(f"t{(11 * i + 7 * j) % 120 + 3}" for j in range(2 + i % 3)) for i in range(len(PROMPTS))]
DATA = {
    "sft": {"prompt": PROMPTS, "completion": CHOSEN},
    "dpo": {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED},
    "kto": {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * (len(PROMPTS) // 2)},
    "grpo": {"prompt": PROMPTS},
    "rloo": {"prompt": PROMPTS},
}
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.8, "beta": 0.05}
NOT_OURS = ("runtime", "per_second", "step_time", "total_flos")


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"t{i}": i for i in range(3, 131)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@cache
def checkpoint(name):
    """A directory with a small model, where a trainer finds its reference too."""
    place = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    model = build(name)
    model.config.pad_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(place)
    return place


def reward(completions, **columns):
    """How many distinct words a completion has, and a little for its first."""
    words = [text.split() or ["t0"] for text in completions]
    return [len(set(found)) + len(found[0]) / 10 for found in words]


def trainer(kind, output_dir, model="llama", lora=False, base=None, arguments=None, **options):
    """A trainer of `kind` whose data, weights and random numbers are the same at every call."""
    names = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    sampled = kind in ("grpo", "rloo")
    config = getattr(trl, f"{names[kind]}Config")(
        output_dir=str(output_dir), **settings | (SAMPLED if sampled else {}) | options
    )
    kind_of = base or getattr(trl, f"{names[kind]}Trainer")
    return kind_of(
        model=checkpoint(model), args=config, processing_class=tokenizer(), train_dataset=Dataset.from_dict(DATA[kind]),
        **({"reward_funcs": reward} if sampled else {}), **({"peft_config": adapter()} if lora else {}),
        **(arguments or {}),
    )  # fmt: skip


def adapter():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def history(made):
    """What a training logs, step by step, without its times."""
    made.train()
    return [
        {name: value for name, value in row.items() if not any(word in name for word in NOT_OURS)}
        for row in made.state.log_history
    ]


def both(kind, output_dir, monkeypatch, **options):
    """The log of a training as TRL runs it, and of the same one patched, where TRL's kernel must not be called."""
    expected = history(trainer(kind, output_dir, **options))
    made = patch(trainer(kind, output_dir, **options))
    with monkeypatch.context() as patcher:
        patcher.setattr(ChunkedLogProbFunction, "forward", staticmethod(forbidden))
        return expected, history(made)


def forbidden(*_, **__):
    raise AssertionError("TRL's kernel was called")


def same(found, expected, atol=1e-4):
    """Every number logged at every step."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    assert any("loss" in row for row in found)
    for row, other in zip(found, expected):
        for name, value in row.items():
            if name == "rewards/accuracies" and abs(other["rewards/margins"]) < 1e-6:
                continue  # of equal rewards: rounding decides
            tolerance = max(atol, 1e-3 * abs(other[name])) if name == "grad_norm" else atol * max(1, abs(other[name]))
            assert abs(value - other[name]) <= tolerance, (name, value, other[name])


def scored(model, ids, labels, weights):
    """A fused head's outputs, and the gradients of `weights` times them."""
    model.zero_grad()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    total = sum((out[name] * weight).sum() for name, weight in weights.items())
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


def random_ids(seed=0, rows=3, tokens=9):
    """Token ids of the small models, and labels of which a third are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 131, (rows, tokens), generator=generator)
    ignored = torch.rand(rows, tokens, generator=generator) < 0.33
    return ids, ids.masked_fill(ignored, -100)

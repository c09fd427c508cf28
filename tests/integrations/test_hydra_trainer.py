"""transformers.Trainer trains a HydraModel: the loss is the mean over tokens, and what is saved resumes exactly."""

import pytest
import torch
from architectures import build
from transformers import Trainer, TrainingArguments

from rlhf_kernels.integrations.transformers_trainer import HydraSFT, packed_rows
from rlhf_kernels.nn import HydraModel, LoraSpec

ROWS = [
    {"input_ids": [int(t) for t in torch.randint(3, 131, (5 + i % 4,))], "prompt_length": 1 + i % 3} for i in range(12)
]


def model(**options):
    torch.manual_seed(0)
    options = options or {"adapters": {"actor": LoraSpec(r=4), "critic": LoraSpec(r=4)}}
    return HydraModel({"base": build("llama")}, **options)


def trainer(directory, hydra=None, **options):
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2} | options
    arguments = TrainingArguments(
        str(directory), logging_steps=1, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, **options,
    )  # fmt: skip
    return Trainer(
        HydraSFT(hydra or model()), arguments, data_collator=packed_rows, train_dataset=ROWS, eval_dataset=ROWS
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_first_loss_is_the_mean_over_all_accumulated_tokens(tmp_path):
    run = trainer(tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    base = build("llama")
    total, count = 0.0, 0
    for row in ROWS:
        ids, prompt = torch.tensor(row["input_ids"]), row["prompt_length"]
        logprob = base(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[prompt - 1 :]
        total, count = total - logprob.sum().item(), count + logprob.numel()
    run.train()
    assert losses(run)[0] == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("options", [None, {"adapters": {}, "train_base": True}], ids=["adapter", "base"])
def test_a_run_resumes_from_its_checkpoint_bit_for_bit(options, tmp_path):
    whole = trainer(tmp_path, model(**options or {}), gradient_accumulation_steps=2)
    whole.train()
    again = trainer(tmp_path, model(**options or {}), gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    for (name, mine), theirs in zip(again.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(mine, theirs), name
    first = dict(HydraSFT(model(**options or {})).named_parameters())
    changed = [name for name, mine in whole.model.named_parameters() if not torch.equal(mine, first[name])]
    assert changed
    assert all((".actor" in name) == (options is None) for name in changed)


def test_evaluation_and_checkpointing_work(tmp_path):
    run = trainer(tmp_path, gradient_checkpointing=True, max_steps=2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_tied_embeddings_are_saved_once(tmp_path):
    tied = build("llama")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    run = trainer(tmp_path, HydraModel({"base": tied}, train_base=True), max_steps=2)
    run.train()
    again = trainer(tmp_path, HydraModel({"base": tied}, train_base=True), max_steps=2)
    again.train(resume_from_checkpoint=True)


def test_what_cannot_train_is_one_clear_error():
    with pytest.raises(ValueError, match="role 'critic' has a value head"):
        HydraSFT(model(), role="critic")
    with pytest.raises(ValueError, match="role 'reference' has nothing to train"):
        HydraSFT(model(), role="reference")
    with pytest.raises(ValueError, match=r"prompt_length of row 1 is 3; it must be in \[1, 2\]"):
        packed_rows([ROWS[0], {"input_ids": [1, 2, 3], "prompt_length": 3}])
    sft = HydraSFT(model())
    with pytest.raises(ValueError, match="every_n_layers is 2"):
        sft.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(RuntimeError, match="missing"):
        sft.load_state_dict({})

"""Supervised fine-tuning of a HydraModel by transformers.Trainer: a module that gives the loss, and its collator.

    Trainer(HydraSFT(model), TrainingArguments(..., remove_unused_columns=False), data_collator=packed_rows, ...)

A batch is packed: no padding, and no logits beyond a block of the vocabulary. What the Trainer saves and resumes from
is what trains (`state_dict`); `model.save_pretrained` writes the result in PEFT's or transformers' layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.nn.hydra import HydraModel

IGNORED = -100


def packed_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A collator: rows with `input_ids` (ints) and, if the loss is over the completion only, `prompt_length`.

    Returns tokens and labels int64 [all tokens], lengths and prompt_lengths int64 [B]. Labels are the tokens, -100 over
    each prompt: the Trainer counts them over accumulated batches and processes.
    Raises ValueError for a row without a token after its prompt.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    prompts = [int(row.get("prompt_length", 1)) for row in rows]
    for i, (length, prompt) in enumerate(zip(lengths, prompts)):
        if not 1 <= prompt < length:
            raise ValueError(f"prompt_length of row {i} is {prompt}; it must be in [1, {length - 1}]")
    tokens = torch.tensor([token for row in rows for token in row["input_ids"]])
    labels = tokens.clone()
    start = 0
    for length, prompt in zip(lengths, prompts):
        labels[start : start + prompt] = IGNORED
        start += length
    return {
        "tokens": tokens,
        "lengths": torch.tensor(lengths),
        "prompt_lengths": torch.tensor(prompts),
        "labels": labels,
    }


class HydraSFT(nn.Module):
    """A HydraModel as transformers.Trainer wants a model: forward(**batch) -> {"loss": ...}.

    The loss is the mean of -log p over the tokens after the prompts: over `num_items_in_batch` of them, where the
    Trainer says how many all accumulated batches have.
    """

    accepts_loss_kwargs = True  # read by the Trainer

    def __init__(self, model: HydraModel, role: str = "actor") -> None:
        """`role`: whose log-probabilities train; it must have the lm head, and an adapter or a base that trains."""
        super().__init__()
        if model.role(role).head != "lm":
            raise ValueError(
                f"role {role!r} has a {model.role(role).head} head; supervised fine-tuning needs an lm head"
            )
        if not model.trainable_parameters(role):
            raise ValueError(f"role {role!r} has nothing to train; give it an adapter, or load with train_base=True")
        self.model = model
        self.role = role
        wanted = {id(p) for p in model.trainable_parameters(role)}
        for parameter in model.parameters():  # the optimiser holds what this loss reaches, nothing else
            parameter.requires_grad_(id(parameter) in wanted)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """A batch of `packed_rows` -> {"loss": fp32 scalar}. `labels` are the Trainer's, to count by; not read here."""
        logprob = self.model(tokens, lengths, roles=(self.role,), prompt_lengths=prompt_lengths)[self.role].logprob
        return {"loss": -logprob.sum() / (logprob.numel() if num_items_in_batch is None else num_items_in_batch)}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What TrainingArguments(activation_checkpointing=True) calls. Every decoder layer is recomputed."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"activation_checkpointing_kwargs: every_n_layers is {every_n_layers} and offload {offload}; a "
                "HydraModel recomputes every layer, from inputs that stay where they are"
            )
        self.model.gradient_checkpointing_enable((activation_checkpointing_kwargs or {}).get("use_reentrant", False))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same under the name that older versions of transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what trains, each tensor once: the rest is the checkpoint the model was loaded from."""
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trains}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes what `state_dict` gives. With `strict`, RuntimeError where a name is missing or unknown."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = [name for name in found.missing_keys if name in trains]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"state_dict: missing {missing}, unknown {found.unexpected_keys}")
        return type(found)(missing, found.unexpected_keys)

"""The integrations beside what other people's loops do without them: one training step's work on a padded batch.

A small Llama with a vocabulary of 32,000, so that its head matters as a large model's does; fp32. Prompts are padded on
the left and completions on the right, as loops that keep rectangles have them. Each contestant has a model of its own
with the same weights; a run is forward and backward, and leaves the gradients of everything that trains. Times are the
process's own, not the wall's: of work on one thread.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Prepare, Run, Unavailable, ready

VOCAB, HIDDEN, LAYERS = 32_000, 256, 4
PROMPTS, COMPLETIONS = (8, 48), (8, 96)  # the shortest and the longest of a batch
LOGITS = "from logits"
SDPA, EAGER = "sdpa", "eager"
NEW_TOKENS = 32


@dataclass
class Batch:
    """[B, prompt + completion], padded on both sides."""

    ids: Tensor
    mask: Tensor
    actions: Tensor  # bool [B, completion]

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(-1) - 1).clamp_min(0)


def batch_of(rows: int) -> Batch:
    torch.manual_seed(0)
    prompt, answer = (torch.linspace(*ends, rows).long() for ends in (PROMPTS, COMPLETIONS))
    before = torch.arange(PROMPTS[1]) >= PROMPTS[1] - prompt[:, None]
    actions = torch.arange(COMPLETIONS[1]) < answer.flip(0)[:, None]
    mask = torch.cat([before, actions], 1)
    return Batch(torch.randint(1, VOCAB, mask.shape) * mask, mask.long(), actions)


def llama(attention: str = SDPA) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_kernels.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN + HIDDEN // 2, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def _ours(model: Any, batch: Batch) -> Tensor:
    """The log-probabilities of the actions, [B, completion], by the fused head."""
    import rlhf_kernels

    hidden = model.model(batch.ids, batch.mask, batch.positions, use_cache=False).last_hidden_state
    width = batch.actions.shape[1]
    target = batch.ids[:, -width:].masked_fill(~batch.actions, -100)
    return rlhf_kernels.linear_logprob(hidden[:, -width - 1 : -1], model.lm_head.weight, target).logprob


def _theirs(model: Any, batch: Batch) -> Tensor:
    """The same from the logits of the whole batch, as loops have them."""
    logits = model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False).logits
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return logprob[:, -batch.actions.shape[1] :] * batch.actions


def _step(model: Any, loss: Callable[[], Tensor]) -> Run:
    def run() -> None:
        model.zero_grad()
        loss().backward()

    return run


def head(device: str) -> Case:
    """verl's call: log-probabilities and entropies of 512 rows, each with gradients of its own, a trained head."""

    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        rows, vocab = (32, 1000) if tiny else (512, VOCAB)
        hidden = torch.randn(rows, 1024, requires_grad=True)
        weight = (torch.randn(vocab, 1024) / 32).requires_grad_()
        labels = torch.randint(vocab, (rows,))

        def logits() -> object:
            p = (hidden @ weight.t()).log_softmax(-1)
            entropy = -(p.exp() * p).sum(-1)
            return torch.autograd.grad((p.gather(-1, labels[:, None])[:, 0] + 0.01 * entropy).sum(), (hidden, weight))

        def ours() -> object:
            from rlhf_kernels.integrations.verl import linear_cross_entropy

            logprob, entropy = linear_cross_entropy(hidden, weight, labels)
            return torch.autograd.grad((logprob + 0.01 * entropy).sum(), (hidden, weight))

        return {LOGITS: ready(logits), OURS: ready(ours)}

    return Case(f"verl's call: logprob and entropy, forward + backward, 512 x 1024 x {VOCAB} fp32", build, LOGITS)


def actor(device: str) -> Case:
    """OpenRLHF's actor step, with the fused head and our attention against logits and sdpa."""

    def build(tiny: bool) -> dict[str, Prepare]:
        batch = batch_of(2 if tiny else 8)

        def contestant(attention: str, logprob: Callable[[Any, Batch], Tensor]) -> Prepare:
            def prepare() -> Run:
                model = llama(attention)
                return _step(model, lambda: -logprob(model, batch).sum() / batch.actions.sum())

            return prepare

        return {LOGITS: contestant(SDPA, _theirs), OURS: contestant("rlhf_kernels_sliced", _ours)}

    return Case(
        "OpenRLHF's actor step: action log-probs, forward + backward, 8 x 144 tokens, half padding", build, LOGITS
    )


def attention(device: str) -> Case:
    """The decoder alone, padded, under transformers' attentions and ours."""

    def build(tiny: bool) -> dict[str, Prepare]:
        batch = batch_of(2 if tiny else 16)

        def contestant(name: str) -> Prepare:
            def prepare() -> Run:
                model = llama(name).model
                options = {"position_ids": batch.positions, "use_cache": False}
                return _step(model, lambda: model(batch.ids, batch.mask, **options).last_hidden_state.square().mean())

            return prepare

        return {SDPA: contestant(SDPA), EAGER: contestant(EAGER), OURS: contestant("rlhf_kernels_sliced")}

    return Case("transformers' decoder, forward + backward, 16 x 144 tokens, half padding", build, SDPA)


def generate(device: str) -> Case:
    """model.generate through transformers' cache, and the sliced generator on the same prompts."""

    def build(tiny: bool) -> dict[str, Prepare]:
        batch = batch_of(2 if tiny else 16)
        ids, mask = batch.ids[:, : PROMPTS[1]], batch.mask[:, : PROMPTS[1]]
        new = 2 if tiny else NEW_TOKENS

        def contestant(name: str) -> Prepare:
            def prepare() -> Run:
                model = llama(name)
                return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)

            return prepare

        def generator() -> Run:
            from rlhf_kernels.generation import SamplingParams, SlicedGenerator

            engine = SlicedGenerator(llama(), "64MiB")
            prompts = [row[kept > 0].tolist() for row, kept in zip(ids, mask)]
            params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
            return lambda: engine.generate(prompts, params)

        return {SDPA: contestant(SDPA), OURS: contestant("rlhf_kernels_sliced"), "SlicedGenerator": generator}

    return Case(f"generate: 16 padded prompts, {NEW_TOKENS} tokens each", build, SDPA)


def supervised(device: str) -> Case:
    """What transformers.Trainer runs in a step: PEFT's adapters and the model's own loss, or HydraSFT."""

    def build(tiny: bool) -> dict[str, Prepare]:
        batch = batch_of(2 if tiny else 8)
        labels = batch.ids.masked_fill(batch.mask == 0, -100)
        labels[:, : PROMPTS[1]] = -100

        def theirs() -> Run:
            try:
                import peft
            except ImportError as error:
                raise Unavailable("PEFT is not installed") from error
            config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(llama(), config)
            inputs = {"attention_mask": batch.mask, "position_ids": batch.positions, "use_cache": False}
            return _step(model, lambda: model(input_ids=batch.ids, labels=labels, **inputs).loss)

        def ours() -> Run:
            from rlhf_kernels.integrations.transformers_trainer import HydraSFT, packed_rows
            from rlhf_kernels.nn import HydraModel, LoraSpec

            model = HydraSFT(HydraModel({"base": llama()}, {"actor": LoraSpec(r=16)}))
            rows = [
                {"input_ids": row[kept > 0].tolist(), "prompt_length": int(kept[: PROMPTS[1]].sum())}
                for row, kept in zip(batch.ids, batch.mask)
            ]
            inputs = packed_rows(rows)
            return _step(model, lambda: model(**inputs)["loss"])

        return {"transformers and PEFT": theirs, OURS: ours}

    name = "transformers.Trainer's step: supervised, adapters of rank 16, 8 x 144 tokens, half padding"
    return Case(name, build, "transformers and PEFT")


def cases(device: str = "cpu") -> Iterator[Case]:
    if device != "cpu":
        raise ValueError(f"device is {device!r}; `loops` is measured on the CPU")
    for make in (head, actor, attention, generate, supervised):
        yield replace(make(device), clock=time.process_time)

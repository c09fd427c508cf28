"""Every algorithm's update once more, in plain PyTorch: padded rows, attention masks, transformers' own forward,
adapters merged by hand. It shares no code with the trainer, and is written to be checked against the papers by eye."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call


@dataclass
class Net:
    """A decoder's weights, an optional adapter {module: (A, B)} and an optional head [1, hidden]."""

    skeleton: torch.nn.Module
    weights: dict[str, Tensor]
    adapter: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scaling: float = 1.0
    head: Tensor | None = None

    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, L, V] and final hidden states [B, L, H]."""
        weights = dict(self.weights)
        for module, (a, b) in self.adapter.items():
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + self.scaling * b @ a
        inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
        out = functional_call(self.skeleton, weights, kwargs=inputs)
        return out.logits, out.hidden_states[-1]

    def leaves(self, with_head: bool = False) -> list[Tensor]:
        """The adapter's tensors, or the base's where there is no adapter; the head too."""
        own = [t for pair in self.adapter.values() for t in pair] if self.adapter else list(self.weights.values())
        return [*own, self.head] if with_head else own


@dataclass
class Padded:
    """Right-padded rows. ids, mask [B, L]; answer [B, L-1] marks places whose next token belongs to the completion."""

    ids: Tensor
    mask: Tensor
    answer: Tensor


def pad(rows: list[tuple[list[int], list[int]]]) -> Padded:
    longest = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, answer = torch.zeros_like(ids), torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        whole = prompt + completion
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)] = 1
        answer[i, max(len(prompt) - 1, 0) : len(whole) - 1] = True
    return Padded(ids, mask, answer)


def logprobs(net: Net, rows: Padded, temperature: float = 1.0) -> Tensor:
    logits, _ = net(rows.ids, rows.mask)
    every = F.log_softmax(logits[:, :-1] / temperature, -1)
    return every.gather(-1, rows.ids[:, 1:, None])[..., 0] * rows.answer


def divergence(name: str, actor: Net, other: Net, rows: Padded, temperature: float = 1.0) -> Tensor:
    """d_t [B, L-1] of the table of regularisers (2309.09055), from the whole distributions."""
    p, q = (F.log_softmax(net(rows.ids, rows.mask)[0][:, :-1] / temperature, -1) for net in (actor, other))
    m = torch.log((p.exp() + q.exp()) / 2)

    def at_token(x: Tensor) -> Tensor:
        return x.gather(-1, rows.ids[:, 1:, None])[..., 0]

    pt, qt, mt = at_token(p), at_token(q), at_token(m)
    terms = {
        "kl": pt - qt,
        "clamped_kl": torch.relu(pt - qt),
        "squared_error": (pt - qt) ** 2 / 2,
        "bregman": qt.exp() / pt.exp() - 1 + pt - qt,
        "jensen_shannon": (torch.relu(pt - mt) + torch.relu(qt - mt)) / 2,
        "full_kl": (p.exp() * (p - q)).sum(-1),
        "full_js": ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2,
        "none": torch.zeros_like(pt),
    }
    return terms[name] * rows.answer


def values(net: Net, rows: Padded) -> Tensor:
    _, hidden = net(rows.ids, rows.mask)
    return (hidden[:, :-1] @ net.head.T)[..., 0] * rows.answer


def rewards(net: Net, rows: Padded) -> Tensor:
    _, hidden = net(rows.ids, rows.mask)
    last = rows.mask.sum(1) - 1
    return (hidden[torch.arange(len(last)), last] @ net.head.T)[:, 0]


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    chosen = x[mask]
    out = (x - chosen.mean()) / torch.sqrt(chosen.var(correction=0) + 1e-8)
    return (out if shift_mean else out + chosen.mean()) * mask


def optimise(groups: list[tuple[list[Tensor], float]], config: Any) -> torch.optim.Optimizer:
    """AdamW over groups of leaves; matrices decay, vectors do not."""
    parts = []
    for leaves, rate in groups:
        for leaf in leaves:
            leaf.requires_grad_(True)
            decay = config.weight_decay if leaf.ndim >= 2 else 0.0
            parts.append({"params": [leaf], "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(parts, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)


def descend(loss: Tensor, groups: list[tuple[list[Tensor], float]], adam: torch.optim.Optimizer, config: Any) -> None:
    adam.zero_grad()
    loss.backward()
    for leaves, _ in groups:
        torch.nn.utils.clip_grad_norm_(leaves, config.max_grad_norm)
    adam.step()


def shaped(score: Tensor, finished: Tensor, config: Any) -> Tensor:
    if config.reward_clip is not None:
        score = torch.clip(score, -config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty is not None:
        score = torch.where(finished, score, score - config.missing_eos_penalty)
    return score


def ppo(
    nets: dict[str, Net],
    sequences: list,
    finished: Tensor,
    config: Any,
    joint: bool = False,
    seen: list[float] | None = None,
    demonstrations: list | None = None,
) -> list[float]:
    """nets: actor, critic, reference, reward. Steps the actor's and critic's tensors; returns each loss.

    PPO-max: `seen` holds the raw rewards of the rollouts before, and is added to; `demonstrations` are PPO-ptx's, one
    batch an epoch.
    """
    actor, critic = nets["actor"], nets["critic"]
    rows = pad(sequences)
    with torch.no_grad():
        old, old_values = logprobs(actor, rows, config.temperature), values(critic, rows)
        score = rewards(nets["reward"], rows)
        if seen is not None:
            seen += score.tolist()
            history = torch.tensor(seen, dtype=torch.float64)
            score = ((score.double() - history.mean()) / history.std(correction=0)).to(score.dtype)
        score = shaped(score, finished, config)
        away = divergence(config.kl_estimator, actor, nets["reference"], rows, config.temperature)
        reward = -config.kl_coef * away
        ends = [int(places.nonzero()[-1]) for places in rows.answer]
        for i, end in enumerate(ends):
            reward[i, end] += score[i]
        if config.whiten_rewards:
            reward = whiten(reward, rows.answer, shift_mean=False)
        advantage = torch.zeros_like(reward)
        for i in range(len(ends)):
            running, following = 0.0, 0.0
            for t in reversed(rows.answer[i].nonzero()[:, 0].tolist()):
                delta = reward[i, t] + config.gamma * following - old_values[i, t]
                running = delta + config.gamma * config.lam * running
                advantage[i, t], following = running, old_values[i, t]
        returns = advantage + old_values * rows.answer
        advantage = whiten(advantage, rows.answer)
        if config.advantage_clip is not None:
            advantage = torch.clip(advantage, -config.advantage_clip, config.advantage_clip)
    critic_leaves = [critic.head] if joint else critic.leaves(with_head=True)
    groups = [(actor.leaves(), config.learning_rate), (critic_leaves, config.critic_learning_rate)]
    adam = optimise(groups, config)
    losses = []
    for epoch in range(config.num_ppo_epochs):
        new, value = logprobs(actor, rows, config.temperature), values(critic, rows)
        ratio = torch.exp(new - old)
        surrogate = torch.min(
            advantage * ratio, advantage * torch.clip(ratio, 1 - config.cliprange, 1 + config.cliprange)
        )
        near = torch.clip(value, old_values - config.cliprange_value, old_values + config.cliprange_value)
        square = torch.max((value - returns) ** 2, (near - returns) ** 2)
        loss = -surrogate[rows.answer].mean() + config.vf_coef * 0.5 * square[rows.answer].mean()
        losses.append(loss.item())
        if demonstrations:
            shown = pad(demonstrations[epoch])
            loss = loss - config.ptx_coef * logprobs(actor, shown)[shown.answer].mean()
        descend(loss, groups, adam, config)
    return losses


def pe_rlhf(nets: dict[str, Net], sequences: list, finished: Tensor, config: Any) -> list[float]:
    """nets: actor, reference, reward, and critic, whose head reads the actor's hidden states."""
    actor, rows = nets["actor"], pad(sequences)
    critic = Net(actor.skeleton, actor.weights, actor.adapter, actor.scaling, nets["critic"].head)
    with torch.no_grad():
        score = shaped(rewards(nets["reward"], rows), finished, config)
        away = divergence(config.kl_estimator, actor, nets["reference"], rows, config.temperature)
        reward = -config.kl_coef * away
        for i, places in enumerate(rows.answer):
            reward[i, int(places.nonzero()[-1])] += score[i]
        length = reward.shape[1]
        later = torch.arange(length)[:, None] - torch.arange(length)[None]  # [s, t]: s - t
        discount = torch.where(later >= 0, torch.tensor(config.gamma).double() ** later.clamp(min=0), 0).to(reward)
        returns = reward @ discount * rows.answer
        advantage = returns - values(critic, rows)
    groups = [(actor.leaves(), config.learning_rate), ([critic.head], config.critic_learning_rate)]
    adam = optimise(groups, config)
    weighted = (advantage * logprobs(actor, rows, config.temperature)).sum()
    policy = -weighted / (len(sequences) if config.loss == "sequence" else rows.answer.sum())
    value = ((values(critic, rows) - returns)[rows.answer] ** 2).mean() / 2
    descend(policy + config.vf_coef * value, groups, adam, config)
    return [policy.item(), value.item()]


def remax(
    nets: dict[str, Net], sampled: list, greedy: list, finished: tuple[Tensor, Tensor], config: Any
) -> list[float]:
    """sampled[i] and greedy[i] answer the same prompt; finished: of the sampled and of the greedy ones."""
    actor, rows = nets["actor"], pad(sampled)
    with torch.no_grad():
        gain = shaped(rewards(nets["reward"], rows), finished[0], config)
        gain = gain - shaped(rewards(nets["reward"], pad(greedy)), finished[1], config)
        away = divergence(config.kl_estimator, actor, nets["reference"], rows, config.temperature)
        penalty = config.kl_coef * away
        if config.kl_mode == "cumulative":
            penalty = penalty.flip(1).cumsum(1).flip(1)
        advantage = (gain[:, None] - penalty) * rows.answer
    groups = [(actor.leaves(), config.learning_rate)]
    adam = optimise(groups, config)
    weighted = (advantage * logprobs(actor, rows, config.temperature)).sum()
    loss = -weighted / (len(sampled) if config.loss == "sequence" else rows.answer.sum())
    descend(loss, groups, adam, config)
    return [loss.item()]


def supervised(nets: dict[str, Net], batch: list, config: Any) -> list[float]:
    """sft (actor only), reward (reward only) and hydra-sft (both): rows have prompt, chosen, rejected."""
    chosen = pad([(row.prompt, row.chosen) for row in batch])
    rejected = pad([(row.prompt, row.rejected) for row in batch])
    actor, reward = nets.get("actor"), nets.get("reward")
    groups = [(actor.leaves(), config.learning_rate)] if actor else []
    if reward:
        groups.append(([reward.head] if actor else reward.leaves(with_head=True), config.learning_rate))
    adam = optimise(groups, config)
    loss = torch.zeros(())
    if actor:
        loss = loss - logprobs(actor, chosen)[chosen.answer].mean()
    if reward:
        margin = rewards(reward, chosen) - rewards(reward, rejected)
        loss = loss + (config.reward_loss_coef if actor else 1.0) * torch.log1p(torch.exp(-margin)).mean()
    descend(loss, groups, adam, config)
    return [loss.item()]


def gap(net: Net, best: Padded, worst: Padded, temperature: float = 1.0) -> Tensor:
    """log p(best) - log p(worst), a number a pair."""
    return logprobs(net, best, temperature).sum(1) - logprobs(net, worst, temperature).sum(1)


def dpo(nets: dict[str, Net], batch: list, config: Any) -> list[float]:
    """nets: actor, reference. Rows have prompt, chosen, rejected; r-dpo's alpha counts their tokens."""
    chosen = pad([(row.prompt, row.chosen) for row in batch])
    rejected = pad([(row.prompt, row.rejected) for row in batch])
    with torch.no_grad():
        reference = gap(nets["reference"], chosen, rejected)
    groups = [(nets["actor"].leaves(), config.learning_rate)]
    adam = optimise(groups, config)
    z = config.beta * (gap(nets["actor"], chosen, rejected) - reference)
    if config.algorithm == "r-dpo":
        z = z + config.length_coef * torch.tensor([float(len(row.chosen) - len(row.rejected)) for row in batch])
    right = torch.sigmoid(z)
    loss = -((1 - config.label_smoothing) * right.log() + config.label_smoothing * (1 - right).log()).mean()
    descend(loss, groups, adam, config)
    return [loss.item()]


def inpo(nets: dict[str, Net], sequences: list, finished: Tensor, config: Any) -> list[float]:
    """nets: actor, snapshot, reference, reward. sequences: num_generations of each prompt, one after another."""
    with torch.no_grad():
        score = shaped(rewards(nets["reward"], pad(sequences)), finished, config).view(-1, config.num_generations)
        first = torch.arange(len(score)) * config.num_generations
        best = pad([sequences[i] for i in first + score.argmax(1)])
        worst = pad([sequences[i] for i in first + score.argmin(1)])
        anchors = [gap(nets[role], best, worst, config.temperature) for role in ("reference", "snapshot")]
        tau = config.tau_ratio * config.eta
    groups = [(nets["actor"].leaves(), config.learning_rate)]
    adam = optimise(groups, config)
    h = gap(nets["actor"], best, worst, config.temperature)
    h = h - tau / config.eta * anchors[0] - (config.eta - tau) / config.eta * anchors[1]
    loss = ((h - 1 / (2 * config.eta)) ** 2).mean()
    descend(loss, groups, adam, config)
    return [loss.item()]

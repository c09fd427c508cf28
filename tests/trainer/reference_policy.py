"""Policy gradients and best-of-n once more, in plain PyTorch and float64, as `reference_algorithms.py` does the others.

Sequences stand prompt by prompt, a prompt's samples next to each other. Nothing is shared with the trainer."""

from typing import Any

import torch
import torch.nn.functional as F
from reference_algorithms import Net, descend, logprobs, optimise, pad, rewards, shaped
from torch import Tensor

ROLES = ("actor", "reference")


def double(net: Net) -> Net:
    """The same net in float64."""
    weights = {name: value.double() for name, value in net.weights.items()}
    adapter = {name: (a.double(), b.double()) for name, (a, b) in net.adapter.items()}
    head = None if net.head is None else net.head.double()
    return Net(net.skeleton.double(), weights, adapter, net.scaling, head)


def returns(nets: dict[str, Net], sequences: list, finished: Tensor, config: Any) -> Tensor:
    """Score less kl_coef times the summed log-ratio to the reference, a completion."""
    rows = pad(sequences)
    k1 = logprobs(nets["actor"], rows, config.temperature) - logprobs(nets["reference"], rows, config.temperature)
    return shaped(rewards(nets["reward"], rows), finished, config) - config.kl_coef * k1.sum(1)


def policy_gradient(nets: dict[str, Net], sequences: list, finished: Tensor, config: Any) -> float:
    """reinforce (first step: the baseline is the mean) and rloo; steps the actor's tensors, returns the loss."""
    with torch.no_grad():
        gain = returns(nets, sequences, finished, config)
        advantage = torch.zeros_like(gain)
        k = config.num_generations
        for i in range(len(gain)):
            first = i - i % k
            others = [gain[j] for j in range(first, first + k) if j != i] if config.algorithm == "rloo" else list(gain)
            advantage[i] = gain[i] - sum(others) / len(others)
    groups = [(nets["actor"].leaves(), config.learning_rate)]
    adam = optimise(groups, config)
    rows = pad(sequences)
    likelihood = logprobs(nets["actor"], rows, config.temperature).sum(1)
    loss = -sum(a * p for a, p in zip(advantage, likelihood)) / len(sequences)
    descend(loss, groups, adam, config)
    return loss.item()


def best_of(nets: dict[str, Net], sequences: list, finished: Tensor, config: Any) -> float:
    """raft and superhf; steps the actor's tensors, returns the loss."""
    k = config.num_generations
    with torch.no_grad():
        if config.algorithm == "raft":
            worth = returns(nets, sequences, finished, config)
        else:
            worth = shaped(rewards(nets["reward"], pad(sequences)), finished, config)
        chosen = [max(range(i, i + k), key=lambda j: worth[j]) for i in range(0, len(sequences), k)]
    groups = [(nets["actor"].leaves(), config.learning_rate)]
    adam = optimise(groups, config)
    rows = pad([sequences[i] for i in chosen])
    likelihood = logprobs(nets["actor"], rows, config.temperature)
    if config.algorithm == "raft":
        loss = -likelihood.sum() / rows.answer.sum()
    else:
        loss = torch.zeros(())
        now, start = (F.log_softmax(nets[n](rows.ids, rows.mask)[0][:, :-1] / config.temperature, -1) for n in ROLES)
        for i, places in enumerate(rows.answer):
            p, p0 = now[i][places], start[i][places].detach()
            divergence = (p0.exp() * (p0 - p)).sum(-1).mean()
            loss = loss + (config.kl_coef * divergence - likelihood[i][places].mean()) / len(chosen)
    descend(loss, groups, adam, config)
    return loss.item()

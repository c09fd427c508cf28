"""Generation as it is defined: one full forward of the plain model a token, and a draw written out in Python floats.

Nothing here comes from the library: Philox4x32-10 is spelled out from its paper, the filters from their definitions.
Where two tokens are as good as equal to the rounding of the logits, either one is a right draw (`Draw.fair`).
"""

import math
from dataclasses import dataclass

import torch

from rlhf_kernels.generation import Rollout, SamplingParams

ROUNDING = 1e-5  # of a logit, a probability or a share of the mass
MASK = 0xFFFFFFFF


def uniform(seed: int, stream: int, sample_index: int, position: int) -> float:
    """The 53-bit draw in [0, 1) of Philox4x32-10 under the key `seed` at (position, sample_index, stream)."""
    counter = [position & MASK, sample_index & MASK, stream & MASK, stream >> 32 & MASK]
    key = [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & MASK,
            (left >> 32) ^ counter[3] ^ key[1],
            left & MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return ((counter[1] << 32 | counter[0]) >> 11) / 2.0**53


@dataclass
class Draw:
    """One token's draw from a row of logits."""

    logits: list[float]
    params: SamplingParams
    greedy: bool
    uniform: float

    def token(self, u: float = 0.0, top_p: float = 0.0, min_p: float = 1.0) -> int:
        """The token; the arguments shift the draw and the thresholds by so much."""
        if self.greedy or self.params.temperature == 0:
            return self.order()[0]
        kept, weights = self.kept(top_p, min_p)
        target = min(max(self.uniform + u, 0.0), 1.0) * sum(weights[i] for i in kept)
        mass = 0.0
        for token in sorted(kept):
            mass += weights[token]
            if mass > target:
                return token
        return max(kept)

    def order(self) -> list[int]:
        return sorted(range(len(self.logits)), key=lambda i: (-self.logits[i], i))

    def kept(self, top_p: float = 0.0, min_p: float = 1.0) -> tuple[list[int], list[float]]:
        """The tokens that pass the filters, likeliest first, and every token's unnormalised probability."""
        order, p = self.order(), self.params
        top = self.logits[order[0]]
        weights = [math.exp((z - top) / p.temperature) for z in self.logits]
        if p.top_k:
            order = order[: p.top_k]
        if p.top_p < 1:
            total, mass, count = sum(weights[i] for i in order), 0.0, 0
            while count < len(order) and (count == 0 or mass < (p.top_p + top_p) * total):
                mass += weights[order[count]]
                count += 1
            order = order[:count]
        return [i for i in order if weights[i] >= p.min_p * min_p], weights

    def fair(self, token: int) -> bool:
        """Whether `token` is the draw, or would be but for rounding."""
        if token == self.token():
            return True
        best = self.order()
        if self.greedy or self.params.temperature == 0:
            return self.logits[best[0]] - self.logits[token] < ROUNDING
        k = self.params.top_k
        if 0 < k < len(best) and self.logits[best[k - 1]] - self.logits[best[k]] < ROUNDING:
            return True
        shifts = (0.0, ROUNDING, -ROUNDING)
        return any(token == self.token(u, p, 1 + m) for u in shifts for p in shifts for m in shifts)

    def logprob(self, token: int) -> float:
        temperature = self.params.temperature or 1.0
        return torch.tensor(self.logits).double().div(temperature).log_softmax(-1)[token].item()


@torch.no_grad()
def check_rollout(lm, prompt: list[int], params: SamplingParams, stream: int, rollout: Rollout, end=()) -> int:
    """Generates it again and compares every token, logprob and the end. Returns how many draws were close calls."""
    tokens: list[int] = []
    close = 0
    assert rollout.greedy == (params.temperature == 0 or rollout.sample_index == params.n)
    while True:
        position = len(prompt) + len(tokens)
        row = lm(torch.tensor([prompt + tokens])).logits[0, -1]
        draw = Draw(
            row.double().tolist(), params, rollout.greedy, uniform(params.seed, stream, rollout.sample_index, position)
        )
        assert len(rollout.tokens) > len(tokens), f"it stopped after {len(tokens)} tokens ({rollout.finish_reason})"
        token = rollout.tokens[len(tokens)]
        assert draw.fair(token), (
            f"token {len(tokens)} is {token}, the definition draws {draw.token()}: {params}, stream {stream}, {rollout}"
        )
        close += token != draw.token()
        bound = max(ROUNDING, 4e-6 * row.std().item()) / min(params.temperature or 1.0, 1.0)
        assert abs(rollout.logprobs[len(tokens)] - draw.logprob(token)) <= bound
        tokens.append(token)
        if token in end and not params.ignore_eos:
            reason = "eos"
        elif token in params.stop_token_ids:
            reason = "stop"
        elif len(tokens) == params.max_new_tokens:
            reason = "length"
        else:
            continue
        assert (rollout.tokens, rollout.finish_reason) == (tokens, reason)
        assert len(rollout.logprobs) == len(tokens)
        return close

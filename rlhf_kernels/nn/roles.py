"""Roles of a model (which base, which adapter, which head) and what a forward returns for each."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

HEADS = ("lm", "value", "reward")


@dataclass(frozen=True)
class Role:
    """adapter None is the bypass: the base itself. head: "lm" (logprobs), "value" (a token) or "reward" (at last)."""

    adapter: str | None = None
    head: str = "lm"
    base: str = "base"

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; it must be one of {', '.join(HEADS)}")

    @property
    def head_key(self) -> str:
        """The role's head in HydraModel.heads; heads live per base."""
        return self.head if self.base == "base" else f"{self.base}:{self.head}"


def default_roles(adapters: Mapping[str, object], bases: Mapping[str, object]) -> dict[str, Role]:
    """actor, critic, reference and reward; on the base of their own name where there is one, else on "base".

    An adapter of the role's name, else one named "joint" (J-Hydra), serves actor and critic.
    """

    def pick(name: str) -> str | None:
        return next((adapter for adapter in (name, "joint") if adapter in adapters), None)

    heads = {"actor": "lm", "critic": "value", "reference": "lm", "reward": "reward"}
    fallback = "base" if "base" in bases else next(iter(bases))
    return {
        name: Role(
            pick(name) if name in ("actor", "critic") else None, head, name if name in bases else fallback
        )
        for name, head in heads.items()
    }  # fmt: skip


@dataclass
class RoleOutput:
    """One role's results, fp32; None what was not asked for or its head does not give.

    Flat fields lie over the tokens after each prompt, sequence after sequence. `value` at a token is the value of the
    state before it: from the hidden state that predicts it. `reward` [B] is read at each sequence's last token.
    """

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    rkl: Tensor | None = None
    js: Tensor | None = None
    k1: Tensor | None = None
    k2: Tensor | None = None
    k3: Tensor | None = None
    value: Tensor | None = None
    reward: Tensor | None = None


class HydraOutput(dict[str, RoleOutput]):
    """out[role] for every role that ran; out.lengths int64 [B]: how many flat entries each sequence has.

    A dict, so that what looks for tensors in a module's output (FSDP's hooks) finds them.
    """

    def __init__(self, roles: Mapping[str, RoleOutput], lengths: Tensor) -> None:
        super().__init__(roles)
        self.lengths = lengths

    def __missing__(self, role: str) -> RoleOutput:
        raise KeyError(f"{role!r} did not run; roles of this output: {', '.join(self)}")

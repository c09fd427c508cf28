"""What each algorithm holds in memory: copies of the model, adapters, scalar heads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """One copy of the model. `scalar`: read through a scalar head alone, so its output head has no gradient."""

    role: str
    trained: bool = False
    scalar: bool = False


@dataclass(frozen=True)
class Layout:
    """Which copies, adapters and scalar heads (name, trained) an algorithm holds.

    `passes`: forward passes with gradients a sequence; `heads_lm` of them read the vocabulary. `rollout`: it generates.
    """

    bases: tuple[Base, ...]
    adapters: tuple[str, ...] = ()
    heads: tuple[tuple[str, bool], ...] = ()
    passes: int = 1
    heads_lm: int = 1
    rollout: bool = True


_SHARED = (Base("shared base"),)
_FOUR = (("value", True), ("critic's start", False), ("reward", False))
_COPIES = (Base("reference"), Base("reward", scalar=True))
_POLICY = Layout((Base("policy", trained=True), *_COPIES), (), (("reward", False),), 1)

LAYOUTS = {
    "sft": Layout((Base("policy", trained=True),), rollout=False),
    "reward": Layout((Base("reward", trained=True, scalar=True),), (), (("reward", True),), 2, 0, rollout=False),
    "hydra-sft": Layout((Base("policy", trained=True),), (), (("reward", True),), 2, 1, rollout=False),
    "ppo": Layout((Base("actor", True), Base("critic", True, scalar=True), *_COPIES), (), _FOUR, 2),
    "lora-ppo": Layout((Base("actor"), Base("critic", scalar=True), *_COPIES), ("actor", "critic"), _FOUR, 2),
    "j-hydra-ppo": Layout(_SHARED, ("joint",), (("value", True), ("reward", False)), 1),
    "hydra-ppo": Layout(_SHARED, ("actor", "critic"), (("value", True), ("reward", False)), 2),
    "remax": _POLICY,
    "reinforce": _POLICY,
    "rloo": _POLICY,
    "raft": Layout((Base("policy", trained=True), Base("reward", scalar=True)), (), (("reward", False),), 1),
    "superhf": Layout(_SHARED, ("actor",), (("reward", False),), 1),
}
ALIASES = {"hydra": "hydra-ppo", "j-hydra": "j-hydra-ppo"}


def without_reward_copy(layout: Layout) -> Layout:
    """Without the frozen reward model. Its head goes too, unless it is the only one and can read the reference."""
    bases = tuple(b for b in layout.bases if b.role != "reward" or b.trained)
    left = len(layout.heads) == 1 and any(not b.trained for b in bases)
    gone = len(bases) < len(layout.bases) and not left
    heads = tuple(h for h in layout.heads if not (gone and h[0] == "reward"))
    return Layout(bases, layout.adapters, heads, layout.passes, layout.heads_lm, layout.rollout)

"""What each algorithm holds in memory (copies of the model, adapters, scalar heads) and which forwards it makes.

Rows that may train either whole bases or adapters have a layout for each; the one of the paper stands in LAYOUTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple


class Base(NamedTuple):
    """One copy of the model."""

    role: str
    trained: bool = False


class Part(NamedTuple):
    """A role: adapter (None: the base itself), head ("lm", "value" or "reward"), and the base by its role's name."""

    adapter: str | None = None
    head: str = "lm"
    base: str = "base"


class Call(NamedTuple):
    """A forward with gradients of an update: the roles that read `sequences` sequences for each one of a batch."""

    roles: tuple[str, ...]
    sequences: int = 1
    divergence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The first base is called "base" in `roles`, the others by their role. `scored`: roles that read every rollout.

    `trained`: the roles that learn; an adapter that none of them uses is frozen.
    """

    bases: tuple[Base, ...]
    roles: Mapping[str, Part]
    trained: tuple[str, ...]
    update: tuple[Call, ...]
    scored: tuple[str, ...] = ()
    rollout: bool = True

    def base_names(self) -> dict[str, Base]:
        """The bases by the names that `roles` uses."""
        return {"base" if i == 0 else base.role: base for i, base in enumerate(self.bases)}

    @property
    def adapters(self) -> dict[str, bool]:
        """Adapters, and whether each is trained."""
        names = dict.fromkeys(p.adapter for p in self.roles.values() if p.adapter is not None)
        return {name: any(self.roles[r].adapter == name for r in self.trained) for name in names}

    @property
    def heads(self) -> dict[tuple[str, str], bool]:
        """Scalar heads by base and kind, and whether each is trained."""
        keys = dict.fromkeys((p.base, p.head) for p in self.roles.values() if p.head != "lm")
        return {key: any(self.roles[r][1:] == key[::-1] for r in self.trained) for key in keys}

    def reads_vocabulary(self, base: str) -> bool:
        """Whether a trained role on `base` goes through its output head, which then has a gradient."""
        return any(self.roles[r].head == "lm" and self.roles[r].base == base for r in self.trained)


POLICY, SHARED = (Base("policy", trained=True),), (Base("shared base"),)
REFERENCE, REWARD = Base("reference"), Base("reward")
ACTOR, PAIRS = (Call(("actor",)),), (Call(("actor", "reference"), 2),)
BOTH = (Call(("actor", "critic")),)
SCORED = ("actor", "reference")

_SFT = Layout(POLICY, {"actor": Part()}, ("actor",), ACTOR, rollout=False)
_REWARD = Layout(
    (Base("reward", trained=True),), {"reward": Part(head="reward")}, ("reward",), (Call(("reward",), 2),),
    rollout=False,
)  # fmt: skip
_HYDRA_SFT = Layout(
    POLICY, {"actor": Part(), "reward": Part(head="reward")}, ("actor", "reward"),
    (Call(("actor", "reward")), Call(("reward",))), rollout=False,
)  # fmt: skip
_ONE = Layout(
    (*POLICY, REFERENCE, REWARD),
    {"actor": Part(), "reference": Part(base="reference"), "reward": Part(None, "reward", "reward")},
    ("actor",), ACTOR, SCORED,
)  # fmt: skip
_ONE_ADAPTER = Layout(
    SHARED, {"actor": Part("actor"), "reference": Part(), "reward": Part(head="reward")}, ("actor",), ACTOR, SCORED
)
_NEAR = (Call(SCORED, divergence=("rkl",)),)
_RAFT = replace(
    _ONE, bases=(*POLICY, REWARD), roles={"actor": Part(), "reward": Part(None, "reward", "reward")}, scored=("actor",)
)
_DPO_ADAPTER = Layout(SHARED, {"actor": Part("actor"), "reference": Part()}, ("actor",), PAIRS, rollout=False)
_DPO = Layout(
    (*POLICY, REFERENCE), {"actor": Part(), "reference": Part(base="reference")}, ("actor",), PAIRS, rollout=False
)
_ROUNDS = (*SCORED, "snapshot")
_INPO_ADAPTER = replace(_ONE_ADAPTER, roles={**_ONE_ADAPTER.roles, "snapshot": Part("snapshot")}, scored=_ROUNDS)
_INPO = replace(
    _ONE, bases=(*POLICY, Base("snapshot"), REFERENCE, REWARD), scored=_ROUNDS,
    roles={**_ONE.roles, "snapshot": Part(base="snapshot")},
)  # fmt: skip


def _four(adapters: bool) -> Layout:
    roles = {
        "actor": Part("actor" if adapters else None),
        "critic": Part("critic" if adapters else None, "value", "critic"),
        "reference": Part(base="reference"),
        "critic_start": Part(None, "reward", "critic"),
        "reward": Part(None, "reward", "reward"),
    }
    bases = (Base("actor", not adapters), Base("critic", not adapters), REFERENCE, REWARD)
    return Layout(bases, roles, ("actor", "critic"), BOTH, (*SCORED, "critic"))


def _shared(actor: str, critic: str, reward: str | None = None) -> Layout:
    roles = {
        "actor": Part(actor),
        "critic": Part(critic, "value"),
        "reference": Part(),
        "reward": Part(reward, "reward"),
    }
    return Layout(SHARED, roles, ("actor", "critic"), BOTH, (*SCORED, "critic"))


LAYOUTS: dict[str, Layout] = {
    "sft": _SFT,
    "reward": _REWARD,
    "hydra-sft": _HYDRA_SFT,
    "dpo": _DPO_ADAPTER,
    "r-dpo": _DPO_ADAPTER,
    "ppo": _four(adapters=False),
    "lora-ppo": _four(adapters=True),
    "j-hydra-ppo": _shared("joint", "joint"),
    "hydra-ppo": _shared("actor", "critic"),
    "ppo-max": _four(adapters=False),
    "pe-rlhf": _shared("actor", "actor", reward="reward"),
    "remax": _ONE,
    "reinforce": _ONE,
    "rloo": _ONE,
    "raft": _RAFT,
    "superhf": replace(_ONE_ADAPTER, update=_NEAR),
    "inpo": _INPO_ADAPTER,
}
# The other layout of rows that train whole bases by default, or adapters.
OTHER: dict[str, Layout] = {
    "sft": Layout(SHARED, {"actor": Part("actor")}, ("actor",), ACTOR, rollout=False),
    "reward": replace(_REWARD, bases=SHARED, roles={"reward": Part("reward", "reward")}),
    "dpo": _DPO,
    "r-dpo": _DPO,
    "ppo-max": _shared("actor", "critic"),
    "remax": _ONE_ADAPTER,
    "reinforce": _ONE_ADAPTER,
    "rloo": _ONE_ADAPTER,
    "raft": _ONE_ADAPTER,
    "superhf": replace(_ONE, update=_NEAR),
    "inpo": _INPO,
}
ALIASES = {"hydra": "hydra-ppo", "j-hydra": "j-hydra-ppo"}


def layout_of(name: str, adapters: bool | None = None) -> Layout:
    """The layout of an algorithm, with or without adapters (None: as it is by default). ValueError for an unknown one.

    Where a row has only one kind, `adapters` is an error if it asks for the other.
    """
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise ValueError(f"algorithm: {name!r} is not one of {', '.join([*LAYOUTS, *ALIASES])}")
    layout = LAYOUTS[name]
    if adapters is None or adapters == bool(layout.adapters):
        return layout
    if name not in OTHER:
        raise ValueError(f"adapters: {name} {'trains whole models' if adapters else 'trains adapters'}")
    return OTHER[name]


def without_reward_copy(layout: Layout) -> Layout:
    """Without the frozen reward model (base or adapter) and its head.

    Where another frozen base is left and no other head, the reward head reads that base, as the trainer has it.
    """
    reward = layout.roles.get("reward")
    if reward is None or "reward" in layout.trained:
        return layout
    bases = tuple(b for b in layout.bases if b.role != "reward")
    roles = {name: part for name, part in layout.roles.items() if name != "reward"}
    if len(bases) < len(layout.bases):
        if len(layout.heads) == 1 and "reference" in roles:
            roles["reward"] = Part(None, "reward", "reference")
    elif reward.adapter is None:
        return layout
    return replace(layout, bases=bases, roles=roles)

"""The algorithms and what each is, in one line: all that the command line needs to know of them without torch.

Each name has a row of that name in `rlhf_trainer.algorithms.TABLE`.
"""

SUPERVISED = {  # learn from a file
    "sft": "cross-entropy on demonstrations",
    "reward": "a reward head on preference pairs",
    "hydra-sft": "both at once, two heads on one model",
    "dpo": "direct preference optimisation, no reward model",
    "r-dpo": "DPO that takes length out of the preference",
}
SAMPLING = {  # generate, and need a reward
    "ppo": "PPO: four models, two of them trained",
    "lora-ppo": "PPO with adapters on four models",
    "j-hydra-ppo": "one base, one adapter for actor and critic",
    "hydra-ppo": "one base, an adapter each for actor and critic",
    "ppo-max": "PPO with normalised rewards and a critic trained first",
    "pe-rlhf": "policy gradient; policy and reward model are adapters on one base",
    "remax": "policy gradient with a greedy baseline, no critic",
    "reinforce": "policy gradient with a moving average as the baseline",
    "rloo": "policy gradient, a prompt's other samples as the baseline",
    "raft": "cross-entropy on the best of K samples",
    "superhf": "cross-entropy on the best of B samples, held near the reference",
    "inpo": "the best and the worst of K samples as a preference pair",
}

ONLINE = tuple(SAMPLING)
ALGORITHMS = (*SUPERVISED, *SAMPLING)

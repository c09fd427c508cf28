"""The table of regularisers (arXiv 2309.09055) in every algorithm that samples: each d_t as the trainer makes it,
against float64 over the whole vocabulary, and that each gives advantages and an update of its own.
"""

import copy
import math
from dataclasses import replace

import pytest
import reference_algorithms as reference
import tiny
import torch
from test_algorithms import Run

from rlhf_kernels import linear_logprob
from rlhf_trainer import TrainConfig
from rlhf_trainer.algorithms import TABLE, find, with_defaults
from rlhf_trainer.config import KL_ESTIMATORS
from rlhf_trainer.errors import UserError
from rlhf_trainer.shaping import EXACT, penalty

KL_COEF = 0.3
PENALISED = [name for name, row in TABLE.items() if row.data is None and row.penalised]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.checkpoint(directory / "model")
    return directory


POLICY, REFERENCE = (1 / 2, 1 / 4, 1 / 4), (1 / 4, 1 / 4, 1 / 2)  # over a vocabulary of three; m = (3/8, 1/4, 3/8)
LOG_2, OVER, UNDER = math.log(2), math.log(4 / 3), math.log(3 / 2)
BY_HAND = {  # d_t of the tokens 0, 1 and 2: a = log 2, 0, -log 2
    "kl": [LOG_2, 0, -LOG_2],
    "clamped_kl": [LOG_2, 0, 0],
    "squared_error": [LOG_2**2 / 2, 0, LOG_2**2 / 2],
    "bregman": [1 / 2 - 1 + LOG_2, 0, 2 - 1 - LOG_2],
    "jensen_shannon": [OVER / 2, 0, OVER / 2],  # the side that lies below m counts nothing
    "full_kl": [LOG_2 / 4] * 3,  # 1/2 log 2 + 1/4 log 1 - 1/4 log 2
    "full_js": [OVER / 2 - UNDER / 4] * 3,  # both sides are 1/2 log 4/3 - 1/4 log 3/2
    "none": [0, 0, 0],
}


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_three_tokens_by_hand(estimator):
    """The logits are log probabilities: hidden [1, 0] reads the policy's, [0, 1] the reference's."""
    weight = torch.tensor([POLICY, REFERENCE]).log().T
    hidden, other = torch.eye(2)[[0, 0, 0]], torch.eye(2)[[1, 1, 1]]
    out = linear_logprob(hidden, weight, torch.arange(3), ref_hidden=other, divergence=("kl", "js"))
    exact = getattr(out, EXACT[estimator]) if estimator in EXACT else None
    got = penalty(estimator, out.logprob, out.ref_logprob, exact)
    torch.testing.assert_close(got, torch.tensor(BY_HAND[estimator], dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("algorithm", PENALISED)
def test_every_penalty_is_the_formulas_over_the_whole_vocabulary_in_float64(files, tmp_path, algorithm):
    run = Run(files, algorithm, output_dir=str(tmp_path / "out"), kl_coef=KL_COEF, temperature=0.7, kl_mode="one-step")
    nets = {role: double(run.net(role, tmp_path / role)) for role in ("actor", "reference")}
    seen = {estimator: shaped(run, estimator) for estimator in KL_ESTIMATORS}
    for estimator, rollout in seen.items():
        rows = reference.pad(run.sequences(rollout))
        d = reference.divergence(estimator, nets["actor"], nets["reference"], rows, 0.7)[rows.answer]
        torch.testing.assert_close(rollout.penalties.double(), -KL_COEF * d, atol=2e-6, rtol=2e-5, msg=estimator)
        if estimator != "none":
            assert d.abs().max() > 1e-2
            used = "advantages" if find(algorithm).advantages else "rewards"
            fields = [getattr(found, used) for found in (rollout, seen["none"])]
            assert len(fields[0]) != len(fields[1]) or not torch.allclose(*fields, atol=1e-4), estimator


def shaped(run, estimator):
    """The rollout of step 0 as it reaches the update, which does not happen."""
    run.phase.config, found = replace(run.config, kl_estimator=estimator), []
    run.phase.row_state.clear()
    run.phase._update = lambda rollout, step: found.append(copy.deepcopy(rollout)) or {}
    run.phase.step(0)
    return found[0]


def double(net):
    """The same weights in float64."""
    net.skeleton.double()
    net.weights = {name: value.double() for name, value in net.weights.items()}
    net.adapter = {name: (a.double(), b.double()) for name, (a, b) in net.adapter.items()}
    return net


@pytest.mark.parametrize("estimator", ["clamped_kl", "jensen_shannon", "full_kl"])
@pytest.mark.parametrize("algorithm", ["hydra-ppo", "remax"])
def test_an_update_under_each_estimator_equals_the_reference(files, tmp_path, algorithm, estimator):
    run = Run(files, algorithm, output_dir=str(tmp_path / "out"), kl_coef=KL_COEF, kl_estimator=estimator)
    pairs = []
    score = run.phase.sampler.score

    def spy(rollout, greedy, *rest):
        pairs.append((copy.deepcopy(rollout), copy.deepcopy(greedy)))
        score(rollout, greedy, *rest)

    run.phase.sampler.score = spy
    before = run.nets(tmp_path / "before")
    metrics = run.phase.step(0)
    (sampled, greedy) = pairs[0]
    if algorithm == "remax":
        finished = sampled.finished, greedy.finished
        losses = reference.remax(before, run.sequences(sampled), run.sequences(greedy), finished, run.config)
        got = metrics["loss/policy_avg"]
    else:
        losses = reference.ppo(before, run.sequences(sampled), sampled.finished, run.config)
        got = metrics["loss/policy_avg"] + run.config.vf_coef * metrics["loss/value_avg"]
    assert got == pytest.approx(sum(losses) / len(losses), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("algorithm", PENALISED)
def test_an_untrained_policy_pays_exactly_nothing_under_any_of_them(files, tmp_path, algorithm, dtype):
    run = Run(files, algorithm, moved=False, output_dir=str(tmp_path / "out"), dtype=dtype)
    for estimator in ("kl", "jensen_shannon", "full_kl", "full_js"):  # the others are 0 where kl is
        assert not shaped(run, estimator).penalties.any(), estimator


@pytest.mark.parametrize("algorithm", [name for name in TABLE if name not in PENALISED])
def test_a_row_that_pays_no_penalty_refuses_an_estimator(algorithm):
    with pytest.raises(UserError, match=f"kl_estimator: {algorithm} takes no divergence off its rewards"):
        with_defaults(TrainConfig(algorithm=algorithm, kl_estimator="bregman"))

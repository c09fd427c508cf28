"""The budget is a number of bytes: measured by PyTorch's allocator in a fresh process, not by the engine's counts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MIB = 1 << 20
SLICE = 64 << 10  # bytes
# One slice of 16 tokens is 64 KiB in fp32; 12 sequences of up to 110 tokens, whole at once, are less than 5 MiB.
PROGRAM = """
import json, random, sys
import torch, transformers
from torch.profiler import profile
from rlhf_kernels.generation import SamplingParams, SlicedGenerator

torch.manual_seed(0)
kv_memory, step_tokens, sleeps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sleeps"
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
    intermediate_size=32, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=None,
)
lm = transformers.AutoModelForCausalLM.from_config(config).eval()
rng = random.Random(0)
prompts = [[rng.randrange(64) for _ in range(rng.randint(40, 100))] for _ in range(12)]
gen = SlicedGenerator(lm, kv_memory, step_tokens=step_tokens)

def run(count):
    return gen.generate(prompts[:count], SamplingParams(max_new_tokens=10))

run(2)  # what is allocated once for good, but for the arena
gen.sleep()
with profile(profile_memory=True) as recorded:
    rollouts = run(12)
    if sleeps:
        gen.sleep()
live, peak, largest = 0, 0, 0
for event in recorded.profiler.kineto_results.events():
    if event.name() == "[memory]":
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
print(json.dumps({
    "peak": peak, "left": live, "largest": largest, "counted": gen.stats.peak_kv_bytes,
    "tokens": [r.tokens for r in rollouts],
}))
"""


def measured(kv_memory: int, step_tokens: int = 32, sleeps: bool = True) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-c", PROGRAM, str(kv_memory), str(step_tokens), "sleeps" if sleeps else "stays"]
    out = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_allocators_peak_grows_by_the_budget_and_by_nothing_else():
    """What a step needs besides (activations, logits) is the same at every budget, and small here."""
    found = {budget: measured(budget) for budget in (5 * MIB, MIB, 7 * SLICE)}
    for budget, run in found.items():
        assert run["largest"] <= budget  # the arena itself
        assert budget - SLICE <= run["peak"] <= budget + 4 * SLICE
        assert run["counted"] <= budget
        assert run["left"] < SLICE
        assert run["tokens"] == found[5 * MIB]["tokens"]
    assert found[5 * MIB]["counted"] > 2 * found[7 * SLICE]["counted"]  # less held them up, and changed nothing


@pytest.mark.slow
def test_between_calls_the_arena_stays_until_the_generator_sleeps():
    assert measured(5 * MIB, sleeps=False)["left"] > 4 * MIB
    assert measured(5 * MIB, sleeps=True)["left"] < SLICE

"""Writes the demo's JSONL data beside a checkpoint: prompts, held-out prompts, demonstrations, preference pairs.

    python -m rlhf_trainer.demo.build_data [--out DIR]

A preference pair is two completions of one prompt, samples of the checkpoint or what the documentation really says,
whose gold scores differ by MARGIN points or more: what the reward head learns from. No prompt appears in two files. Called by `build_checkpoint`.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.demo import ASSETS, corpus
from rlhf_trainer.demo.gold import Gold

SAMPLES, PAIRS = 16, 7  # samples a preference prompt, and at most so many pairs of them
MARGIN = 6.0  # gold points, not quite half a standard deviation: closer pairs teach noise
MAX_NEW_TOKENS = 40
DEMONSTRATIONS = 4096


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int = 256
) -> list[tuple[str, bool]]:
    """One sample at temperature 1 for each prompt: its text, and whether it ended by itself."""
    eos, found = tokenizer.eos_token_id, []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True, padding_side="left")
        width = inputs.input_ids.shape[1]
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for row in out[:, width:].tolist():
            ended = eos in row
            found.append((tokenizer.decode(row[: row.index(eos)] if ended else row), ended))
    return found


def preference_pairs(prompts: list[str], samples: list[list[tuple[str, bool]]], gold: Gold) -> list[dict[str, str]]:
    """Pairs of whole sentences, widest margin first, none in two pairs."""
    rows = []
    for prompt, texts in zip(prompts, samples):
        scored = sorted({(gold.score(prompt, text, ended), text) for text, ended in texts if ended and text.strip()})
        used: set[str] = set()
        for (low, worse), (high, better) in sorted(combinations(scored, 2), key=lambda p: p[0][0] - p[1][0]):
            if high - low >= MARGIN and not {worse, better} & used and len(used) < 2 * PAIRS:
                used |= {worse, better}
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


def first_seen(prompts: list[str], taken: set[str]) -> list[str]:
    """Distinct prompts that are in none of the files written before."""
    fresh = [p for p in dict.fromkeys(prompts) if p not in taken]
    taken.update(fresh)
    return fresh


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(out: Path, seed: int) -> dict[str, int]:
    """Write every data file into `out`, which holds the checkpoint; the number of rows of each."""
    parts, taken = corpus.split(corpus.build()), set[str]()
    gold = Gold.from_sentences(parts.train)
    gold.save(out / "gold.json")
    evaluation = first_seen([corpus.cut(s)[0] for s in parts.evaluation], taken)
    rl = first_seen([corpus.cut(s)[0] for s in parts.rl], taken)
    asked = first_seen([corpus.cut(s)[0] for s in parts.preference], taken)
    real = dict(corpus.cut(s) for s in parts.preference)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    torch.manual_seed(seed)
    flat = sample(model, tokenizer, [p for p in asked for _ in range(SAMPLES)])
    texts = [[(real[p], True), *flat[i * SAMPLES : (i + 1) * SAMPLES]] for i, p in enumerate(asked)]
    pairs = preference_pairs(asked, texts, gold)
    cuts = [corpus.cut(s) for s in parts.train[:DEMONSTRATIONS]]
    files = {
        "eval_prompts": [{"prompt": p} for p in evaluation],
        "prompts": [{"prompt": p} for p in rl],
        "preferences": pairs,
        "demonstrations": [{"prompt": p, "completion": c} for p, c in cuts],
    }
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(build(args.out, args.seed)))


if __name__ == "__main__":
    main()

"""Writes the demo's JSONL data beside a checkpoint: prompts, held-out prompts, demonstrations, preference pairs.

    python -m rlhf_trainer.demo.build_data [--out DIR]

A preference pair is two completions of one prompt, samples of the checkpoint or what the documentation really says,
whose gold scores differ by MARGIN points or more: what the reward head learns from. Samples alone do not show what a
policy will try once it is paid for the topic's words, so some pairs set a text against itself spoilt: its topic words
all made one, its phrases said twice, or topic words strewn in. No prompt appears in two files.
"""

import argparse
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.demo import ASSETS, corpus
from rlhf_trainer.demo.gold import TOPIC, Gold

SAMPLES, PAIRS = 16, 7  # samples a preference prompt, and at most so many pairs of them
MARGIN = 6.0  # gold points, not quite half a standard deviation: closer pairs teach noise
MAX_NEW_TOKENS = 40
DEMONSTRATIONS = 4096
SPOILT = 3  # pairs a prompt, at most, of a text and itself spoilt


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], batch: int = 256) -> list[tuple[str, bool]]:
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


def spoil(text: str, rng: random.Random) -> str:
    """A text with the faults of a policy that has seen through its reward; the kind of fault is drawn."""
    said = text.split()
    topical = [i for i, word in enumerate(said) if word.strip(",.;()'\"").lower() in TOPIC]
    kind = rng.randrange(3)
    if kind == 0 and len(topical) > 1:  # one topic word for all
        word = said[topical[0]].strip(",.;()'\"")
        said = [word if i in topical else w for i, w in enumerate(said)]
    elif kind == 1 and topical:  # a phrase said again
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(topical)
            phrase = said[max(at - rng.randint(1, 3), 0) : at + 1]
            where = rng.randint(0, len(said) - 1)
            said = said[:where] + phrase + said[where:]
            topical = [i if i < where else i + len(phrase) for i in topical]
    else:  # topic words strewn in
        strewn = sorted(TOPIC)
        for _ in range(rng.randint(1, 5)):
            said.insert(rng.randint(0, len(said) - 1), rng.choice(strewn))
    return " " + " ".join(said)


def spoilt_pairs(
    prompts: list[str], texts: list[list[tuple[str, bool]]], gold: Gold, rng: random.Random
) -> list[dict[str, str]]:
    """Pairs of a text and itself spoilt, where gold sees that it is worse."""
    rows = []
    for prompt, candidates in zip(prompts, texts):
        whole = [text for text, ended in candidates if ended and len(text.split()) > 2]
        for text in rng.sample(whole, min(SPOILT, len(whole))):
            other = spoil(text, rng)
            if gold.score(prompt, text, True) - gold.score(prompt, other, True) >= MARGIN:
                rows.append({"prompt": prompt, "chosen": text, "rejected": other})
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
    pairs = preference_pairs(asked, texts, gold) + spoilt_pairs(asked, texts, gold, random.Random(seed))
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

"""Writes the demo's JSONL data beside a checkpoint: prompts, held-out prompts, demonstrations, preference pairs.

    python -m rlhf_trainer.demo.build_data [--out DIR]

A preference pair is two completions of one prompt whose gold scores differ by MARGIN points or more: what the reward
head learns from. Most are samples of the checkpoint. Samples alone do not show what a policy will try once it is paid
for the topic's words, so other pairs set a text, real or sampled, against itself spoilt: its topic words all made one
or taken out, its phrases said twice, topic words strewn in. No prompt appears in two files.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_trainer.demo import ASSETS, corpus
from rlhf_trainer.demo.gold import TOPIC, Gold

SAMPLES = 16  # of each preference prompt
MORE_PROMPTS = 1500  # preference prompts from sentences that the checkpoint was trained on
SPOILT = 1  # sample of each preference prompt is set against itself spoilt
REAL = 5000  # sentences of the corpus that are set against themselves spoilt
MARGIN = 6.0  # gold points, half a standard deviation: closer pairs teach noise
MAX_NEW_TOKENS = 40
DEMONSTRATIONS = 4096


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


def sampled_pairs(
    prompts: list[str], texts: list[list[tuple[str, bool]]], gold: Gold, rng: random.Random
) -> list[dict[str, str]]:
    """Pairs of whole texts drawn at random, none in two pairs: the chosen ones stay close to what the model says."""
    rows = []
    for prompt, candidates in zip(prompts, texts):
        whole = sorted({text for text, ended in candidates if ended and text.strip()})
        rng.shuffle(whole)
        for pair in zip(whole[::2], whole[1::2]):
            worse, better = sorted(pair, key=lambda text: gold.score(prompt, text, True))
            if gold.score(prompt, better, True) - gold.score(prompt, worse, True) >= MARGIN:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


def spoil(text: str, plain: list[str], rng: random.Random) -> str:
    """A text with the faults of a policy that has seen through its reward; the kind of fault is drawn."""
    said = text.split()
    topical = [i for i, word in enumerate(said) if bare(word).lower() in TOPIC]
    kind = rng.randrange(4)
    if kind == 0 and len(topical) > 1:  # one topic word for all
        said = [bare(said[topical[0]]) if i in topical else word for i, word in enumerate(said)]
    elif kind == 1 and topical:  # a phrase said again
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(topical)
            phrase = said[max(at - rng.randint(1, 3), 0) : at + 1]
            where = rng.randint(0, len(said) - 1)
            said = said[:where] + phrase + said[where:]
            topical = [i if i < where else i + len(phrase) for i in topical]
    elif kind == 2 and topical:  # off the topic
        said = [word.replace(bare(word), rng.choice(plain)) if i in topical else word for i, word in enumerate(said)]
    else:  # topic words strewn in
        strewn = sorted(TOPIC)
        for _ in range(rng.randint(1, 5)):
            said.insert(rng.randint(0, len(said) - 1), rng.choice(strewn))
    return " " + " ".join(said)


def bare(word: str) -> str:
    """A word without the punctuation around it."""
    return word.strip(",.:;()'\"")


def spoilt_pairs(rows: list[tuple[str, str]], gold: Gold, plain: list[str], rng: random.Random) -> list[dict[str, str]]:
    """Pairs of a text and itself spoilt, where gold sees that it is worse; rows are (prompt, completion)."""
    found = []
    for prompt, text in rows:
        other = spoil(text, plain, rng)
        if gold.score(prompt, text, True) - gold.score(prompt, other, True) >= MARGIN:
            found.append({"prompt": prompt, "chosen": text, "rejected": other})
    return found


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
    asked += first_seen([corpus.cut(s)[0] for s in parts.train[:MORE_PROMPTS]], taken)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    torch.manual_seed(seed)
    flat = sample(model, tokenizer, [p for p in asked for _ in range(SAMPLES)])
    texts = [flat[i : i + SAMPLES] for i in range(0, len(flat), SAMPLES)]
    cuts = [corpus.cut(s) for s in parts.train]
    plain = [word for _, text in cuts for word in map(bare, text.split()) if word.islower() and word not in TOPIC]
    rng = random.Random(seed)
    whole = [(p, t) for p, candidates in zip(asked, texts) for t, ended in candidates[:SPOILT] if ended and t.split()]
    real = [(p, t) for p, t in cuts[-REAL:] if p not in taken]
    pairs = sampled_pairs(asked, texts, gold, rng) + spoilt_pairs(whole + real, gold, plain, rng)
    cuts = cuts[:DEMONSTRATIONS]
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

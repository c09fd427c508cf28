"""The demo's gold score: does a completion speak of files and text, in whole sentences a writer could have written?

A completion of n words scores

    100 * |distinct topic words that stand well| / max(n, 8)  +  10 * complete  -  (50 * garbled + 100 * repeated) / n

in points, where a topic word (file, string, line, read, ...) *stands well* when the corpus has it after the same
word, *complete* is 1 for a text that ends with a full stop and the end token, *garbled* counts words that the corpus
does not know and *repeated* counts words whose pair with the one before was already said. So length alone gains
nothing (the share is of all words, short texts are divided by 8), a word said twice counts once, and a list of topic
words without the words that lead to them counts little.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

from rlhf_trainer.demo import ASSETS

FLOOR = 8  # words: shorter completions gain nothing by being short
COMPLETE = 10.0  # points for ending as a sentence
TOPIC = frozenset(
    """
    archive archives ascii base64 binary body buffer buffers byte bytes bytecode character characters charset chunk
    close closed codec column comment comments content contents copied copy data decode decoded decoding descriptor
    digit digits directories directory disk document documents email encode encoded encoding encodings entries entry
    file filename filenames files folder font format formatted formatting header headers html indentation input
    insert inserted language letter letters line lines literal literals locale log logged mailbox markup message
    messages mime mode name named names newline newlines open opened opening output packed paragraph parse parsed
    parser parsing paste path pathname pathnames paths pattern payload pickle prefix print printed printing quoted
    quotes raw read reading record records replace replaced row save saved script search section sentence separator
    sheet size source space spaces stderr stdin stdout storage store stored stream streams string strings stripped
    suffix syntax tab table tabs tag tags tar template text title token tokens trailing uncompressed undecoded
    unicode unquoted url utf whitespace word words wrap wrapped write writes writing written xml zip
    """.split()  # noqa: SIM905
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def words(text: str) -> list[str]:
    """Lower-case words of a text; digits and punctuation separate them."""
    return WORD.findall(text.lower())


class Gold:
    """The score, with what it knows of the corpus: its words, and before each topic word the words that lead to it."""

    def __init__(self, vocabulary: Iterable[str], leads: dict[str, list[str]]) -> None:
        self.vocabulary = frozenset(vocabulary)
        self.leads = {word: frozenset(before) for word, before in leads.items()}

    @classmethod
    def from_sentences(cls, sentences: Iterable[str]) -> "Gold":
        vocabulary: set[str] = set()
        leads: dict[str, set[str]] = {}
        for sentence in sentences:
            said = words(sentence)
            vocabulary.update(said)
            for before, word in pairwise(said):
                if word in TOPIC:
                    leads.setdefault(word, set()).add(before)
        return cls(sorted(vocabulary), {word: sorted(before) for word, before in sorted(leads.items())})

    @classmethod
    def load(cls, path: Path) -> "Gold":
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["vocabulary"], content["leads"])

    def save(self, path: Path) -> None:
        leads = {word: sorted(before) for word, before in sorted(self.leads.items())}
        path.write_text(json.dumps({"vocabulary": sorted(self.vocabulary), "leads": leads}), encoding="utf-8")

    def score(self, prompt: str, completion: str, ended: bool) -> float:
        """Points of one completion (about -50 to 70); `ended`: whether the model itself stopped (end token)."""
        said = words(completion)
        if not said:
            return 0.0
        before = [*words(prompt), ""][-2:][:1] + said[:-1]
        topical = {w for b, w in zip(before, said) if b in self.leads.get(w, ())}
        garbled = sum(w not in self.vocabulary for w in said)
        pairs = list(pairwise(said))
        repeated = len(pairs) - len(set(pairs))
        complete = ended and completion.rstrip().endswith(".")
        return (
            100.0 * len(topical) / max(len(said), FLOOR)
            + COMPLETE * complete
            - (50.0 * garbled + 100.0 * repeated) / len(said)
        )


@cache
def embedded() -> Gold:
    """The gold score of the embedded corpus."""
    return Gold.load(ASSETS / "gold.json")


def reward(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    """The gold score as a reward function, `--reward rlhf_trainer.demo.gold:reward`; a full stop counts as an end."""
    return [embedded().score(p, c, ended=True) for p, c in zip(prompts, completions)]


def distinct_2(texts: Iterable[str]) -> float:
    """Distinct pairs of neighbouring words over all texts, divided by all pairs."""
    pairs = [pair for text in texts for pair in pairwise(words(text))]
    return len(set(pairs)) / max(len(pairs), 1)

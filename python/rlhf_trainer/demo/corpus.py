"""A corpus that is on every machine: English sentences from CPython's own documentation.

Sources are `pydoc_data.topics` (the language reference) and the docstrings of the standard library, read with `ast`
so that nothing is imported or run. Paragraphs of prose are cut into sentences; what looks like code, tables or
markup is dropped. Order and content depend on the Python version only, and `digest` gives them one hash.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test"}
MIN_WORDS, MAX_WORDS = 5, 40  # shorter ones are fragments, longer ones lists or licences
ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
LITERAL = re.compile(r"``?([^`']+?)(?:``?|'')")
EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*][^*]*?)\*{1,2}(?![\w*])")
END = re.compile(r"(?<=[a-z0-9)'\"][.!?])\s+(?=[\"'(]?[A-Z])")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|Mr|Dr|approx)\.$")
CLEAN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/_.\-]*[a-z0-9)'\"][.]")
CODE = re.compile(r"\w\(|__|\(\)|[A-Z]{2}_|--|\.\.|\w_\w.*\w_\w.*\w_\w| [,;:.]|[A-Za-z]:[A-Za-z]|\d{5}|XXX")


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the corpus, each a list of sentences in a fixed shuffled order."""

    train: list[str]
    preference: list[str]
    rl: list[str]
    evaluation: list[str]


def docstrings(path: Path) -> Iterator[str]:
    """Every docstring of one source file, in the order of the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def documents() -> Iterator[str]:
    """The language reference's topics, then all docstrings of the standard library by path."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = ast.parse((library / "pydoc_data" / "topics.py").read_bytes())
    for node in topics.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (ast.literal_eval(value) for value in node.value.values)
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        if not SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            yield from docstrings(path)


def paragraphs(document: str) -> Iterator[str]:
    """Runs of prose lines as one line each; code, headings, tables and fields end a paragraph and are left out."""
    for block in re.split(r"\n\s*\n", document):
        lines = [line.rstrip() for line in block.splitlines() if line.strip()]
        if not lines or any(line.lstrip().startswith((">>>", "...", "::", "|", "+-", "$ ")) for line in lines):
            continue
        current: list[str] = []
        for line in lines:
            bullet = re.match(r"\s*(?:[*\-+o]|\d+[.)])\s+(.*)", line)
            if bullet:
                if current:
                    yield " ".join(current)
                current = [bullet.group(1).strip()]
            else:
                current.append(line.strip())
        if current:
            yield " ".join(current)


def sentences(document: str) -> Iterator[str]:
    """Clean English sentences of one document."""
    for paragraph in paragraphs(document):
        text = ROLE.sub(r"\1", paragraph)
        text = LITERAL.sub(r"\1", text)
        text = EMPHASIS.sub(r"\1", text).replace("e.g.", "for example").replace("i.e.", "that is")
        text = re.sub(r"\s+", " ", text).strip()
        if re.fullmatch(r"[A-Z].*[a-z0-9)]", text):
            text += "."  # a docstring's summary line often goes without its full stop
        for sentence in END.split(text):
            if is_clean(sentence):
                yield sentence


def is_clean(sentence: str) -> bool:
    """Whether a sentence is prose: a capital, plain characters, a full stop, mostly letters, no code."""
    words = sentence.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not CLEAN.fullmatch(sentence) or CODE.search(sentence):
        return False
    if ABBREVIATION.search(sentence) or sentence.count('"') % 2 or sentence.count("(") != sentence.count(")"):
        return False
    lower = sum(bool(re.fullmatch(r"[a-z]+(?:['\-][a-z]+)*[,;:.]?", word)) for word in words)
    return lower >= 0.6 * len(words) and max(len(word) for word in words) <= 22


def build() -> list[str]:
    """All distinct sentences, in the order of their first appearance."""
    return list(dict.fromkeys(s for document in documents() for s in sentences(document)))


def digest(corpus: list[str]) -> str:
    """sha256 of the corpus, one sentence a line, in UTF-8."""
    return hashlib.sha256("\n".join(corpus).encode()).hexdigest()


def split(corpus: list[str], preference: int = 1536, rl: int = 1024, evaluation: int = 320) -> Split:
    """Cut the corpus into disjoint parts; the order is by each sentence's own hash, so it needs no random state."""
    order = sorted(corpus, key=lambda s: hashlib.sha256(s.encode()).digest())
    marks = [evaluation, evaluation + rl, evaluation + rl + preference]
    return Split(
        train=order[marks[2] :],
        preference=order[marks[1] : marks[2]],
        rl=order[marks[0] : marks[1]],
        evaluation=order[: marks[0]],
    )


def cut(sentence: str) -> tuple[str, str]:
    """A sentence as (prompt, completion): its first three to five words by its hash, and the rest with its space."""
    words = sentence.split(" ")
    first = 3 + hashlib.sha256(sentence.encode()).digest()[0] % 3
    first = min(first, len(words) - 3)
    return " ".join(words[:first]), " " + " ".join(words[first:])

"""The demo's corpus is clean prose, and what is shipped belongs together and holds nothing out twice."""

import hashlib
import json

import pytest

from rlhf_trainer.demo import ASSETS, DATA, checkpoint_path, corpus, data_path


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the next line of the file.",
        "If the file is closed, a ValueError is raised.",
        "This (rarely used) method doesn't copy its argument.",
    ],
)
def test_prose_is_kept(sentence):
    assert corpus.is_clean(sentence)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Return the file.", id="too short"),
        pytest.param("return the next line of the file.", id="no capital"),
        pytest.param("Return the next line of the file", id="no full stop"),
        pytest.param("Call f(x) and then return the next line.", id="code"),
        pytest.param("Set x = 3 in the next line of it.", id="sign"),
        pytest.param("Return the (next line of the file.", id="open bracket"),
        pytest.param("See RFC FOO BAR BAZ QUX TCP UDP now.", id="capitals"),
    ],
)
def test_what_is_no_prose_is_dropped(text):
    assert not corpus.is_clean(text)


def test_markup_is_removed_and_code_blocks_are_left_out():
    document = "Use the :class:`Reader` to read *all* of ``file`` there.\n\n>>> Reader().read()\n\nIt gives back lines."
    assert list(corpus.sentences(document)) == ["Use the Reader to read all of file there."]


def test_prompt_and_completion_make_up_the_sentence():
    for sentence in ("Return the next line of the file.", "A stream that is open can be read or written by anyone."):
        prompt, completion = corpus.cut(sentence)
        assert prompt + completion == sentence
        assert 2 <= len(prompt.split()) <= 5
        assert len(completion.split()) >= 3


def test_the_split_is_disjoint_and_does_not_depend_on_the_order():
    sentences = [f"This is the sentence with number {i} in it." for i in range(100)]
    parts = corpus.split(sentences, preference=20, rl=10, evaluation=5)
    assert [len(p) for p in (parts.preference, parts.rl, parts.evaluation, parts.train)] == [20, 10, 5, 65]
    assert {*parts.preference, *parts.rl, *parts.evaluation, *parts.train} == set(sentences)
    assert corpus.split(sentences[::-1], preference=20, rl=10, evaluation=5) == parts


def test_the_digest_is_of_the_lines():
    assert corpus.digest(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()


def rows(which):
    with open(data_path(which), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_no_prompt_is_in_two_of_the_shipped_files():
    held_out, online, asked = ({row["prompt"] for row in rows(w)} for w in ("eval_prompts", "prompts", "preferences"))
    assert len(held_out) >= 256
    assert not held_out & online
    assert not held_out & asked
    assert not online & asked


def test_the_shipped_files_are_small_and_their_numbers_recorded():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 8e6
    assert (ASSETS / "model.safetensors").stat().st_size < 4e6
    provenance = json.loads((ASSETS / "provenance.json").read_text())
    assert provenance["rows"] == {which: len(rows(which)) for which in DATA}
    assert provenance["corpus_sha256"] == (ASSETS / "corpus.sha256").read_text().strip()


def test_the_checkpoint_predicts_its_language():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    text = "Return the name of the file as a string."
    ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) < 3.5  # nats a token; chance is 6.9


def test_an_unknown_file_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="which must be one of prompts, eval_prompts"):
        data_path("answers")

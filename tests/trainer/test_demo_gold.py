"""The gold score pays for what it says it pays for, and for nothing easier."""

import pytest

from rlhf_trainer.demo.evaluate import Sampled, at_length, compare
from rlhf_trainer.demo.gold import COMPLETE, TOPIC, Gold, distinct_2, embedded, reward, words

GOLD = Gold.from_sentences(
    [
        "Return the name of the file as a string.",
        "Read the text of the file and write the lines to the output.",
        "The value is given to the caller when it is done with the other one.",
    ]
)


def score(completion, ended=True, prompt="Return"):
    return GOLD.score(prompt, completion, ended)


def test_topic_words_raise_the_score_in_proportion_to_all_words():
    assert score(" the value is given to the file name.") == pytest.approx(100 / 8 + COMPLETE)  # "file name": no lead
    assert score(" the name of the file as a string.") == pytest.approx(300 / 8 + COMPLETE)


def test_a_topic_word_counts_only_after_a_word_that_leads_to_it():
    assert score(" the file text lines output.") == pytest.approx(100 / 8 + COMPLETE)


def test_a_word_said_twice_counts_once_and_a_repeated_pair_costs():
    once, twice = score(" the file is given to a caller when."), score(" the file is given to the file when.")
    assert twice < once


def test_unknown_words_cost():
    assert score(" the file is glorped to the caller now.") < score(" the file is given to the caller when.")


def test_ending_as_a_sentence_is_paid_once():
    text = " the value is given to the other caller"
    assert score(text + ".") - score(text) == COMPLETE
    assert score(text + ".", ended=False) == score(text)


@pytest.mark.parametrize("completion", ["", " ", " ..."])
def test_no_words_no_points(completion):
    assert score(completion) == 0


def test_being_short_gains_nothing_over_the_floor():
    assert score(" the file.") <= score(" the file as a string.")


def test_saying_more_of_the_same_gains_nothing():
    text = " the value is given to the caller"
    assert score(text + " when it is done with the other one.") <= score(text + ".")


def test_the_score_survives_a_file(tmp_path):
    GOLD.save(tmp_path / "gold.json")
    again = Gold.load(tmp_path / "gold.json")
    assert again.vocabulary == GOLD.vocabulary
    assert again.leads == GOLD.leads


def test_the_embedded_score_knows_its_corpus():
    assert "file" in TOPIC
    assert "the" in embedded().leads["file"]
    assert reward(["Return the"], [" name of the file as a string."])[0] > 30


def test_distinct_pairs():
    assert distinct_2(["a b a b"]) == pytest.approx(2 / 3)
    assert words("Don't read 3 FILES.") == ["don't", "read", "files"]


def test_texts_are_cut_and_padded_to_a_length():
    texts = [" one two three.", " four five."]
    assert at_length(texts, 0, 2) == " one two."
    assert at_length(texts, 0, 4) == " one two three four."
    assert at_length(texts, 1, 6) == " four five one two three four."


def sampled(texts, nll=1.0):
    gold = [embedded().score("Return the", text, True) for text in texts]
    count = len(texts)
    return Sampled(
        ["Return the"] * count, texts, [True] * count, [9] * count, gold, [0.0] * count, nll, distinct_2(texts)
    )


def test_a_policy_that_repeats_one_good_sentence_fails_the_controls():
    before = sampled(
        [" value of the object.", " name of the class that is used here.", " file as a list of lines."] * 4
    )
    after = sampled([" name of the file as a string."] * 12)
    before.distinct = 0.8
    result = compare(before, after)
    assert result.rise > 0
    assert result.distinct_ratio < 0.7
    assert not result.passed()


def test_equal_samples_rise_by_nothing():
    same = sampled([" value of the object.", " name of the class that is used here."])
    result = compare(same, same)
    assert (result.rise, result.distinct_ratio, result.nll_rise) == (0, 1, 0)

"""Rows to tokens, and every way a data file can be wrong: the place and what was found, in one line."""

import json

import pytest
import tiny

from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import BatchOrder, load_demonstrations, load_preferences, load_prompts
from rlhf_trainer.errors import UserError

EOS = 0


class CharTokenizer:
    """One token a character (its code point), <s> = 1 and </s> = 0, and a chat template of the simplest kind."""

    eos_token_id, bos_token_id = EOS, 1
    chat_template: str | None = "{role}: {content}\n"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return text + "assistant: " * add_generation_prompt


def codes(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.fixture
def write(tmp_path):
    def written(*rows, **options) -> TrainConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return TrainConfig(model=str(tmp_path), prompts=str(path), **options)

    return written


def test_prompts_carry_text_tokens_and_the_other_columns(write):
    prompts = load_prompts(write({"prompt": "hi", "answer": 4}, {"prompt": "yo"}), CharTokenizer())
    assert [(p.text, p.tokens, p.columns) for p in prompts] == [
        ("hi", [1, *codes("hi")], {"answer": 4}),
        ("yo", [1, *codes("yo")], {"answer": None}),
    ]


def test_another_column_may_hold_the_prompt(write):
    prompts = load_prompts(write({"question": "why", "prompt": "not me"}, prompt_column="question"), CharTokenizer())
    assert prompts[0].text == "why"
    assert prompts[0].columns == {"prompt": "not me"}


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_a_chat_goes_through_the_template_and_ends_where_the_assistant_speaks(write, column):
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    prompt = load_prompts(write({column: chat}), CharTokenizer())[0]
    assert prompt.text == "user: 2+2?\nassistant: "
    assert prompt.tokens == codes(prompt.text)  # the template writes the special tokens, the tokenizer adds none


@pytest.mark.parametrize(
    ("policy", "tokens"), [("left", [codes("cd"), codes("xy")[-2:]]), ("drop", [codes("xy")])], ids=["left", "drop"]
)
def test_a_prompt_that_is_too_long_is_cut_on_the_left_or_dropped_with_a_warning(write, policy, tokens):
    tokenizer = CharTokenizer()
    tokenizer.__class__ = type("NoBos", (CharTokenizer,), {"__call__": lambda s, t, **_: {"input_ids": codes(t)}})
    config = write({"prompt": "abcd"}, {"prompt": "xy"}, max_prompt_length=2, prompt_truncation=policy)
    with pytest.warns(UserWarning, match=r"rows.jsonl: 1 prompts over 2 tokens were (cut|dropped)"):
        assert [p.tokens for p in load_prompts(config, tokenizer)] == tokens


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"prompt": "a"}', '{"prompt": '], r"rows.jsonl, line 2: not JSON"),
        ([{"prompt": "a"}, {"prompt": " "}], r"line 2: the prompt is empty"),
        ([{"text": "a", "id": 1}], r"line 1: no column 'prompt'; columns present: text, id"),
        ([{"prompt": 5}], r"line 1: 'prompt' must be text or a list of messages, found int"),
        (["[1, 2]"], r"line 1: expected an object with columns, found list"),
        ([{"messages": ["hello"]}], r"line 1: messages must be a list of objects with 'role' and 'content'"),
        ([], r"rows.jsonl: no rows"),
        ([{"prompt": "abcdef"}], r"line 1: the prompt has 7 tokens, max_prompt_length is 4"),
    ],
    ids=["not-json", "empty", "no-column", "not-text", "not-object", "bad-messages", "no-rows", "too-long"],
)
def test_a_bad_row_is_named_by_its_line(write, rows, words):
    with pytest.raises(UserError, match=words) as caught:
        load_prompts(write(*rows, max_prompt_length=4, prompt_truncation="error"), CharTokenizer())
    assert "\n" not in str(caught.value)


def test_messages_without_a_template_are_an_error(write):
    tokenizer = CharTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="line 1: holds chat messages, but the model's tokenizer has no chat template"):
        load_prompts(write({"messages": [{"role": "user", "content": "x"}]}), tokenizer)


def test_a_name_that_is_neither_file_nor_dataset_is_one_line(tmp_path):
    config = TrainConfig(model=str(tmp_path), prompts="no_such_dataset_anywhere")
    with pytest.raises(UserError, match="'no_such_dataset_anywhere' is neither a file nor a dataset") as caught:
        load_prompts(config, CharTokenizer())
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_loads_like_a_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "hi", "k": 1}]).save_to_disk(str(tmp_path / "set"))
    prompts = load_prompts(TrainConfig(model="x", prompts=str(tmp_path / "set")), CharTokenizer())
    assert (prompts[0].text, prompts[0].columns) == ("hi", {"k": 1})


def test_no_evaluation_prompts_are_an_empty_list(write):
    assert load_prompts(write({"prompt": "a"}), CharTokenizer(), "eval_prompts") == []


def test_preferences_end_in_eos_and_are_cut_at_the_completion_length(write):
    config = write({"prompt": "q", "chosen": "good", "rejected": "b"}, max_completion_length=3)
    pair = load_preferences(config, CharTokenizer())[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ([1, *codes("q")], codes("goo"), [*codes("b"), EOS])


def test_chat_preferences_keep_only_the_answers(write):
    user = [{"role": "user", "content": "q"}]
    answers = {k: [{"role": "assistant", "content": k[0]}] for k in ("chosen", "rejected")}
    pair = load_preferences(write({"prompt": user, **answers}), CharTokenizer())[0]
    assert pair.prompt == codes("user: q\nassistant: ")
    assert (pair.chosen, pair.rejected) == ([*codes("c"), EOS], [*codes("r"), EOS])


def test_pairs_equal_once_cut_are_dropped_with_a_warning(write):
    rows = [{"prompt": "q", "chosen": "aax", "rejected": "aay"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.warns(UserWarning, match="1 pairs dropped"):
        assert len(load_preferences(write(*rows, max_completion_length=2), CharTokenizer())) == 1


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "q", "completion": "a"}, [1, *codes("q")], [*codes("a"), EOS]),
        ({"text": "abc"}, [1], [*codes("abc"), EOS]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            codes("user: q\nassistant: "),
            [*codes("a"), EOS],
        ),
    ],
    ids=["prompt-completion", "text", "messages"],
)
def test_demonstrations_come_in_three_shapes(write, row, prompt, completion):
    one = load_demonstrations(write(row), CharTokenizer())[0]
    assert (one.prompt, one.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("load", "row", "words"),
    [
        (load_preferences, {"prompt": "q", "chosen": "a"}, "no column 'rejected'; columns present: prompt, chosen"),
        (load_preferences, {"prompt": "q", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        (load_demonstrations, {"prompt": "q"}, "no column 'completion' .*; columns present: prompt"),
        (
            load_demonstrations,
            {"messages": [{"role": "user", "content": "q"}]},
            "'messages' must end with the assistant's",
        ),
    ],
    ids=["no-rejected", "empty-chosen", "no-completion", "no-answer"],
)
def test_a_missing_part_of_a_pair_is_named(write, load, row, words):
    with pytest.raises(UserError, match=f"line 1: {words}"):
        load(write(row), CharTokenizer())


def test_batches_cover_every_row_once_an_epoch_whatever_the_batch():
    order = BatchOrder(n=7, batch=3, seed=5)
    rows = [i for step in range(7) for i in order.at(step)]
    for epoch in range(3):
        assert sorted(rows[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert rows[:7] != rows[7:14]


def test_a_batch_depends_on_the_step_alone():
    walked = BatchOrder(10, 4, seed=1)
    for step in range(20):
        walked.at(step)
    assert walked.at(3) == BatchOrder(10, 4, seed=1).at(3)
    assert BatchOrder(10, 4, seed=1).at(3) != BatchOrder(10, 4, seed=2).at(3)
    assert BatchOrder(2, 5, seed=0).at(0).count(0) in (2, 3)  # a batch larger than the set repeats rows


def test_the_demo_model_brings_its_held_out_prompts_only_where_no_others_are_given(tmp_path):
    made = tiny.tokenizer()
    assert load_prompts(TrainConfig(), made, "eval_prompts")
    own = TrainConfig(prompts=tiny.prompts(tmp_path / "own.jsonl"))
    assert load_prompts(own, made, "eval_prompts") == []
    assert len(load_prompts(own, made)) == 12

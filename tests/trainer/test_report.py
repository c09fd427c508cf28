"""The report: made from the run's files alone, self-contained, with only the figures the run has data for."""

import json
import re
from pathlib import Path

import pytest

from rlhf_trainer.compare import compare, draw, names
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import MetricsLog
from rlhf_trainer.plots import series, smooth
from rlhf_trainer.report import merge_steps, read_run, write_report

ONLINE = {"reward", "kl", "length", "timing", "memory"}


def online_metrics(step: int) -> dict[str, float]:
    timing = {f"timing/{part}": 0.1 * step for part in ("generate", "score", "update")}
    return {
        "reward": 0.1 * step, "objective/kl": 0.01 * step, "completions/mean_length": 30.0 + step,
        "memory/peak": 3e9, "memory/kv_peak": 1e8, **timing,
    }  # fmt: skip


def record(folder, steps: int, algorithm: str = "hydra-ppo", values=online_metrics) -> None:
    with MetricsLog(folder, TrainConfig(algorithm=algorithm)) as log:
        for step in range(1, steps + 1):
            log.log(step, values(step))
        if algorithm == "hydra-ppo":
            for step, text in ((1, "<b>before</b>"), (steps, "after & later")):
                log.samples(step, [{"prompt": "P: ", "completion": text, "reward": 0.5}])


@pytest.mark.parametrize("steps", [1, 5, 60], ids=["one-step", "few", "many"])
def test_a_run_of_any_length_gets_every_figure(tmp_path, steps):
    record(tmp_path, steps)
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert {p.stem for p in (tmp_path / "plots").glob("*.png")} == ONLINE
    for path in (tmp_path / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_supervised_run_shows_its_loss_and_no_reward(tmp_path):
    record(tmp_path, 9, "sft", lambda step: {"loss": 3.0 / step, "timing/update": 0.2})
    write_report(tmp_path)
    assert {p.stem for p in (tmp_path / "plots").glob("*.png")} == {"loss", "timing"}


def test_the_page_stands_alone_and_escapes_what_the_model_wrote(tmp_path):
    record(tmp_path, 12)
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == len(ONLINE)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "&lt;b&gt;before&lt;/b&gt;" in page
    assert "<b>before</b>" not in page
    assert "after &amp; later" in page
    assert page.index("before") < page.index("after &amp; later")
    assert "<h1>hydra-ppo</h1>" in page
    assert "12 of 100 steps" in page


def test_the_report_is_made_from_files_another_program_wrote(tmp_path):
    rows = [{"step": s, "reward": s, "objective/kl": None} for s in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "rew')
    page = write_report(tmp_path).read_text()
    assert "3 steps" in page
    assert {p.stem for p in (tmp_path / "plots").glob("*.png")} == {"reward"}


@pytest.mark.parametrize("content", [None, ""], ids=["no-file", "no-lines"])
def test_a_folder_without_metrics_is_one_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics.jsonl' holds no metrics yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_lines_of_one_step_are_one_row():
    assert merge_steps([{"step": 2, "a": 1}, {"step": 1, "a": 0}, {"step": 2, "b": 3}]) == [
        {"step": 1, "a": 0},
        {"step": 2, "a": 1, "b": 3},
    ]


def test_series_leaves_out_what_was_not_logged():
    history = [{"step": 1, "x": 1.0}, {"step": 2}, {"step": 3, "x": None}, {"step": 4, "x": 2}]
    assert series(history, "x") == ([1, 4], [1.0, 2.0])


def test_smoothing_keeps_a_constant_and_widens_the_band_where_values_scatter():
    assert smooth([2.0] * 5) == ([2.0] * 5, [0.0] * 5)
    mean, spread = smooth([0.0, 3.0, 0.0, 3.0, 0.0])
    assert mean[1:-1] == pytest.approx([1.0, 2.0, 1.0])
    assert spread[2] == pytest.approx(2**0.5)


def test_a_run_that_has_not_come_to_its_end_says_how_far_it_is(tmp_path):
    with MetricsLog(tmp_path, TrainConfig(algorithm="remax", total_steps=40)) as log:
        for step in range(1, 8):
            log.log(step, online_metrics(step))
        page = write_report(tmp_path).read_text()  # the log is still open
    assert "7 of 40 steps" in page


def test_a_report_is_drawn_elsewhere_when_told_so_and_from_a_configuration_of_another_version(tmp_path):
    record(tmp_path / "run", 5)
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("an_option_of_another_version: 1\n")
    assert write_report(tmp_path / "run" / "metrics.jsonl", tmp_path / "there") == tmp_path / "there" / "report.html"
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_folder_of_runs_names_them(tmp_path):
    record(tmp_path / "demo" / "hydra-sft", 2)
    with pytest.raises(UserError, match=r"holds no metrics yet; there are runs in .*hydra-sft$"):
        write_report(tmp_path / "demo")


def test_several_runs_are_drawn_in_one_picture_a_metric(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        record(tmp_path / name, 12 + seed)
        TrainConfig(algorithm="hydra-ppo", seed=seed, gamma=0.9, output_dir=name).to_yaml(
            tmp_path / name / "config.yaml"
        )
    page = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "both").read_text()
    drawn = {p.stem for p in (tmp_path / "both" / "plots").glob("*.png")}
    assert drawn == {"reward", "kl", "length", "reward_by_kl", "reward_by_time"}
    assert page.count("data:image/png;base64,") == len(drawn)
    assert "a: hydra-ppo, 12 of 100 steps<br>b: hydra-ppo, 13 of 100 steps" in page
    differing = page.partition("Options that differ")[2]
    assert "<td>seed</td>" in differing
    assert "gamma" not in differing
    assert "output_dir" not in differing


def test_lines_of_a_comparison_are_the_runs_own(tmp_path):
    record(tmp_path / "a", 3)
    record(tmp_path / "b", 4, "sft", lambda step: {"loss": 1.0 / step})
    figures = draw({name: read_run(tmp_path / name) for name in ("a", "b")})
    assert [line.get_label() for line in figures["length"].axes[0].lines] == ["a"]
    assert list(figures["length"].axes[0].lines[0].get_ydata()) == [31.0, 32.0, 33.0]  # three values are not smoothed
    assert "loss" not in figures  # one of them is a policy gradient


@pytest.mark.parametrize(
    ("runs", "target", "words"),
    [
        (["a", "a"], "out", "given twice"),
        (["a", "b"], "b", "is one of the runs"),
        (["a", "c"], "out", "no metrics yet"),
    ],
    ids=["twice", "over-a-run", "no-run"],
)
def test_a_comparison_that_cannot_be_writes_nothing(tmp_path, runs, target, words):
    for name in "ab":
        record(tmp_path / name, 2)
    with pytest.raises(UserError, match=words):
        compare([tmp_path / name for name in runs], tmp_path / target)
    assert not (tmp_path / target / "report.html").exists()


def test_runs_are_called_by_the_shortest_ends_of_their_paths_that_differ():
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names([Path("/x/1/ppo"), Path("/x/2/ppo"), Path("/x/2/sft")]) == ["1/ppo", "2/ppo", "2/sft"]

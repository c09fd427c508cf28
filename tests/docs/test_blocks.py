"""Every fenced block of README and docs/ runs, in the order of its page, or the table says what runs in its place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import PAGES, ROOT, RUN, TABLE, Block, blocks, commands, instead, set_up, to_run

HERE = Path(__file__).resolve().parent
COMMAND = re.compile(r"(\$ )?(rlhf-train|python|pip|make|torchrun|accelerate|from \w+ import|import)\s")


def runs(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language in RUN]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """A page in a process of its own, in a directory of its own."""
    command = [sys.executable, str(HERE / "page.py"), str(page)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def test_every_entry_of_the_table_stands_for_something_and_no_page_lacks_its_set_up():
    written = []
    for page in PAGES:
        for block in runs(page):
            written += [text for _, text in commands(block)] if block.language == "bash" else [block.text]
    used = {instead(text.partition("\n")[0]) for text in written}
    assert [entry.line for entry in TABLE if entry not in used] == []
    assert set(HERE.glob("setup_*.py")) <= {set_up(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_hides_in_a_block_that_is_not_run(page):
    for block in blocks(page.read_text()):
        if block.language not in RUN:
            assert block.language in ("", "text", "json", "toml", "dockerfile"), f"line {block.line}"
            hidden = [row for row in block.text.splitlines() if COMMAND.match(row)]
            assert not hidden, f"line {block.line}: say python or bash of {hidden[0]!r}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_page_has_a_hole_where_a_figure_was_to_stand(page):
    holes = re.findall(r"\bTODO\b|@@\w*|\| [A-Z]{4,} \|$", page.read_text(), re.MULTILINE)
    assert holes == []


def test_a_block_that_fails_fails_its_page_and_is_named_by_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\nx / 0\n```\n")
    done = run_page(page, tmp_path)
    assert done.returncode != 0
    assert f'"{page}", line 5' in done.stderr
    page.write_text("```bash\ntrue\nfalse  # says why\n```\n")
    done = run_page(page, tmp_path)
    assert done.returncode != 0
    assert "page.md, line 3: exit code 1" in done.stderr
    page.write_text("```yaml\nlearning_rat: 1\n```\n")
    assert "did you mean 'learning_rate'" in run_page(page, tmp_path).stderr


def test_later_blocks_see_names_and_files_of_earlier_ones(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\n# mine.py\ntwo = 2\n```\n- in a list\n\n"
        "  ```python\n  import mine\n  assert mine.two == two\n  ```\n"
        '```bash\npython -c "import mine" \\\n  && cat <<END > said\none\nEND\n```\n'
    )
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text() == "one\n"


def test_fences_end_where_they_began():
    found = blocks("~~~\n````text\n```bash\n```\n````\n  ```python\n  if x:\n      y\n  ```\n")
    assert found == [Block("text", 3, "```bash\n```\n"), Block("python", 7, "if x:\n    y\n")]
    with pytest.raises(ValueError, match="line 2"):
        blocks("\n```python\n")


def test_a_bash_block_is_split_into_whole_commands():
    block = Block("bash", 10, "# first\na \\\n  b\n\nfor i in 1 2; do\n  c $i\ndone\ncat <<E\n# d\nE\n")
    assert list(commands(block)) == [(11, "a \\\n  b"), (14, "for i in 1 2; do\n  c $i\ndone"), (17, "cat <<E\n# d\nE")]
    with pytest.raises(ValueError, match="whole command"):
        list(commands(Block("bash", 1, "echo 'x\n")))


def test_training_runs_are_cut_to_a_step_and_nothing_else_is_changed():
    small = " --total-steps 1 --rollout-batch-size 4 --max-completion-length 8 --no-report"
    assert to_run("rlhf-train remax --seed 1   # why") == f"rlhf-train remax --seed 1{small}   # why"
    assert to_run("rlhf-train --config a.yaml | tail -1") == f"rlhf-train --config a.yaml{small} | tail -1"
    assert to_run("nice python -m rlhf_trainer ppo \\\n -a 1") == f"nice python -m rlhf_trainer ppo \\\n -a 1{small}"
    assert to_run("torchrun --nproc-per-node 2 -m rlhf_trainer \\\n ppo") == f"rlhf-train \\\n ppo{small}"
    assert "--total-steps 2 " in str(to_run("rlhf-train remax --resume"))
    for same in ("rlhf-train plan --model remax", "rlhf-train ppo --help", "ls -l"):
        assert to_run(same) == same
    assert to_run("pip install x  # first") is None
    assert to_run("make demo    # now") == f"make -n -C {ROOT} demo > make.log"

"""Links between the pages lead somewhere: to a file of the repository, and to a heading that is there."""

import re

import pytest
from blocks import PAGES, ROOT

MORE = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as they are made from them: lower case, words joined by dashes."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = [match[1] for match in re.finditer(r"^#+ +(.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), f"{target}#{anchor}"

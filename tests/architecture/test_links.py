"""Relative links and anchors of Markdown files resolve (tools/check_links.py)."""

from pathlib import Path

import pytest

from tools.check_links import ROOT, anchors, broken_links, slug, tracked_markdown


@pytest.mark.parametrize(
    "path", tracked_markdown(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_links_resolve(path):
    assert not broken_links([path])


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Quick start", "quick-start"),
        ("`encode`: images -> latents", "encode-images---latents"),
        ("[FSDP2](x.md) & ZeRO-3", "fsdp2--zero-3"),
        ("min_snr, 3.0", "min_snr-30"),
    ],
)
def test_slug_of_a_heading(heading, anchor):
    assert slug(heading) == anchor


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """page.md, with one heading twice, beside other.md."""
    (tmp_path / "other.md").write_text("# Other\n\n<a id='here'></a>\n")
    page = tmp_path / "page.md"
    page.write_text("# One\n\n# One\n\n```\n# no heading [no link](absent.md)\n```\n")
    return page


def test_anchors(page):
    assert anchors(page) == {"one", "one-1"}


@pytest.mark.parametrize(
    "text",
    [
        "[a](other.md)",
        "[a](other.md#other)",
        "[a](other.md#here)",
        "![a](<other.md> 'title')",
        "[a](#one-1)",
        "[a](https://example.org/absent)",
        "`[a](absent.md)`",
        "[a]: other.md",
        '<img src="other.md">',
    ],
)
def test_good_links(page, text):
    page.write_text(f"{page.read_text()}\n{text}\n")
    assert broken_links([page], page.parent) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](absent.md)", "no such file"),
        ("![a](absent.png)", "no such file"),
        ("[a](other.md#absent)", "no heading #absent"),
        ("[a](#two)", "no heading #two"),
        ("[a](../outside.md)", "outside the repository"),
        ("[a](/etc/hosts)", "absolute path"),
        ("[a]: absent.md", "no such file"),
        ('<a href="absent.md">', "no such file"),
    ],
)
def test_broken_links_are_reported_with_their_line(page, text, reason):
    page.write_text(f"{page.read_text()}\n{text}\n")
    (broken,) = broken_links([page], page.parent)
    assert broken.startswith("page.md:9: ")
    assert broken.endswith(reason)

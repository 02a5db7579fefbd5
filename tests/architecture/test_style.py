"""Writing style that a machine can check: widths of docs, openings of docstrings.

Ruff holds the width of code (pyproject.toml).
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
FRAGMENTS = {
    "also",
    "and",
    "as",
    "at",
    "because",
    "behind",
    "but",
    "by",
    "for",
    "from",
    "how",
    "if",
    "in",
    "is",
    "it",
    "its",
    "of",
    "on",
    "or",
    "so",
    "that",
    "those",
    "to",
    "what",
    "whatever",
    "when",
    "where",
    "which",
    "who",
    "whoever",
    "whose",
    "why",
    "with",
}
"""First words that leave a docstring without its verb or noun."""


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, check=True, text=True, capture_output=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(source: str) -> list[tuple[int, str]]:
    """(line, text) of each docstring, those behind a class attribute or a constant included."""
    return [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def fragments(source: str) -> list[str]:
    """`line: opening words` of each docstring that starts with a fragment."""
    found = []
    for line, text in docstrings(source):
        words = text.split()
        if words and words[0].strip(".,:;()").lower() in FRAGMENTS:
            found.append(f"{line}: {' '.join(words[:8])}")
    return found


@pytest.mark.parametrize("path", tracked("*.py"), ids=relative)
def test_docstrings_start_with_a_verb_or_a_noun_phrase(path):
    assert not fragments(path.read_text()), relative(path)


@pytest.mark.parametrize("path", tracked("*.md"), ids=relative)
def test_docs_keep_to_the_width(path):
    """Lines with a URL, which cannot be broken, are exempt."""
    wide = [
        f"{number}: {line[:60]}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS and "://" not in line
    ]
    assert not wide, relative(path)


def test_fragments_are_noticed():
    assert fragments('"""Of the run."""') == ["1: Of the run."]
    assert fragments('class A:\n    x: int = 1\n    """That there are."""\n')
    assert not fragments('"""Offsets of a shard, `of` included."""')

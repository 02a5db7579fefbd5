"""Check relative links and anchors in Markdown files, without network access.

    python tools/check_links.py              # all tracked Markdown files
    python tools/check_links.py README.md

Links with a scheme (https, mailto) are skipped.  A link must name an existing file or folder inside
the repository; an anchor must be a heading or an HTML id of its Markdown file, as GitHub names it.
The exit status is 1 if a link is broken.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ {0,3}(```|~~~)")
INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+[\"'(][^)]*)?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
HTML_LINK = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=[\"']([^\"']+)[\"']")
HTML_ANCHOR = re.compile(r"<\w+\b[^>]*?\b(?:id|name)=[\"']([^\"']+)[\"']")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


def text_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of a Markdown file outside code blocks."""
    lines = []
    fence = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        mark = FENCE.match(line)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        elif not fence:
            lines.append((number, line))
    return lines


def slug(heading: str) -> str:
    """Anchor of a heading on GitHub: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    """All anchors of a Markdown file; a repeated heading gets -1, -2 ... appended."""
    names: set[str] = set()
    for _, line in text_lines(path):
        names.update(HTML_ANCHOR.findall(line))
        if heading := HEADING.match(line):
            name = base = slug(heading[1])
            repetition = 0
            while name in names:
                repetition += 1
                name = f"{base}-{repetition}"
            names.add(name)
    return frozenset(names)


def links(path: Path) -> list[tuple[int, str]]:
    """(line number, target) of every link in a Markdown file."""
    found = []
    for number, line in text_lines(path):
        text = INLINE_CODE.sub("", line)
        targets = [*LINK.findall(text), *HTML_LINK.findall(text), *DEFINITION.findall(text)]
        found += [(number, target) for target in targets]
    return found


def problem(path: Path, target: str, root: Path) -> str | None:
    """Reason why a link from the file `path` is broken, or None."""
    if SCHEME.match(target):
        return None
    name, _, anchor = unquote(target).partition("#")
    if name.startswith("/"):
        return "absolute path"
    linked = (path.parent / name).resolve() if name else path.resolve()
    if not linked.is_relative_to(root.resolve()):
        return "outside the repository"
    if not linked.exists():
        return "no such file"
    if anchor and linked.suffix == ".md" and anchor not in anchors(linked):
        return f"no heading #{anchor}"
    return None


def broken_links(paths: list[Path], root: Path = ROOT) -> list[str]:
    """`file:line: target: problem` of every broken link."""
    return [
        f"{path.relative_to(root)}:{number}: {target}: {reason}"
        for path in paths
        for number, target in links(path)
        if (reason := problem(path, target, root))
    ]


def tracked_markdown() -> list[Path]:
    command = ["git", "ls-files", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="Markdown files (default: all tracked)")
    args = parser.parse_args()
    broken = broken_links([path.resolve() for path in args.files] or tracked_markdown())
    print("\n".join(broken), end="\n" if broken else "")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())

"""Recognition of secrets in a cluster profile, whose text ends up in scripts and in job.json."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator

SECRET_WORDS = frozenset(
    {
        *(
            "KEY",
            "KEYS",
            "APIKEY",
            "TOKEN",
            "TOKENS",
            "SECRET",
            "SECRETS",
            "PAT",
            "JWT",
            "BEARER",
            "OTP",
        ),
        *("PASS", "PASSWD", "PASSWORD", "PASSWORDS", "PASSPHRASE", "PASSCODE", "PWD", "PW"),
        *("CRED", "CREDS", "CREDENTIAL", "CREDENTIALS", "AUTH", "AUTHORIZATION", "OAUTH"),
        *(
            "PRIVATE",
            "SIGNATURE",
            "SIGNING",
            "SAS",
            "DSN",
            "COOKIE",
            "COOKIES",
            "SESSION",
            "WEBHOOK",
        ),
    }
)
SECRET_ENDS = ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "APIKEY", "CREDENTIALS")
"""Ends of names of secrets, without a word boundary before them: GITHUBTOKEN."""
SECRET_OPTIONS = ("PASSWORD", "PASSWD", "TOKEN", "SECRET", "KEY", "PAT")
"""Last words of options of a command, such as --docker-password, whose value is the next word."""
HARMLESS = re.compile(
    r"PWD|OLDPWD|XDG_SESSION_\w+|DESKTOP_SESSION|(\w+_)?TOKENIZERS_\w+|(\w+_)?(MAX|NUM)_(\w+_)?TOKENS"
    r"|\w+_(FILE|PATH|DIR|SOCK)|GOOGLE_APPLICATION_CREDENTIALS"
)
"""Names that only sound so; the path to a secret is none."""
SWITCH = re.compile(r"|0|1|true|false|yes|no|on|off|none", re.IGNORECASE)
FROM_ELSEWHERE = re.compile(r"\$\{?\w|\$\(|`")
"""Beginning of a value that the shell takes from a variable or a command."""
TOKENS = (
    r"gh[pousr]_\w{16,}",
    r"github_pat_\w{16,}",
    r"hf_[A-Za-z0-9]{16,}",
    r"[spr]k[-_](?=[\w-]*[0-9])[\w-]{16,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{12,}",
    r"xox[a-z]-[A-Za-z0-9-]{8,}",
    r"AIza[\w-]{20,}",
    r"ya29\.[\w-]{16,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}",
    r"gl(?:pat|ptt|dt|rt)-[\w-]{12,}",
    r"npm_[A-Za-z0-9]{20,}",
    r"pypi-[\w-]{16,}",
    r"dckr_pat_[\w-]{12,}",
    r"SG\.[\w-]{16,}",
)
"""Patterns of tokens of well-known services."""
PATTERNS = {
    "a password in a URL": re.compile(
        r"[A-Za-z][A-Za-z0-9+.-]*://([^\s/@:]*:[^\s/@]+|[\w-]{20,})@"
    ),
    "a token": re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(TOKENS)})"),
    "an authorization header": re.compile(
        r"(Bearer|Authorization:\s*\w+)\s+[\w.~+/=-]{8,}", re.IGNORECASE
    ),
    "a private key": re.compile(r"-----BEGIN "),
    "a webhook": re.compile(r"https://(hooks\.slack\.com|discord(app)?\.com/api/webhooks)/"),
    "a signature in a URL": re.compile(
        r"[?&](sig|signature|X-Amz-Signature|token|access_token|key|api_key)=[^&\s]{8,}",
        re.IGNORECASE,
    ),
}
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
"""UUIDs, which name devices."""
HEXADECIMAL = re.compile(r"(?<![\w:.@/-])[0-9a-fA-F]{32,}(?![\w-])")
LONG_WORD = re.compile(r"(?<![\w/+.~-])[A-Za-z0-9+][\w+/-]{31,}={0,2}(?![\w/+.-])")
CHANGES = 0.4
"""Random letters and digits change between upper case, lower case and digits 0.6 times a character;
names do so far less.
"""
OF_A_VERSION = re.compile(r"COMMIT|SHA|HASH|DIGEST|REVISION|CHECKSUM|MD")
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
OPTION = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def looks_secret(name: str, value: str) -> str | None:
    """Reason why a variable of this name and value looks like a secret; None: it does not."""
    named = set(_words(name)) & SECRET_WORDS or name.upper().endswith(SECRET_ENDS)
    if named and not SWITCH.fullmatch(value) and not HARMLESS.fullmatch(name.upper()):
        return "its name says so"
    return secret_value(
        value, hexadecimal=not set(map(OF_A_VERSION.fullmatch, _words(name))) - {None}
    )


def secret_value(value: str, *, hexadecimal: bool = True) -> str | None:
    """Kind of secret that a text holds; None: none.  `hexadecimal`: long hex numbers count."""
    value = UUID.sub("", value)
    for kind, pattern in PATTERNS.items():
        if pattern.search(value):
            return kind
    if (hexadecimal and HEXADECIMAL.search(value)) or any(
        map(_is_random, LONG_WORD.findall(value))
    ):
        return "a long random word"
    return None


def secret_in_line(line: str) -> tuple[str, str] | None:
    """First secret in a line of shell, as (name, reason)."""
    try:
        return secret_in_words(shlex.split(line))
    except ValueError:  # an open quote
        return secret_in_words(line.split())


def secret_in_words(words: Iterable[str]) -> tuple[str, str] | None:
    """First secret in the words of a command (assignments, options, values), as (name, reason)."""
    option = ""
    for word in words:
        for name, value in _named(word, option):
            if (
                reason := looks_secret(name, "" if FROM_ELSEWHERE.match(value) else value)
            ) is not None:
                return name, reason
        if not ASSIGNMENT.fullmatch(word) and (reason := secret_value(word)) is not None:
            return "a word", reason
        if len(inner := word.split()) > 1 and (found := secret_in_words(inner)) is not None:
            return found
        named = OPTION.fullmatch(word)
        option = named[1].replace("-", "_") if named and named[2] is None else ""
    return None


def _words(name: str) -> list[str]:
    """`dbPassword`, `DB_PASSWORD`: DB, PASSWORD."""
    return [word.upper() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _named(word: str, option: str) -> Iterator[tuple[str, str]]:
    """(name, value) that a word gives: NAME=value, --name=value, or the value of the option before
    it.
    """
    if found := ASSIGNMENT.fullmatch(word):
        yield found[1], found[2]
    elif (found := OPTION.fullmatch(word)) and found[2] is not None:
        yield found[1].replace("-", "_"), found[2]
        if inner := ASSIGNMENT.fullmatch(found[2]):
            yield inner[1], inner[2]
    elif option and not word.startswith("-") and _words(option)[-1:][0] in SECRET_OPTIONS:
        yield option, word


def _is_random(word: str) -> bool:
    kinds = [
        "upper" if c.isupper() else "lower" if c.islower() else "digit" if c.isdigit() else c
        for c in word
    ]
    changes = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    return {"upper", "lower", "digit"} <= set(kinds) and changes >= CHANGES * len(word)

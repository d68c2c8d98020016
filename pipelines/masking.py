"""Taking secrets out of text that others may read: logs, messages, errors.

Two rules: what stands in an environment variable whose name says that it is secret, and what looks
like a secret by itself (a password in a URL, a key of a cloud, a signed address).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

MASK = "***"
MIN_SECRET_LENGTH = 6  # shorter values would blot out ordinary words
# A part of a variable's name between underscores that makes its value secret. `cluster.fields` has
# these three once more, since neither package imports the other; a test keeps them equal.
SECRET_PARTS = {
    "APIKEY",
    "AUTH",
    "AUTHORIZATION",
    "CREDENTIAL",
    "CREDENTIALS",
    "KEY",
    "PASS",
    "PASSPHRASE",
    "PASSWD",
    "PASSWORD",
    "PAT",
    "PWD",
    "SECRET",
    "SECRETS",
    "TOKEN",
    "WEBHOOK",
}
SECRET_ENDS = (  # of a part, as in PGPASSWORD
    *("ACCESSKEY", "APIKEY", "CREDENTIALS", "PASSPHRASE"),
    *("PASSWD", "PASSWORD", "PRIVATEKEY", "SECRET", "TOKEN"),
)
# A last part that makes it a reference to a secret, or a setting.
HARMLESS_ENDS = {"FILE", "HOST", "ID", "LOCATION", "MODE", "NAME", "PATH", "TYPE", "USERNAME"}

# Each keeps its first group and loses the rest.
_PATTERNS = (
    re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)", re.IGNORECASE),
    re.compile(r"(\bhttps?://)[^\s/:@'\"]+(?=@)", re.IGNORECASE),  # a token without a name
    re.compile(
        r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*)[^\s'\",]+", re.I
    ),
    re.compile(r"(\b(?:bearer)\s+)[\w.~+/-]{8,}=*", re.IGNORECASE),
    re.compile(r"([?&](?:x-amz-[a-z-]+|signature|sig|token|access_token|key)=)[^\s&'\"]+", re.I),
    re.compile(
        r"(\b[\w-]*(?:secret|password|passwd|api[_-]?key|access[_-]?key|session[_-]?token)[\w-]*"
        r"['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&]{4,}",
        re.IGNORECASE,
    ),
    re.compile(r"(https://hooks\.slack\.com/)[\w/-]+"),
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"()\b(?:gh[pousr]_[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,}|xox[abprs]-[\w-]{10,})\b"),
)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    parts = name.upper().split("_")
    if parts == ["PWD"] or parts[-1] in HARMLESS_ENDS:  # PWD is the shell's own directory
        return False
    return any(part in SECRET_PARTS or part.endswith(SECRET_ENDS) for part in parts)


def masker(environment: Mapping[str, str] = os.environ) -> Callable[[str], str]:
    """A function that takes secrets out of a text, by this environment as it is now."""
    secrets = {
        line.strip()
        for name, value in environment.items()
        if is_secret_name(name)
        for line in value.splitlines()  # keys in PEM have several
        if len(line.strip()) >= MIN_SECRET_LENGTH
    }
    # the longest first: one secret may be the beginning of another
    known = sorted(map(re.escape, secrets), key=len, reverse=True)
    values = re.compile("|".join(known)) if known else None

    def mask(text: str) -> str:
        if values is not None:
            text = values.sub(MASK, text)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<1>{MASK}", text)
        return text

    return mask


def mask(text: str) -> str:
    """The text without secrets, by the environment as it is now."""
    return masker()(text)

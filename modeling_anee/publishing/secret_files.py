"""Files that look like secrets: by their names, and by what tokens and keys look like in text."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .plan import SAMPLE


NAMES = (
    *("*.env", "env", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx"),
    *("id_rsa", "id_dsa", "id_ecdsa*", "id_ed25519*", "*netrc", "kubeconfig", "token", "token.txt", "tokens.txt"),
    *("*credential*", "*secret*", "*password*", "service[-_]account*.json"),
)
# What it is, and how it looks. Only what begins like nothing else: a vocabulary is full of odd words.
CONTENT = {
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a token of the Hub": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}\b",
    "a token of GitHub": rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,})\b",
    "a token of GitLab": rb"\bglpat-[A-Za-z0-9_-]{20}",
    "a token of PyPI": rb"\bpypi-AgEIcHlwaS5vcmc",
    "a key of AWS": rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a key of Google": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "a key of an API": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a token of Slack": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}",
}


def secret(path: Path) -> str | None:
    """Why a file looks like a secret, without telling it; None if it does not."""
    if any(fnmatch(path.name.lower(), pattern) for pattern in NAMES):
        return f"{path.name} looks like a secret by its name"
    data = path.read_bytes()
    if b"\0" in data[:SAMPLE]:
        return None
    found = next((what for what, pattern in CONTENT.items() if re.search(pattern, data)), None)
    return None if found is None else f"{path.name} holds what looks like {found}"


def secrets(files: Sequence[Path], allowed: Sequence[str]) -> list[str]:
    """What looks like a secret and was not named as allowed, as problems.

    Raises:
        ValueError: a name that is allowed, but none of the files has.
    """
    names = {path.name for path in files}
    for name in allowed:
        if name not in names:
            raise ValueError(f"--allow {name}: there is no such file in the folder")
    found = [secret(path) for path in files if path.name not in allowed]
    return [f"{reason} (if it is meant to be public: --allow FILE)" for reason in found if reason is not None]

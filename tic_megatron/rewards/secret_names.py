"""Which names are those of secrets, by what they look like."""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS = {
    *("key", "keys", "token", "secret", "secrets", "credential", "credentials", "pat", "auth", "sig", "signature"),
    *("password", "passwords", "passwd", "pwd", "pass", "passphrase"),
}
_SECRET_ENDS = ("apikey", "token", "secret", "password", "passphrase")
_LOGIN = re.compile(r"://[^/?#\s]*:[^/?#\s]+@")


def looks_secret(name: str, value: str = "") -> bool:
    """Of an environment variable, or of a part of an address: `HF_TOKEN`, `PGPASSWORD`, `api-key`, `accessToken`; and a variable
    whose value is an address with a password, like `DATABASE_URL`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) for word in words) or bool(_LOGIN.search(value))

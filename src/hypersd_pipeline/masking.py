"""The mask that keeps secrets out of everything that is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

_USER_INFO = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_ASSIGNED = re.compile(r"(?i)(\b\w*(?:token|password|passwd|secret|api_?key|signature)(?:=|['\"]:)\s*['\"]?)[^\s'\",&}]+")
_SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|password|passwd|passphrase|credentials?|(api|access|private)_?key)(_|$)")
_SHORTEST = 6  # shorter values of variables, such as "1" or "true", are words of ordinary text


def masked(text: str) -> str:
    """`text` with ``***`` for each secret.

    Secrets are ``user:password`` of an address, the value of a variable of the environment that is named like one (``..._TOKEN``,
    ``..._PASSWORD``, ``..._SECRET...``, ``..._API_KEY``), and what stands after ``token=`` and the like.
    """
    text = _USER_INFO.sub("***", text)
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _ASSIGNED.sub(r"\1***", text)


def _secrets() -> Iterator[str]:
    for name in list(os.environ):  # not items(): a thread of a library may take a variable away meanwhile
        value = os.environ.get(name, "")
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield value
        for user_info in _USER_INFO.findall(value):
            password = user_info.partition(":")[2]
            yield from (form for form in (password, unquote(password)) if len(form) >= _SHORTEST)

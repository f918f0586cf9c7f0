"""Telling another program what a retraining decided."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

URL, TOKEN = "HYPERSD_WEBHOOK", "HYPERSD_WEBHOOK_TOKEN"
"""Variables of the environment. An address of a webhook is a secret, so neither stands in the configuration, which is recorded."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would get the token too."""

    def redirect_request(self, *_: Any) -> None:
        return None


def notify(report: Mapping[str, Any], seconds: float = 10.0) -> bool:
    """POST a report as JSON to ``HYPERSD_WEBHOOK``, with ``HYPERSD_WEBHOOK_TOKEN`` as bearer token where there is one.

    A failure is a warning that names neither address nor token.

    Returns:
        Whether it was taken. False also where no webhook is asked for.
    """
    url = os.environ.get(URL)
    if not url:
        return False
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("no http address")
        headers = {"Content-Type": "application/json", "User-Agent": "hypersd"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url, json.dumps(report).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds):
            log.info("The webhook took the decision.")
        return True
    except urllib.error.HTTPError as error:
        why = f"status {error.code}"
    except (OSError, ValueError) as error:  # their messages may hold the address
        why = type(getattr(error, "reason", error)).__name__
    log.warning("The webhook of %s did not take the decision (%s), which stands all the same.", URL, why)
    return False

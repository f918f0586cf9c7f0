"""The webhook of a retraining, with a real server on this machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from hypersd_pipeline.io.webhook import notify

Received = list[tuple[dict[str, str], bytes]]
CODES = {"/taken": 200, "/moved": 302}


@pytest.fixture
def server() -> Iterator[tuple[str, Received]]:
    """Its address, and the headers and bodies that it got. It takes what is sent to /taken and refuses all else."""
    received: Received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(next((code for place, code in CODES.items() if self.path.startswith(place)), 500))
            if self.path.startswith("/moved"):
                self.send_header("Location", "/taken")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", received
    made.shutdown()
    made.server_close()


def test_the_decision_is_posted_with_the_token(server, monkeypatch):
    address, received = server
    monkeypatch.setenv("HYPERSD_WEBHOOK", f"{address}/taken/secret-path")
    monkeypatch.setenv("HYPERSD_WEBHOOK_TOKEN", "secret-token")
    assert notify({"outcome": "kept", "reasons": ["é"]})
    ((headers, body),) = received
    assert headers["Authorization"] == "Bearer secret-token" and json.loads(body) == {"outcome": "kept", "reasons": ["é"]}


@pytest.mark.parametrize(
    "place", ["{address}/refused/secret-path", "{address}/moved/secret-path", "http://127.0.0.1:9/secret-path", "file:///etc/secret-path"]
)
def test_a_webhook_that_fails_is_a_warning_without_its_address(server, monkeypatch, caplog, place):
    monkeypatch.setenv("HYPERSD_WEBHOOK", place.format(address=server[0]))
    assert not notify({"outcome": "promoted"})
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "secret-path" not in record.getMessage()
    assert len(server[1]) == place.startswith("{address}")  # and not again where it was sent to


def test_without_an_address_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("HYPERSD_WEBHOOK", raising=False)
    assert not notify({"outcome": "promoted"})

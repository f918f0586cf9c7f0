"""The arena as a program: what it needs is checked, the page is served until Ctrl-C, and the votes are scored."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import statistics
import threading
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import islice
from typing import Any

from hypersd_pipeline.arena.config import ArenaConfig, rows
from hypersd_pipeline.arena.contenders import LoadLora, Sampler, contenders, contenders_of
from hypersd_pipeline.arena.page import Arena, add_page
from hypersd_pipeline.arena.scores import score
from hypersd_pipeline.arena.study import Study
from hypersd_pipeline.arena.votes import VoteStore
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

log = logging.getLogger(__name__)


def serve(
    arena: ArenaConfig, teacher: TeacherConfig, evaluation: EvaluationConfig, manifest: Manifest, loras: LoadLora, votes: VoteStore
) -> dict[str, Any]:
    """Serve the page until Ctrl-C, SIGTERM or ``arena.minutes``.

    Returns:
        Metrics of the session: ``served_seconds``, ``images``, and ``seconds/<contender>``, the median of an image.

    Raises:
        UserError: the page's library is missing, its address cannot be used, or there is no prompt. All before a network is loaded.
    """
    check_installed()
    prompts = prompts_of(arena, evaluation, manifest)
    with bound(arena) as listening:
        loaded = load_teacher(teacher)
        weights = {name: loras(name) for name in arena.loras()}
        shown, voted = (contenders(rows(models), loaded, weights, evaluation) for models in (arena.shown, arena.voted))
        sampler = Sampler(loaded, weights, evaluation, arena.queue)
        sampler.warm_up([*shown, *voted])
        add_page(Arena(arena, sampler, shown, Study(votes, voted, prompts, evaluation.seed, arena.votes_per_voter)))
        seconds = _run(arena, listening)
    made = {f"seconds/{name}": statistics.median(taken) for name, taken in sampler.seconds.items()}
    return {"served_seconds": seconds, "images": sum(map(len, sampler.seconds.values())), **made}


def score_votes(
    arena: ArenaConfig, teacher: TeacherConfig, evaluation: EvaluationConfig, loras: LoadLora, votes: VoteStore, session: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """The metrics and the table of all votes on the models as they are now. See `scores.score`.

    Args:
        session: of the last `serve`. Only its place in time matters.
    """
    several = contenders_of(arena, teacher, loras, evaluation)
    metrics, table = score(votes.votes(c.key for c in several), several)
    log.info("Arena: %d votes of %d voters.", metrics["votes"], metrics["voters"])
    return metrics, table


def check_installed() -> None:
    """Raises UserError where NiceGUI is missing."""
    if find_spec("nicegui") is None:
        raise UserError("The arena needs NiceGUI; install it with pip install 'hypersd-pipeline[arena]'.")


def prompts_of(arena: ArenaConfig, evaluation: EvaluationConfig, manifest: Manifest) -> list[str]:
    """The prompts of pairs: ``arena.prompts``, or the captions of as many test rows as the evaluation samples.

    Raises:
        UserError: there are none.
    """
    if arena.prompts is not None:
        return [prompt.strip() for prompt in arena.prompts if prompt.strip()]
    found: Sequence[str] = [row.captions[0] for row in islice(manifest.splits.get("test", ()), evaluation.samples) if row.captions]
    if not found:
        raise UserError("arena.prompts: the data has no captions in the split 'test'; give a list of prompts.")
    return list(found)


def bound(arena: ArenaConfig) -> socket.socket:
    """A socket that listens on ``arena.host`` and ``arena.port``.

    Raises:
        UserError: there is no such address on this machine, or its port is taken.
    """
    family = socket.AF_INET6 if ":" in arena.host else socket.AF_INET
    try:
        socket.getaddrinfo(arena.host, arena.port, family)
        return socket.create_server((arena.host, arena.port), family=family)
    except socket.gaierror as error:
        raise UserError(f"arena.host: '{arena.host}' is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all.") from error
    except OSError as error:
        told = os.strerror(error.errno or 0)
        raise UserError(
            f"arena.port: {arena.host}:{arena.port} cannot be used ({told}); choose another, or a free one: --params arena.port=0."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run(arena: ArenaConfig, listening: socket.socket) -> float:
    """Serve in a thread, so that Ctrl-C comes here and ends the page and not the run. Returns the seconds that it was open."""
    import uvicorn
    from fastapi import FastAPI
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")  # it looks at torch's objects while it searches the server
    app = FastAPI(openapi_url=None)
    if is_loopback(arena.host):  # another site's name that points here is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", arena.host])
    else:
        log.warning("arena.host: everyone who reaches %s can open the page. It has no password and no encryption.", arena.host)
    ui.run_with(app, title="Hyper-SD arena", storage_secret=secrets.token_hex(32), show_welcome_message=False)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    begun = time.monotonic()
    thread.start()
    host = f"[{arena.host}]" if ":" in arena.host else arena.host
    log.info("The arena is open at http://%s:%d. Ctrl-C closes it and scores the votes.", host, listening.getsockname()[1])
    try:
        while thread.is_alive() and (arena.minutes is None or time.monotonic() - begun < 60 * arena.minutes):
            thread.join(0.5)
    except KeyboardInterrupt:
        log.info("The arena closes.")
    server.should_exit = True
    thread.join(30)
    return time.monotonic() - begun

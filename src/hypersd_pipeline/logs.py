"""What is written to the log: without secrets, and each line with what it is about, a stage and the model that it makes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hypersd_pipeline.masking import masked

_subject: ContextVar[str] = ContextVar("subject", default="")


def set_subject(subject: str) -> None:
    """What all following lines are about, such as ``tscd_k4: lora_k4``. Empty for nothing in particular."""
    _subject.set(subject)


@contextmanager
def about(subject: str) -> Iterator[None]:
    """What the lines inside are about."""
    token = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(token)


_UNHELPFUL = {"kedro.runner": ("--async", "resume the pipeline run"), "kedro_viz": ("Workflow tracking is disabled",)}
"""What other packages say that no user of this project can act on, by logger: ``--async`` is refused, and the same command continues."""


def _is_helpful(record: logging.LogRecord) -> bool:
    said = str(record.msg)
    return not any(record.name.startswith(name) and any(words in said for words in some) for name, some in _UNHELPFUL.items())


class _Formatter(logging.Formatter):
    """Another formatter, with the subject in square brackets before its messages, and with secrets masked (in tracebacks too)."""

    def __init__(self, plain: logging.Formatter | None) -> None:
        super().__init__()
        self._plain = plain or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        if subject := _subject.get():
            record = copy.copy(record)  # other handlers have their own form
            record.msg, record.args = f"[{subject}] {record.getMessage()}", None
        return masked(self._plain.format(record))


def prepare_logs() -> None:
    """From now on the handlers of the program, and of MLflow which has its own, mask secrets and name subjects.

    Kedro accepts no formatter of a project's own in ``conf/logging.yml``.
    """
    for handler in [*logging.getLogger().handlers, *logging.getLogger("mlflow").handlers]:
        if not isinstance(handler.formatter, _Formatter):
            handler.setFormatter(_Formatter(handler.formatter))
            handler.addFilter(_is_helpful)

"""Commands that ``kedro`` finds here: ``run`` with readable errors, and ``catalog list``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from kedro.framework.cli.catalog import catalog as kedro_catalog
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.project import settings

from hypersd_pipeline.errors import UserError

_CONTEXT = {"help_option_names": ["-h", "--help"]}


def readable(error: BaseException) -> str | None:
    """The sentence to print for `error` instead of a traceback; None for a fault of the program.

    Kedro wraps what a dataset raises, so causes are searched too. A ``ValueError`` that Kedro's pipeline filter raises is a misspelt
    node, tag or namespace.
    """
    from kedro.validation import ParameterValidationError

    # Only a loop that ran can have stopped: without it, an error message need not wait for torch.
    loop = sys.modules.get("hypersd_pipeline.training.loop")
    told = (UserError, ParameterValidationError, *([loop.TrainingStopped] if loop else []))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, told):
            return " ".join(str(cause).split())
        cause = cause.__cause__
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else ""
    if isinstance(error, ValueError) and Path(raised_in).parts[-3:] == ("kedro", "pipeline", "pipeline.py"):
        return " ".join(str(error).split())
    return None


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, and an interrupt closes the open MLflow runs as FAILED."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        from hypersd_pipeline.hooks import fail_open_runs

        fail_open_runs()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


class ReadableCommand(click.Command):
    """A command whose user errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback; `readable` decides which exceptions are printed without a traceback."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            sentence = readable(error)
            if sentence is None:
                raise
            raise click.ClickException(sentence) from error


def _run(**options: Any) -> Any:
    """Run the pipeline (Kedro's own command, with both spellings of ``--pipelines`` and checks of the names)."""
    from hypersd_pipeline import checks

    if options["pipeline"] and not options["pipelines"]:
        options["pipelines"], options["pipeline"] = [options["pipeline"]], None
    checks.check_pipelines(options["pipelines"] or [])
    conf = Path(options["conf_source"] or settings.CONF_SOURCE)
    checks.check_environment(conf, options["env"] or os.getenv("KEDRO_ENV"))
    assert kedro_run.callback is not None
    return kedro_run.callback(**options)


@click.group(context_settings=_CONTEXT, name="hypersd")
def cli() -> None:
    """Commands of this project."""


run = ReadableCommand("run", callback=_run, params=kedro_run.params, help=kedro_run.help, context_settings=_CONTEXT)
_describe = kedro_catalog.commands["describe-datasets"]
_list = ReadableCommand("list", callback=_describe.callback, params=_describe.params, help=_describe.help)
catalog = click.Group("catalog", commands={**kedro_catalog.commands, "list": _list}, help=kedro_catalog.help)
cli.add_command(run)
cli.add_command(catalog)

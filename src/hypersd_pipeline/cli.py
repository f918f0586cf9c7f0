"""Commands that ``kedro`` finds here: ``run`` with readable errors, ``repro``, ``compare``, ``catalog list``, ``options`` and others."""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from kedro.framework.cli.catalog import catalog as kedro_catalog
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.project import settings

from hypersd_pipeline.errors import UserError, storage_fault
from hypersd_pipeline.masking import masked

_CONTEXT = {"help_option_names": ["-h", "--help"]}


def readable(error: BaseException) -> str | None:
    """The sentence to print for `error` instead of a traceback. None for a fault of the program.

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
            return masked(" ".join(str(cause).split()))
        cause = cause.__cause__
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename if error.__traceback__ else ""
    if isinstance(error, ValueError) and Path(raised_in).parts[-3:] == ("kedro", "pipeline", "pipeline.py"):
        return masked(" ".join(str(error).split()))
    fault = storage_fault(error)
    return masked(fault) if fault else None


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, and whatever ends the command closes the open MLflow runs as FAILED."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException:
        if hooks := sys.modules.get("hypersd_pipeline.hooks"):
            hooks.fail_open_runs()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


class ReadableCommand(click.Command):
    """A command whose user errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback. `readable` decides which exceptions are printed without a traceback."""
        try:
            with _terminable():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            sentence = readable(error)
            if sentence is None:
                text = masked("".join(traceback.format_exception(error)))
                click.echo(text, err=True, nl=False)
                raise click.exceptions.Exit(1) from error
            raise click.ClickException(sentence) from error


def _run(**options: Any) -> Any:
    """Run the pipeline (Kedro's own command, with both spellings of ``--pipelines`` and checks of the names)."""
    from hypersd_pipeline import checks

    if options["pipeline"] and not options["pipelines"]:
        options["pipelines"], options["pipeline"] = [options["pipeline"]], None
    checks.check_pipelines(options["pipelines"] or [])
    checks.check_runner(options["runner"], options["is_async"] or bool((options.get("runner_params") or {}).get("is_async")))
    checks.check_processes(os.environ)
    conf = Path(options["conf_source"] or settings.CONF_SOURCE)
    checks.check_environment(conf, options["env"] or os.getenv("KEDRO_ENV"))
    assert kedro_run.callback is not None
    if "retrain" in (options["pipelines"] or []):
        return _retrain(options)
    return kedro_run.callback(**options)


def _retrain(options: dict[str, Any]) -> Any:
    """Run the pipeline, tell the webhook what became of it, and end with 0 (promoted), 10 (kept) or 1 (failed)."""
    from hypersd_pipeline.io.webhook import notify

    assert kedro_run.callback is not None
    try:
        result = kedro_run.callback(**options)
    except Exception as error:
        notify({"outcome": "failed", "exit_code": 1, "reasons": [readable(error) or f"A fault of the program: {type(error).__name__}."]})
        raise
    if "retrain_decision" not in result:  # a part of the pipeline
        return result
    report = result["retrain_decision"].load()
    for reason in report["reasons"]:
        click.echo(reason)
    notify(report)
    if report["exit_code"]:
        raise click.exceptions.Exit(report["exit_code"])
    return result


def _with_lists(split: Callable[..., Any]) -> Callable[..., Any]:
    """Kedro's reading of ``--params`` splits at every comma. This one leaves lists whole: ``compare.runs=[a,b],compare.seed=1``."""

    def read(context: click.Context, option: click.Parameter, value: Any) -> Any:
        from omegaconf import OmegaConf

        if not isinstance(value, str) or "[" not in value:
            return split(context, option, value)
        parts = [part.strip() for part in re.split(r",(?![^\[]*\])", value) if part.strip()]
        for part in parts:
            split(context, option, part.partition("[")[0])  # its complaint about a part without a key
        return OmegaConf.to_container(OmegaConf.from_dotlist(parts))

    return read


def _readable_params() -> list[click.Parameter]:
    """The options of Kedro's own ``run``, of which ``--params`` takes lists."""
    found = [copy.copy(option) for option in kedro_run.params]
    for option in found:
        if option.name == "params" and option.callback is not None:
            option.callback = _with_lists(option.callback)
    return found


@click.group(context_settings=_CONTEXT, name="hypersd")
def cli() -> None:
    """Commands of this project."""


def _options(section: str, env: str | None) -> None:
    """Every option below SECTION of conf/ (such as tscd_k4.stage): its value, and the file that sets it."""
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    from hypersd_pipeline.config_loader import ProjectConfigLoader
    from hypersd_pipeline.options import options

    root = find_kedro_project(Path.cwd()) or Path.cwd()
    with KedroSession.create(project_path=root, env=env) as session:
        loader = session._get_config_loader()  # type: ignore[attr-defined]
        assert isinstance(loader, ProjectConfigLoader)
        lines = options(loader, root, section)
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    for key, value, where in lines:
        click.echo(f"{key:{widths[0]}}  {value:{min(widths[1], 40)}}  {where}")


def _send(env: str | None) -> None:
    """Send to MLflow what earlier runs recorded while the server was away."""
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    from hypersd_pipeline.hooks import send_journals

    with KedroSession.create(project_path=find_kedro_project(Path.cwd()) or Path.cwd(), env=env) as session:
        click.echo(send_journals(session.load_context()))  # type: ignore[attr-defined]


def _clean(env: str | None, delete: bool) -> None:
    """List the checkpoints that no run needs to continue, and delete them with --delete.

    Of each stage the newest checkpoint is kept. The others are older ones, and those of other configurations.
    """
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    from hypersd_pipeline.config_loader import ProjectConfigLoader
    from hypersd_pipeline.files import remove, size_of
    from hypersd_pipeline.training.checkpoints import superfluous

    root = find_kedro_project(Path.cwd()) or Path.cwd()
    with KedroSession.create(project_path=root, env=env) as session:
        loader = session._get_config_loader()  # type: ignore[attr-defined]
        assert isinstance(loader, ProjectConfigLoader)
        folder = root / loader.data_folder("06_models/checkpoints")
    found = [(path, size_of(path)) for path in superfluous(folder)]
    for path, size in found:
        click.echo(f"{size / 1e6:9.1f} MB  {path.relative_to(root)}")
        if delete:
            remove(path)
    total = f"{sum(size for _, size in found) / 1e6:.1f} MB"
    click.echo(f"Deleted {total}." if delete else f"{total} can be deleted; give --delete to do it." if found else "Nothing to delete.")


def _join(env: str | None) -> None:
    """Compute with this machine what `kedro run` on another machine computes with compute.nodes above 1.

    Ends well with Ctrl-C or SIGTERM. That is how a scheduler ends it when the run is over.
    """
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    from hypersd_pipeline.config_loader import ProjectConfigLoader
    from hypersd_pipeline.training.processes import join

    root = find_kedro_project(Path.cwd()) or Path.cwd()
    with KedroSession.create(project_path=root, env=env) as session:
        loader = session._get_config_loader()  # type: ignore[attr-defined]
        assert isinstance(loader, ProjectConfigLoader)
        folder = root / loader.data_folder("06_models/checkpoints")
    try:
        click.echo("Waiting for what `kedro run` computes on several machines. Ctrl-C ends this.", err=True)
        join(folder)
    except KeyboardInterrupt:
        click.echo("This machine takes part no more.", err=True)


def _compare(runs: tuple[str, ...], model: str | None, env: str | None) -> None:
    """Which is better? Compare RUNS with the first of them: ids or names in MLflow, or data folders. Writes a page and its verdict."""
    arguments = ["--pipelines", "compare", *(["--env", env] if env else [])]
    with kedro_run.make_context("run", arguments) as context:
        options = dict(context.params)
    _run(**options | {"params": {"compare": {"runs": list(runs)} | ({"model": model} if model else {})}})


def _repro(env: str | None, arguments: tuple[str, ...]) -> None:
    """Run what is out of date, with DVC: `dvc repro` for any environment. ARGUMENTS are stages and options of `dvc repro`.

    For an environment it first writes conf/<environment>/dvc.yaml, where DVC finds its stages.
    """
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    from hypersd_pipeline import checks
    from hypersd_pipeline.config_loader import ProjectConfigLoader
    from hypersd_pipeline.dvc_stages import repro

    root = find_kedro_project(Path.cwd()) or Path.cwd()
    checks.check_environment(Path(settings.CONF_SOURCE), env)
    with KedroSession.create(project_path=root, env=env) as session:
        loader = session._get_config_loader()  # type: ignore[attr-defined]
        assert isinstance(loader, ProjectConfigLoader)
        code = repro(root, loader, arguments)
    if code:
        raise click.exceptions.Exit(code)


def _rollback(env: str | None) -> None:
    """Make the version the champion again whose place the champion took. Once more: the one before that."""
    from kedro.framework.session import KedroSession
    from kedro.utils import find_kedro_project

    with KedroSession.create(project_path=find_kedro_project(Path.cwd()) or Path.cwd(), env=env) as session:
        models = session.load_context().catalog.load("model_registry")  # type: ignore[attr-defined]
    was, now = models.rollback()
    click.echo(f"{models.name}: version {now} is the champion again, instead of version {was}.")


run = ReadableCommand("run", callback=_run, params=_readable_params(), help=kedro_run.help, context_settings=_CONTEXT)
_describe = kedro_catalog.commands["describe-datasets"]
_list = ReadableCommand("list", callback=_describe.callback, params=_describe.params, help=_describe.help)
catalog = click.Group("catalog", commands={**kedro_catalog.commands, "list": _list}, help=kedro_catalog.help)
cli.add_command(run)
cli.add_command(
    ReadableCommand(
        "options",
        callback=_options,
        params=[click.Argument(["section"]), click.Option(["--env", "-e"], help="Environment in conf/.")],
        help=_options.__doc__,
        context_settings=_CONTEXT,
    )
)
cli.add_command(catalog)
_env = click.Option(["--env", "-e"], help="Environment in conf/.")
_send_command = ReadableCommand("send", callback=_send, params=[_env], help=_send.__doc__, context_settings=_CONTEXT)
cli.add_command(ReadableCommand("rollback", callback=_rollback, params=[_env], help=_rollback.__doc__, context_settings=_CONTEXT))
cli.add_command(ReadableCommand("join", callback=_join, params=[_env], help=_join.__doc__, context_settings=_CONTEXT))
cli.add_command(
    ReadableCommand(
        "compare",
        callback=_compare,
        params=[
            click.Argument(["runs"], nargs=-1),
            click.Option(["--model"], help="Which model of the runs, such as k4. Unless given, the last stage that all have."),
            _env,
        ],
        help=_compare.__doc__,
        context_settings=_CONTEXT,
    )
)
cli.add_command(
    ReadableCommand(
        "repro",
        callback=_repro,
        params=[_env, click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        help=_repro.__doc__,
        context_settings={**_CONTEXT, "ignore_unknown_options": True},
    )
)
cli.add_command(click.Group("tracking", commands={"send": _send_command}, help="What is recorded in MLflow."))
cli.add_command(
    ReadableCommand(
        "clean",
        callback=_clean,
        params=[_env, click.Option(["--delete"], is_flag=True, help="Delete what is listed.")],
        help=_clean.__doc__,
        context_settings=_CONTEXT,
    )
)

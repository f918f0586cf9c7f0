"""``python -m hypersd_pipeline`` and ``hypersd-pipeline``: the same as ``kedro run``. ``hypersd``: the project's commands."""

from pathlib import Path
from typing import Any


def main(*args: Any, **kwargs: Any) -> Any:
    """Run the pipeline of the Kedro project that holds the working folder. Arguments as ``kedro run``."""
    _bootstrap()
    from kedro.framework.cli.utils import find_run_command

    return find_run_command("hypersd_pipeline")(*args, **kwargs)


def commands(*args: Any, **kwargs: Any) -> Any:
    """The project's own commands, such as ``hypersd compare``, for the Kedro project that holds the working folder."""
    _bootstrap()
    from hypersd_pipeline.cli import cli

    return cli(*args, **kwargs)


def _bootstrap() -> None:
    try:
        from kedro.framework.startup import bootstrap_project
        from kedro.utils import find_kedro_project
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing; install it with pip install 'hypersd-pipeline[all]'.") from None
    bootstrap_project(find_kedro_project(Path.cwd()) or Path(__file__).parents[2])


if __name__ == "__main__":
    main()

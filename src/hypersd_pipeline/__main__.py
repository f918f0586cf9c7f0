"""``python -m hypersd_pipeline`` and ``hypersd-pipeline``: the same as ``kedro run``."""

from pathlib import Path
from typing import Any


def main(*args: Any, **kwargs: Any) -> Any:
    """Run the pipeline of the Kedro project that holds the working folder. Arguments as ``kedro run``."""
    try:
        from kedro.framework.cli.utils import find_run_command
        from kedro.framework.startup import bootstrap_project
        from kedro.utils import find_kedro_project
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing; install it with pip install 'hypersd-pipeline[all]'.") from None
    bootstrap_project(find_kedro_project(Path.cwd()) or Path(__file__).parents[2])
    return find_run_command("hypersd_pipeline")(*args, **kwargs)


if __name__ == "__main__":
    main()

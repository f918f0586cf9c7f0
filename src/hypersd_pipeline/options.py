"""Every option of a section of ``conf/``: its value in an environment, and where it is set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kedro.framework.project import pipelines
from kedro.validation import TypeExtractor
from pydantic import BaseModel

from hypersd_pipeline.config_loader import ProjectConfigLoader, lookup
from hypersd_pipeline.errors import UserError

DEFAULT = "default"


def options(loader: ProjectConfigLoader, root: Path, section: str) -> list[tuple[str, str, str]]:
    """A line for each option below `section`: the key, its value, and the file that sets it, or `DEFAULT`.

    Args:
        section: a typed section such as ``tscd_k4.stage``, one above several of them, or a key inside one.

    Raises:
        UserError: there is no such section. The known ones are named.
    """
    pipelines.set_requested(None)
    models = TypeExtractor(dict(pipelines)).extract_types_from_pipelines()
    parameters, asked = loader["parameters"], section.split(".")
    lines = []
    for key, model in sorted(models.items()):
        path = key.split(".")
        given = lookup(parameters, path)
        if path[: len(asked)] != asked[: len(path)] or given is None or not issubclass(model, BaseModel):
            continue
        values = model.model_validate(given).model_dump(mode="json")
        for leaf, value in _leaves(values):
            if [*path, *leaf][: len(asked)] == asked:
                known = lookup(given, leaf[:-1])
                is_set = isinstance(known, Mapping) and leaf[-1] in known
                lines.append((".".join([*path, *leaf]), json.dumps(value), loader.source([*path, *leaf], root) if is_set else DEFAULT))
    if not lines:
        raise UserError(f"There is no section '{section}' in conf/; choose one of {', '.join(sorted(models))}.")
    return lines


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield [*above, key], value

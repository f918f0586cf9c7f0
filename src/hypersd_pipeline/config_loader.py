"""The project's configuration loader: environments that extend others, sections that are like others, a data folder per environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hypersd_pipeline import config_faults, sections
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.sections import LIKE

EXTENDS = "extends"
_LOCAL = "local"
_RUNTIME = re.compile(r"runtime_params:\s*([A-Za-z_]\w*)")
_Path = tuple[str, ...]


class ProjectConfigLoader(OmegaConfigLoader):
    """Kedro's `OmegaConfigLoader` with three additions.

    - ``extends: sdxl`` or ``extends: [sdxl, trial]`` at the top of an environment's parameters file: those environments are laid over
      base first, then the environment itself. Each overrides the ones before it. It holds for parameters, catalog and every other pattern.
    - ``like: tscd`` in a section of parameters: the section is a copy of ``tscd`` in which its own keys override. It is done after all
      environments and ``--params`` are merged.
    - ``${data:06_models}`` in any file: a path in the folder that the environment writes to, ``data`` or ``data/<environment>``.
      ``${environment:}`` is its name, and ``${conf_source:}`` the folder of all environments.
    """

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The merged configuration of the pattern `key`.

        Raises:
            UserError: for a file that cannot be read, a section that stands twice, an interpolation, an ``extends`` or a ``like`` that
                leads nowhere.
        """
        # Resolvers are global: another loader may have registered its own environment.
        OmegaConf.register_new_resolver("data", self.data_folder, replace=True)
        OmegaConf.register_new_resolver("environment", lambda: self.env or self.base_env, replace=True)
        OmegaConf.register_new_resolver("conf_source", lambda: str(self.conf_source), replace=True)
        try:
            if key == "catalog":
                return _with_layers(super().__getitem__(key), self.data_folder())
            if key != "parameters" or key in self:
                return super().__getitem__(key)
            parameters = self._parameters_with_likes
            return _Likes(parameters, self.source).expand(parameters)
        except (UserError, MissingConfigException):
            raise
        except Exception as error:  # kedro, omegaconf and yaml have a dozen classes for what stands in a file
            raise self._fault(key, error) or error from error

    @cached_property
    def environments(self) -> list[str]:
        """Base, the environments that the run's own one extends, and itself: each overrides the ones before it.

        Raises:
            UserError: for an ``extends`` that cannot be followed.
        """
        if EXTENDS in self.runtime_params:
            raise UserError(f"--params: {EXTENDS}: only a parameters file can extend environments; write it into your environment's.")
        own = self.env or self.default_run_env
        return [self.base_env, *(self._with_extended((own,)) if own not in ("", self.base_env) else [])]

    def source(self, path: list[str], root: Path | None = None) -> str:
        """``--params``, or the file that sets the parameter at `path` or the nearest key above it, relative to `root` (the working folder).

        An environment overrides the ones that it extends, and those override base. Where a section is ``like`` another, its own keys
        are looked for first.
        """
        likes = self._parameters_with_likes
        for depth in range(len(path), 0, -1):
            for place in _places(likes, path[:depth]):
                if depth == len(path) and _has(self.runtime_params, place):
                    return "--params"
                for file, values in self.parameter_files:
                    if _has(values, place):
                        return _relative(file, root)
        return f"{Path(self.conf_source).name}/{self.base_env}"

    def place(self, key: str, *path: str) -> str:
        """The file of the pattern `key` that sets `path`, with the line. ``conf`` where none does."""
        for env in reversed(self.environments):
            for file in self._files_of(key, env):
                if line := config_faults.line_of(file, path):
                    return f"{_relative(file)}: line {line}"
        return Path(self.conf_source).name

    def named_elsewhere(self) -> Iterator[tuple[str, ...]]:
        """Paths of parameters that are read by other means than a pipeline's input: ``like``, interpolations, ``runtime_params``."""
        for _, values in self.parameter_files:
            yield from sections.named_elsewhere(values)
        yield from sections.named_elsewhere(self.runtime_params)
        for key in self.config_patterns:
            for env in self.environments:
                for file in self._files_of(key, env):
                    yield from ((name,) for name in _RUNTIME.findall(file.read_text(encoding="utf-8")))

    def _fault(self, key: str, error: Exception) -> UserError | None:
        """What is wrong with the files of the pattern `key`, which could not be loaded. None where it is none of their faults."""
        names = self._environments_if_readable()
        groups = [(pattern, self._files_of(pattern, env)) for pattern in dict.fromkeys([key, "parameters"]) for env in names]
        # whatever is loaded, the parameters are read for the environments that are extended
        everywhere = [path for _, paths in groups for path in paths]
        for path in everywhere:
            if fault := config_faults.syntax_fault(path):
                return UserError(f"{_relative(path)}: {fault}.")
        found = [config_faults.twice(paths, merged=pattern == "parameters") for pattern, paths in groups]
        found += [config_faults.unresolved(everywhere, error)] if isinstance(error, OmegaConfBaseException) else []
        for path, fault in filter(None, found):
            return UserError(f"{_relative(path)}: {fault}.")
        if isinstance(error, OmegaConfBaseException | ValueError | TypeError):
            return UserError(f"{self.conf_source}: the {key} cannot be read ({_first_line(error)}); correct that.")
        return None

    def _files_of(self, key: str, env: str) -> list[Path]:
        """The files of an environment that fit a pattern, as Kedro finds them."""
        folder = Path(self._get_conf_env_path(env))
        found = {path for pattern in self.config_patterns.get(key, []) for path in folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and path.suffix in (".yml", ".yaml", ".json"))

    def _environments_if_readable(self) -> list[str]:
        try:
            return self.environments
        except Exception:  # what names the extended ones may be the file that is broken
            return [self.base_env, *filter(None, [self.env or self.default_run_env])]

    def data_folder(self, below: str = "") -> str:
        """The folder that the environment writes to, or a path in it, relative to the project."""
        folder = "data" if self.env in (None, "", self.base_env, _LOCAL) else f"data/{self.env}"
        return f"{folder}/{below}" if below else folder

    @cached_property
    def _parameters_with_likes(self) -> dict[str, Any]:
        parameters = super().__getitem__("parameters")
        parameters.pop(EXTENDS, None)
        return parameters

    def _read_raw_config(self, key: str) -> Any:
        """As Kedro's, and read the extended environments for `_merge_configs`."""
        base, own, base_path, own_path, files = super()._read_raw_config(key)
        if key == "parameters":
            _check_base(base)
        self._extended: dict[str, dict[Path, DictConfig]] = {}
        for name in self.environments[1:-1]:
            path = self._get_conf_env_path(name)
            self._extended[path] = self._read_dir_configs(path, self.config_patterns[key], key, files, key == "credentials")
        return base, own, base_path, own_path, files

    def _merge_configs(self, config: dict[str, Any], env_config: dict[str, Any], key: str, env_path: str) -> Any:
        """Lay the extended environments over `config` in order, then the run's own `env_config`.

        A section that one extended environment sets to null stays null in the next, such as a term in ``extends: [mine, trial]``.
        """
        base = config
        for path, files in self._extended.items():
            config = super()._merge_configs(config, _without_null_sections(self._merge_and_resolve(key, files), config, base), key, path)
        return super()._merge_configs(config, env_config, key, env_path)

    def _with_extended(self, chain: tuple[str, ...]) -> list[str]:
        """The last environment of `chain` after all that it extends, each once. The others of `chain` led to it."""
        found: list[str] = []
        for name in self._extended_by(chain):
            found += [env for env in self._with_extended((*chain, name)) if env not in found]
        return [*found, chain[-1]]

    def _extended_by(self, chain: tuple[str, ...]) -> list[str]:
        for file, values in self._raw_parameters(chain[-1]):
            if EXTENDS in values:
                given = values[EXTENDS]
                names = [given] if isinstance(given, str) and given else given
                problem = self._problem(names, chain)
                if problem:
                    raise UserError(f"{_relative(file)}: {EXTENDS}: {problem}.")
                return names
        return []

    def _problem(self, names: Any, chain: tuple[str, ...]) -> str | None:
        """Why the environment at the end of `chain` cannot extend `names`, with the cure."""
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            return f"{names!r} is no name and no list of names; write for instance `extends: sdxl` or `extends: [sdxl, trial]`"
        for name in names:
            if name == self.base_env:
                return f"'{name}' is below every environment already; remove it"
            if name == _LOCAL:
                return f"'{name}' cannot be extended, since it belongs to runs without an environment; remove it"
            if "/" in name or "\\" in name:
                return f"'{name}' is a path; write only the name of a folder in {self.conf_source}"
            if name in chain:
                circle = " -> ".join([*chain[chain.index(name) :], name])
                return f"the environments extend each other in a circle ({circle}); remove '{name}' here"
            if name not in self._known():
                others = ", ".join(known for known in self._known() if known not in chain)
                return f"there is no environment '{name}'; choose one of {others}"
        return None

    def _known(self) -> list[str]:
        """Names of the environments that can be extended."""
        folders = [path for path in self._fs.ls(self._get_conf_env_path(""), detail=False) if self._fs.isdir(path)]
        names = sorted(Path(folder).name for folder in folders)
        return [name for name in names if name not in (self.base_env, _LOCAL) and not name.startswith(".")]

    def _raw_parameters(self, env: str) -> list[tuple[Path, dict[str, Any]]]:
        """The parameters files of `env` and what is written in them."""
        files = self._read_dir_configs(self._get_conf_env_path(env), self.config_patterns["parameters"], "parameters", set())
        return [(file, OmegaConf.to_container(files[file], resolve=False)) for file in sorted(files)]  # type: ignore[misc]

    @cached_property
    def parameter_files(self) -> list[tuple[Path, dict[str, Any]]]:
        """All parameters files with what is written in them, those that override first."""
        return [found for env in reversed(self.environments) for found in self._raw_parameters(env)]


@dataclass(frozen=True)
class _Likes:
    """Replaces each ``like`` of `parameters`. `source` names the file that sets a path."""

    parameters: dict[str, Any]
    source: Callable[[list[str]], str]

    def expand(self, value: Any, path: _Path = (), waiting: Mapping[_Path, str] = MappingProxyType({})) -> Any:
        """A deep copy of `value`, which is at `path`, without ``like``.

        Args:
            value: what to copy.
            path: where it is.
            waiting: the sections that are being expanded and need it, with what each is like.

        Raises:
            UserError: for a ``like`` that names no section or leads back to its own.
        """
        if isinstance(value, list):
            return [self.expand(item, (*path, str(number)), waiting) for number, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if LIKE not in value:
            return {key: self.expand(item, (*path, str(key)), waiting) for key, item in value.items()}
        if path in waiting:
            raise self._error(path, f"the sections are like each other in a circle ({_circle(path, waiting)}); name another section")
        own = self.expand({key: item for key, item in value.items() if key != LIKE}, path, waiting)
        return _merged(self._named(value[LIKE], path, waiting), own)

    def _named(self, name: Any, path: _Path, waiting: Mapping[_Path, str]) -> dict[str, Any]:
        """The expanded section `name`, which the section at `path` is like."""
        if not isinstance(name, str) or not name:
            raise self._error(path, f"{name!r} is no name; write the dotted path of a section, for instance `like: tscd`")
        waiting = {**waiting, path: name}
        value: Any = self.parameters
        parts = tuple(name.split("."))
        for depth, part in enumerate(parts):
            if LIKE in value:  # `part` may come from the section that this one is like
                value = self.expand(value, parts[:depth], waiting)
            if part not in value:
                known = sorted(str(key) for key, item in value.items() if isinstance(item, dict))
                cure = sections.nearest(part, known, "choose one of", "correct the path")
                raise self._error(path, f"there is no section '{'.'.join(parts[: depth + 1])}'; {cure}")
            value = value[part]
            if not isinstance(value, dict):
                raise self._error(path, f"'{'.'.join(parts[: depth + 1])}' is a value; name the section that it is in")
        return self.expand(value, parts, waiting)

    def _error(self, path: _Path, problem: str) -> UserError:
        key = [*path, LIKE]
        return UserError(f"{self.source(key)}: {'.'.join(key)}: {problem}{'' if problem.endswith('?') else '.'}")


def _circle(path: _Path, waiting: Mapping[_Path, str]) -> str:
    """Such as ``a.x -> b -> a.x``: from the section at `path` back to it."""
    holders = list(waiting)
    holders = holders[holders.index(path) :]
    names = [".".join(holder) or "all parameters" for holder in holders]
    steps: list[str] = []
    for name, holder, following in zip(names, holders, [*names[1:], names[0]], strict=True):
        steps += [name] if waiting[holder] == following else [name, waiting[holder]]
    return " -> ".join([*steps, names[0]])


def _with_layers(catalog: dict[str, Any], data: str) -> dict[str, Any]:
    """The catalog's entries with the layer in which `kedro viz` draws them: the folder of the data folder that they lie in.

    Layers have to follow each other. What belongs to one stage, such as its checkpoints and its curve, is in none.
    """
    found = {}
    for name, entry in catalog.items():
        path = str(entry.get("filepath") or entry.get("path") or "") if isinstance(entry, Mapping) else ""
        layer = re.match(rf"{re.escape(data)}/\d\d_(\w+)", path)
        if layer and "." not in name:
            shown = {"kedro-viz": {"layer": layer[1].replace("_", " ")}}
            entry = {**entry, "metadata": {**shown, **(entry.get("metadata") or {})}}
        found[name] = entry
    return found


def _places(parameters: dict[str, Any], path: list[str], used: tuple[list[str], ...] = ()) -> Iterator[list[str]]:
    """`path`, then where else its value may come from: the same key of the section that a section above it is ``like``, and so on."""
    yield path
    for depth in range(len(path) - 1, 0, -1):
        section = lookup(parameters, path[:depth])
        name = section.get(LIKE) if isinstance(section, dict) else None
        if isinstance(name, str) and path[:depth] not in used:
            yield from _places(parameters, [*name.split("."), *path[depth:]], (*used, path[:depth]))


def _check_base(files: dict[Path, DictConfig]) -> None:
    for file, values in files.items():
        if EXTENDS in values:
            raise UserError(f"{_relative(file)}: {EXTENDS}: the base configuration is below every environment; remove the key.")


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over`: sections key by key, anything else as a whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _without_null_sections(over: dict[str, Any], under: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`over` without the sections that are null in `under` and are not in `base`."""
    found = {}
    for key, value in over.items():
        below, before = under.get(key), base.get(key)
        if isinstance(value, dict) and key in under and below is None and before is not None:
            continue
        if isinstance(value, dict) and isinstance(below, dict):
            value = _without_null_sections(value, below, before if isinstance(before, dict) else {})
        found[key] = value
    return found


def lookup(values: Any, path: list[str]) -> Any:
    """What is at `path` of nested mappings, or None."""
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _has(values: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(values, dict):
            return False
        named = {str(key): value for key, value in values.items()}
        if part not in named:
            return False
        values = named[part]
    return True


def _relative(file: Path, root: Path | None = None) -> str:
    folder = root or Path.cwd()
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200]

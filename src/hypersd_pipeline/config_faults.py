"""What is wrong with the files of ``conf/``, as one sentence with file and line: looked for only after the loader has failed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

_FORMS = {"sequence": "a list", "scalar": "a single value"}


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ValueError: it cannot be read as UTF-8. The message is the sentence's second half.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: is no UTF-8; save the file in that encoding") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); correct its permissions") from error


def syntax_fault(path: Path) -> str | None:
    """Why a file cannot be read as a mapping, with its line and the cure. None where it can."""
    try:
        text = read_text(path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # tags that would run code, dates that are none
    except ValueError as error:
        return str(error)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        return f"{line}is no YAML, {error.problem or error.context}; correct it"
    except yaml.YAMLError as error:  # a character that YAML forbids
        return f"is no YAML, {' '.join(str(error).split())[:120]}; correct it"
    except RecursionError:
        return "is nested too deeply; write it flatter"
    if node is None:
        return None
    if not isinstance(node, yaml.MappingNode):
        return f"line {node.start_mark.line + 1}: holds {_FORMS.get(node.id, 'no')} instead of sections; write `name: value` lines"
    return _repeated(node)


def _repeated(node: yaml.Node, above: tuple[str, ...] = ()) -> str | None:
    """A key that stands twice in one section, with both lines."""
    lines: dict[str, int] = {}
    for key, value in _items(node):
        name = str(key.value)
        if name in lines and name != "<<":
            path = ".".join([*above, name])
            return f"line {key.start_mark.line + 1}: '{path}' stands in line {lines[name]} already; remove one of them"
        lines[name] = key.start_mark.line + 1
        if fault := _repeated(value, (*above, name)):
            return fault
    return None


def _items(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        return list(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [(yaml.ScalarNode("", str(i), item.start_mark), item) for i, item in enumerate(node.value)]
    return []


def twice(paths: Sequence[Path], *, merged: bool) -> tuple[Path, str] | None:
    """What two files of one environment both set: the second file, and the rest of the sentence.

    Args:
        merged: sections of several files are laid over each other, as those of parameters. Only single values may not be set twice.
    """
    seen: dict[str, tuple[Path, int]] = {}
    for path in sorted(paths):
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for name, line in _set_keys(node, (), merged) if node is not None else ():
            if name in seen and seen[name][0] != path and not name.startswith("_"):
                other, first = seen[name]
                return path, f"line {line}: '{name}' is set in {other.name}, line {first}, too; remove one of them"
            seen.setdefault(name, (path, line))
    return None


def _set_keys(node: yaml.Node, above: tuple[str, ...], merged: bool) -> Iterator[tuple[str, int]]:
    for key, value in _items(node):
        if merged and isinstance(value, yaml.MappingNode):
            yield from _set_keys(value, (*above, str(key.value)), merged)
        else:
            yield ".".join([*above, str(key.value)]), key.start_mark.line + 1


def unresolved(paths: Sequence[Path], error: Exception) -> tuple[Path, str] | None:
    """The interpolation that OmegaConf complains of: its file, and the rest of the sentence."""
    told = " ".join(str(error).split("\n")[0].split())
    wanted = str(getattr(error, "full_key", "") or "")
    found = [(path, name, value) for path in sorted(paths) for name, value in _interpolations(path)]
    found = [item for item in found if item[1] == wanted] or [item for item in found if _named(told) in str(item[2].value)]
    if not found:
        return None
    path, name, value = found[-1]
    return path, f"line {value.start_mark.line + 1}: {name}: {value.value!r} leads nowhere ({told}); correct it"


def _named(told: str) -> str:
    """What stands in quotes in OmegaConf's message: the key that it did not find."""
    return told.split("'")[1] if told.count("'") > 1 else "${"


def _interpolations(path: Path) -> Iterator[tuple[str, yaml.ScalarNode]]:
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    yield from _scalars(node, ()) if node is not None else ()


def _scalars(node: yaml.Node, above: tuple[str, ...]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode) and "${" in str(node.value):
        yield ".".join(above), node
    for key, value in _items(node):
        yield from _scalars(value, (*above, str(key.value)))


def line_of(path: Path, keys: Sequence[str]) -> int | None:
    """The line of a key, or of the nearest key above it, in a file that can be read. None where it has neither."""
    node: Any = yaml.compose(io.StringIO(path.read_text(encoding="utf-8")), Loader=yaml.SafeLoader)
    line = None
    for name in keys:
        found = [(key, value) for key, value in _items(node) if str(key.value) == name] if node is not None else []
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line

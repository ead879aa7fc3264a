"""YAML 1.2 text to plain data with the line and column of every value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from toolkit.errors import Problem, RecipeError

MAX_BRACKETS = 100
Path = tuple[str | int, ...]

# Everything else (dates, sets, binary, python objects) has no place in a recipe.
# A recipe nests three or four deep.
MAX_BRACKETS = 100
SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


@dataclass(frozen=True)
class Document:
    """A parsed YAML document.

    Attributes:
        source: What to call it in messages: the file name or ``command line``.
        data: Plain dicts, lists and scalars.
        positions: ``LINE:COLUMN`` (from 1) of the value at each path.
    """

    source: str
    data: Any
    positions: dict[Path, str]

    def where(self, path: Path) -> str:
        """Return ``FILE:LINE:COLUMN`` of the value at ``path`` or its nearest parent."""
        for end in range(len(path), 0, -1):
            if position := self.positions.get(path[:end]):
                return f"{self.source}:{position}"
        return self.source


def parse_yaml(text: str, *, source: str) -> Document:
    """Parse one YAML document without running any tag and without expanding aliases.

    Raises:
        RecipeError: On a syntax error, a duplicate key, an anchor, or a tag, with its line.
    """
    try:
        _check_brackets(text)
        node = YAML(typ="safe", pure=True).compose(text)
        reader = _Reader(source)
        data = None if node is None else reader.read(node, ())
    except RecursionError:
        raise RecipeError(Problem(source, "", "nested too deeply", "sections of plain keys and values")) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise RecipeError(Problem(where, "", f"not valid YAML: {error.problem}", _syntax_hint(error))) from error
    except YAMLError as error:
        raise RecipeError(Problem(source, "", f"not valid YAML: {error}")) from error
    if reader.problems:
        raise RecipeError(reader.problems)
    return Document(source, data, reader.positions)


def _check_brackets(text: str) -> None:
    """Refuse what the parser would take seconds to give up on: 3,000 open brackets, 4.7 s."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}" and depth > 0)
        if depth > MAX_BRACKETS:
            raise RecursionError


def _syntax_hint(error: MarkedYAMLError) -> str:
    problem = str(error.problem)
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    if "mapping values" in problem:
        return "one `key: value` per line; quote a value that contains `: `"
    return "a mapping of `key: value` lines"


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.positions: dict[Path, str] = {}
        self._anchored: set[int] = set()
        self._constructor = YAML(typ="safe", pure=True).constructor

    def read(self, node: Node, path: Path) -> Any:
        self.positions[path] = f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        if node.anchor is not None:
            # An alias composes to the anchored node itself: seen again, it is the same problem.
            if id(node) in self._anchored:
                return None
            self._anchored.add(id(node))
            self._report(node, path, f"anchor &{node.anchor}", "write the value out; anchors and aliases are refused")
            return None
        if isinstance(node, MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                self._report(node, path, f"tag {node.tag!r}", "plain values; tags are never run")
                return None
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._read_scalar(node, path)

    def _read_mapping(self, node: MappingNode, path: Path) -> dict[str, Any] | None:
        if node.tag != "tag:yaml.org,2002:map":
            self._report(node, path, f"tag {node.tag!r}", "plain values; tags are never run")
            return None
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._report(key_node, path, "a key that is not a word", "plain keys")
                continue
            key = str(key_node.value)
            if key in data:
                field = (*path, key)
                self._report(key_node, field, f"duplicate key, also on line {lines[key]}", "each key once")
                continue
            lines[key] = line
            data[key] = self.read(value_node, (*path, key))
        return data

    def _read_scalar(self, node: Node, path: Path) -> Any:
        if node.tag not in SCALAR_TAGS:
            # An unquoted date is text here: a recipe has no field that holds one.
            if node.tag == "tag:yaml.org,2002:timestamp":
                return str(node.value)
            self._report(node, path, f"tag {node.tag!r}", "plain values; tags are never run")
            return None
        try:
            return self._constructor.construct_object(node)
        except (ValueError, YAMLError):
            self._report(node, path, f"unreadable value {node.value!r}", "a number or quoted text")
            return None

    def _report(self, node: Node, path: Path, wrong: str, right: str) -> None:
        where = f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.problems.append(Problem(where, ".".join(map(str, path)), wrong, right))

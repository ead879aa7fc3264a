"""One rule between fields of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toolkit.config.document import Path
from toolkit.config.schema import Recipe


@dataclass(frozen=True)
class Rule:
    """A condition between fields.

    Attributes:
        path: The field to point at.
        broken: Whether a recipe breaks the rule.
        wrong: What is wrong.
        right: What would be right.
    """

    path: Path
    broken: Callable[[Recipe], bool]
    wrong: str
    right: str

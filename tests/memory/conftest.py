"""Small shapes of both families, and recipes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from toolkit.config.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe() -> MakeRecipe:
    """A recipe of a method and training settings; base and data are never read."""

    def make(
        method: dict[str, Any], *, bits: int | None = None, head: dict[str, Any] | None = None, **training: Any
    ) -> Recipe:
        sections: dict[str, Any] = {"model": {"base": "x", "head": head}, "data": {"source": "y"}, "method": method}
        sections["training"] = {"epochs": 1, **training}
        sections["quantization"] = None if bits is None else {"bits": bits}
        return Recipe.model_validate(sections)

    return make

"""Sections of a recipe that one objective alone reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from toolkit.config.section import PositiveInt, Section

# Where a template takes the prompt.
PROMPT = "{prompt}"


class LanguageModelingSettings(Section):
    """Settings of objective language_modeling alone."""

    mask_probability: float = Field(
        default=0.15, gt=0, lt=1, description="Share of tokens predicted by a masked model (DistilBERT)."
    )
    target_tokens: PositiveInt | None = Field(
        default=None,
        description="Softmax over this many most frequent tokens; positions whose target is rarer carry no loss.",
    )


class InstructionSettings(Section):
    """Settings of objective instruction alone."""

    template: Annotated[str, Field(min_length=1, max_length=10_000)] = Field(
        default="### Instruction:\n{prompt}\n\n### Response:\n",
        description="What stands around a prompt, in the place of {prompt}; the response follows right behind it.",
    )

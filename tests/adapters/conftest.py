from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import BaseOf, LoadModel, PicoFolder, base_of, batch, minilm, pico_cache, pico_folder

from toolkit.config.schema import QuantizationSettings
from toolkit.models.base import Base
from toolkit.models.load import load_classifier

__all__ = ["base_of", "batch", "minilm", "pico_cache", "pico_folder"]

QUANTIZATIONS = {
    "fp32": None,
    "nf4": QuantizationSettings(),
    "int8": QuantizationSettings(bits=8),
}


@pytest.fixture(params=["gpt2", "distilbert"])
def base(request: pytest.FixtureRequest, pico_cache: PicoFolder, base_of: BaseOf) -> Base:
    found: Base = base_of(pico_cache(request.param))
    return found


@pytest.fixture
def load_model() -> LoadModel:
    """Load a base's classifier afresh."""

    def load(base: Base, *, storage: str = "fp32", seed: int = 1, labels: tuple[str, ...] = ("ham", "spam")) -> Any:
        return load_classifier(
            base, labels=labels, quantization=QUANTIZATIONS[storage], seed=seed, device=torch.device("cpu")
        )

    return load

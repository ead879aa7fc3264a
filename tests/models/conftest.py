from __future__ import annotations

from pico import base_of, batch, minilm, pico_cache, pico_folder

__all__ = ["base_of", "batch", "minilm", "pico_cache", "pico_folder"]

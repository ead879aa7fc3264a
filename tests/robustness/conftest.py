from __future__ import annotations

from pico import pico_cache, pico_folder

__all__ = ["pico_cache", "pico_folder"]

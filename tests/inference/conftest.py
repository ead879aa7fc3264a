from __future__ import annotations

from pico import minilm, pico_cache, pico_folder

__all__ = ["minilm", "pico_cache", "pico_folder"]

from __future__ import annotations

from pico import base_of, pico_cache

__all__ = ["base_of", "pico_cache"]

"""Identity of a model's weights: one hash over every tensor, however the folder shards them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from toolkit.models.headers import read_tensor_headers

CHUNK_BYTES = 1 << 20
ARCHITECTURE_KEYS = (
    "activation",
    "activation_function",
    "classification_head",
    "dim",
    "hidden_dim",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "model_type",
    "n_embd",
    "n_head",
    "n_heads",
    "n_inner",
    "n_layer",
    "n_layers",
    "n_positions",
    "reorder_and_upcast_attn",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sinusoidal_pos_embds",
    "vocab_size",
)


def fingerprint(path: Path, *, weights: bool = True) -> str:
    """Hash every tensor (name, dtype, shape, bytes), sorted by name, and the architecture of config.json.

    Reads in chunks of 1 MiB: memory is constant. Labels, library versions and the cut into shards don't count.

    Args:
        path: Model folder with config.json and safetensors.
        weights: False hashes the architecture alone, for a model that starts from random weights.

    Returns:
        ``sha256:`` and 64 hex digits.

    Raises:
        ModelError: The safetensors files are damaged.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    architecture = {key: config[key] for key in ARCHITECTURE_KEYS if key in config}
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    for name, info in sorted(read_tensor_headers(path).items()) if weights else ():
        digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
        with info.file.open("rb") as handle:
            handle.seek(info.start)
            left = info.stop - info.start
            while left:
                chunk = handle.read(min(CHUNK_BYTES, left))
                digest.update(chunk)
                left -= len(chunk)
    return f"sha256:{digest.hexdigest()}"

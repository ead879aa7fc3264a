"""Fetches a model from the hub: local cache first, then a short probe, then the download."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from toolkit.errors import ModelError, Problem
from toolkit.models.headers import weight_files

PROBE_SECONDS = 3.0
FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
FALSE_WORDS = ("", "0", "false", "no", "off")


class HubUnreachableError(Exception):
    """The hub did not answer, or the network is switched off; the message says which."""


def fetch_snapshot(repo_id: str, *, field: str) -> Path:
    """Return the local folder of a hub model, downloading it only if the cache lacks it.

    Only config, safetensors and tokenizer files are asked for: no pickles, no code.

    Args:
        repo_id: ``owner/name``, or a bare canonical name.
        field: Dotted recipe field, for the error line.

    Returns:
        The snapshot folder in the hub cache.

    Raises:
        ModelError: The hub answers that there is no such model, or that it may not be read.
        HubUnreachableError: No answer within `PROBE_SECONDS`, a server error, or offline mode.
    """
    cached = _cached_snapshot(repo_id)
    if cached is not None:
        return cached
    for variable in ("HF_HUB_OFFLINE", "TOOLKIT_OFFLINE"):
        if os.environ.get(variable, "").strip().lower() not in FALSE_WORDS:
            raise HubUnreachableError(f"{variable} is set and the model is not in the local cache")
    _probe(repo_id, field=field)
    return _download(repo_id)


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _cached_snapshot(repo_id: str) -> Path | None:
    from huggingface_hub import constants

    # The library's documented cache layout; looked at first, because the rest of the library takes 0.3 s to import.
    if not (Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=list(FILES)))
        weight_files(folder)
    except (OSError, ValueError, ModelError):
        # A download that was cut short leaves a snapshot without some of its weights.
        return None
    return folder if (folder / "config.json").is_file() else None


def _probe(repo_id: str, *, field: str) -> None:
    """Ask the hub once for the model's description, in a thread: name look-ups know no timeout."""
    answers: list[int | str] = []
    url = f"{_endpoint()}/api/models/{repo_id}"
    thread = threading.Thread(target=_ask, args=(url, answers), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    answer = answers[0] if answers else f"no answer in {PROBE_SECONDS:g} s"
    if isinstance(answer, str):
        raise HubUnreachableError(answer)
    if answer in (401, 403, 404):
        raise ModelError(
            Problem(
                repo_id,
                field,
                f"the hub answers {answer}: no such model, or it is private",
                "check the spelling; for a private model set HF_TOKEN",
            )
        )
    if answer >= 400:
        raise HubUnreachableError(f"the hub answers {answer}")


def _ask(url: str, answers: list[int | str]) -> None:
    """Append the HTTP status, or the reason why there is none."""
    from huggingface_hub import get_token

    token = get_token()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as response:
            answers.append(int(response.status))
    except urllib.error.HTTPError as error:
        answers.append(error.code)
        error.close()
    except (OSError, ValueError) as error:
        answers.append(str(getattr(error, "reason", error)))


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError's own base is the HTTP client's error, whichever client this version of the library uses.
    client_errors = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx")]
    failures: tuple[type[Exception], ...] = (OSError, *client_errors)
    try:
        folder = snapshot_download(
            repo_id, endpoint=_endpoint(), allow_patterns=list(FILES), etag_timeout=PROBE_SECONDS, max_workers=4
        )
    except failures as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise HubUnreachableError(f"the download failed: {reason[0]}") from error
    return Path(folder)

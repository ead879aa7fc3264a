"""One small file over the network, decided within seconds: it is here and its hash is right, or it is not."""

from __future__ import annotations

import hashlib
import http.client
import logging
import threading
import urllib.error
import urllib.request

logger = logging.getLogger(__name__)

SECONDS = 4.5
MAX_BYTES = 16 << 20


def download(url: str, *, sha256: str, seconds: float = SECONDS) -> bytes | None:
    """Return the bytes behind a URL if they arrive in time and have the right hash, else None.

    Args:
        url: An http or https URL.
        sha256: Expected hash, hex digits.
        seconds: Whole time allowed, name look-up included.
    """
    found: list[bytes] = []
    # A look-up of a name has no timeout of its own, so the wait is bounded from outside; the thread dies with us.
    worker = threading.Thread(target=_fetch, args=(url, seconds, found), daemon=True)
    worker.start()
    worker.join(seconds)
    if not found:
        logger.info("%s: not reached within %s s", url, seconds)
        return None
    if hashlib.sha256(found[0]).hexdigest() != sha256:
        logger.warning("%s: served other bytes than the known set; not used", url)
        return None
    return found[0]


def _fetch(url: str, seconds: float, found: list[bytes]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        logger.info("%s: %s", url, error)
        return
    found.append(content)

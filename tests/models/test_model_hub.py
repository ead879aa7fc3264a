from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pico import PicoFolder

from toolkit.config.schema import ModelSettings
from toolkit.errors import ModelError
from toolkit.models.base import resolve_base

REPO = "someone/pico"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A loopback server that answers the calls of the real huggingface_hub client for one repository."""

    folder: Path
    url: str = ""
    status: int = 200
    seen: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path, _, _ = path.partition("?")
        if self.status != 200:
            return self.status, {}, b""
        files = {file.name: file for file in self.folder.iterdir()}
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            facts = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
        if path.startswith(f"/api/models/{REPO}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                for name, file in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        name = path.rpartition("/")[2]
        if path.startswith(f"/{REPO}/resolve/") and name in files:
            headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT}
            return 200, headers, files[name].read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(pico_folder: PicoFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub(pico_folder("gpt2"))
    (served.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (served.folder / "modeling_evil.py").write_text("raise SystemExit")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path)
            served.seen.append(f"{self.command} {self.path}")
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    point_at(served.url, monkeypatch, tmp_path)
    yield served
    server.shutdown()
    server.server_close()


def point_at(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TOOLKIT_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def settings(base: str = REPO, offline_base: str | None = None) -> ModelSettings:
    return ModelSettings(base=base, offline_base=offline_base, max_length=16)


def test_a_hub_model_is_downloaded_without_pickles_or_code_and_then_cached(hub: Hub) -> None:
    base = resolve_base(settings())
    assert (base.requested, base.used, base.offline, base.name_or_path) == (REPO, REPO, False, REPO)
    assert sorted(file.name for file in base.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert base.fingerprint == resolve_base(settings(str(hub.folder))).fingerprint
    hub.seen.clear()
    assert resolve_base(settings()).path == base.path
    assert hub.seen == []


def test_an_interrupted_download_is_completed(hub: Hub) -> None:
    base = resolve_base(settings())
    (base.path / "model.safetensors").unlink()
    assert (resolve_base(settings()).path / "model.safetensors").is_file()


def test_the_cache_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_base(settings()).path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.status = 500
    assert resolve_base(settings()).path == path


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TOOLKIT_OFFLINE"])
def test_offline_mode_opens_no_socket(hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelError, match=f"{variable} is set and the model is not in the local cache"):
        resolve_base(settings())
    assert hub.seen == []


def test_a_model_the_hub_does_not_know_is_an_error_not_a_stand_in(hub: Hub, pico_cache: PicoFolder) -> None:
    with pytest.raises(ModelError, match="the hub answers 404: no such model"):
        resolve_base(settings("someone/other", offline_base=str(pico_cache("gpt2"))))


def test_a_broken_hub_counts_as_unreachable(hub: Hub, pico_cache: PicoFolder) -> None:
    hub.status = 503
    with pytest.raises(ModelError, match=r"model.base: cannot be reached: the hub answers 503"):
        resolve_base(settings())
    assert resolve_base(settings(offline_base=str(pico_cache("gpt2")))).offline


def refused() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_an_unreachable_hub_falls_back_with_a_loud_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico_cache: PicoFolder, caplog: pytest.LogCaptureFixture
) -> None:
    point_at(refused(), monkeypatch, tmp_path)
    stand_in = pico_cache("distilbert")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        base = resolve_base(settings(offline_base=str(stand_in)))
    assert time.monotonic() - began < 5
    assert (base.requested, base.used, base.offline, base.path) == (REPO, str(stand_in), True, stand_in)
    assert base.name_or_path == str(stand_in.resolve())
    assert base.family.model_type == "distilbert"
    assert set(base.as_dict()) == {"requested", "used", "offline", "fingerprint"}
    [record] = caplog.records
    assert "someone/pico CANNOT BE REACHED" in record.getMessage()
    assert str(stand_in) in record.getMessage()


def test_a_silent_hub_is_given_up_in_under_five_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        point_at(f"http://127.0.0.1:{listener.getsockname()[1]}", monkeypatch, tmp_path)
        began = time.monotonic()
        with pytest.raises(ModelError) as caught:
            resolve_base(settings())
        assert time.monotonic() - began < 5
    assert "set model.offline_base" in str(caught.value)


def test_a_stand_in_that_is_unreachable_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at(refused(), monkeypatch, tmp_path)
    with pytest.raises(ModelError, match=r"model.offline_base: cannot be reached either"):
        resolve_base(settings(offline_base="someone/else"))

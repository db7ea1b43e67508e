"""What comes from the Hugging Face hub: fetched once a node, found without a network, and named where it cannot be had.

A small server on this machine stands in for the hub, as far as the library asks it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.commands import ENVIRONMENT, ROOT

NAME = "someone/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": bytes(range(256)) * 4000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"not wanted",
}
SCRIPT = f"""
from training.models.base_model import find_base_model
from launch.console import run_main
run_main(lambda: print(find_base_model({NAME!r}, None)))
"""


class Hub:
    """Serves one repository, and counts what is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                name = path.rpartition("/resolve/")[2].partition("/")[2]
                if path.startswith(f"/api/models/{NAME}"):
                    about = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
                    if "/tree/" in path:
                        about = [{"type": "file", "path": f, "size": len(FILES[f]), "oid": f} for f in FILES]
                    self.answer(json.dumps(about).encode())
                elif name in FILES:
                    if self.command == "GET":
                        hub.asked[name] += 1
                    self.answer(FILES[name], etag=hashlib.sha256(FILES[name]).hexdigest())
                else:
                    self.send_error(404)

            def answer(self, content: bytes, etag: str | None = None) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def start(home: Path, address: str, *, offline: bool = False) -> subprocess.Popen[str]:
    proxies = {f"{scheme}_proxy": "" for scheme in ("http", "https", "HTTP", "HTTPS")}
    environment = {**ENVIRONMENT, **proxies, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_three_processes_fetch_every_file_once_and_then_need_no_network(hub: Hub, tmp_path: Path):
    processes = [start(tmp_path, hub.address) for _ in range(3)]
    said = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    (folder,) = {Path(out.splitlines()[-1]) for out, _ in said}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all((folder / path.name).read_bytes() == FILES[path.name] for path in folder.iterdir())
    assert hub.asked == Counter({"config.json": 1, "model.safetensors": 1, "tokenizer.json": 1})
    again = start(tmp_path, "http://127.0.0.1:9", offline=True)
    out, err = again.communicate()
    assert out.strip() == str(folder) and again.returncode == 0, err


def test_half_of_a_model_in_the_cache_is_completed(hub: Hub, tmp_path: Path):
    assert start(tmp_path, hub.address).wait() == 0
    (weights,) = tmp_path.glob("hub/models--*/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    offline = start(tmp_path, hub.address, offline=True)
    _, err = offline.communicate()
    assert offline.returncode == 1 and err.startswith("error: ") and f"hf download {NAME}" in err
    online = start(tmp_path, hub.address)
    assert (
        Path(online.communicate()[0].splitlines()[-1], "model.safetensors").read_bytes() == FILES["model.safetensors"]
    )
    assert hub.asked["model.safetensors"] == 2


def test_hub_that_cannot_be_reached_is_named_within_seconds(tmp_path: Path):
    process = start(tmp_path, "http://127.0.0.1:9")
    _, err = process.communicate(timeout=60)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "127.0.0.1 cannot be reached" in line and f"hf download {NAME}" in line


def test_name_that_the_hub_does_not_know_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPT.replace(NAME, "someone/no-such-model"))
    process = start(tmp_path, hub.address)
    _, err = process.communicate()
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "someone/no-such-model could not be fetched" in line

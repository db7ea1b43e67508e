"""What comes from the Hugging Face hub: fetched once a node, found without a network, and named where it cannot be had.

A small server on this machine stands in for the hub, as far as the library asks it.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.commands import PATIENCE_S, ROOT, Result, usual_environment
from training.base.hub import commit_of, is_hub_name

NAME = "someone/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": bytes(range(256)) * 4000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"not wanted",
}
# It forks when everything is imported: the model's name, how many processes look for it at once, and what for.
SCRIPT = """
import os, sys, time
from training.base.console import run_main
from training.models.base_model import find_base_model
name, processes, weights = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "weights"
others = []
while len(others) < processes - 1 and (not others or others[-1]):
    others.append(os.fork())
def main():
    began = time.monotonic()
    try:
        print(find_base_model(name, None, weights=weights), flush=True)
    except BaseException:
        print("failed after", time.monotonic() - began)
        raise
    if all(others):
        assert all(os.waitpid(other, 0)[1] == 0 for other in others)
run_main(main)
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


def start(
    home: Path,
    address: str,
    *,
    name: str = NAME,
    processes: int = 1,
    offline: bool = False,
    weights: bool = True,
) -> Result:
    """What they print, a folder each, and how they end."""
    proxies = {f"{scheme}_proxy": "" for scheme in ("http", "https", "HTTP", "HTTPS")}
    environment = {
        **usual_environment(),
        **proxies,
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
    }
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    command = [sys.executable, "-c", SCRIPT, name, str(processes), "weights" if weights else "config"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.whole
def test_three_processes_fetch_every_file_once_need_no_network_then_and_complete_what_is_missing(
    hub: Hub, tmp_path: Path
):
    first = start(tmp_path, hub.address, processes=3)
    assert first.status == 0, first
    names = re.findall(rf"{tmp_path}\S*?{COMMIT}", first.out)  # among progress bars
    assert len(names) == 3, first
    (folder,) = {Path(name) for name in names}
    assert commit_of(folder) == COMMIT and commit_of(tmp_path) is None
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all((folder / path.name).read_bytes() == FILES[path.name] for path in folder.iterdir())
    assert hub.asked == Counter({"config.json": 1, "model.safetensors": 1, "tokenizer.json": 1})
    again = start(tmp_path, "http://127.0.0.1:9", offline=True)
    assert again.status == 0 and again.out.strip() == str(folder), again

    # Half of a model in the cache.
    (weights,) = tmp_path.glob("hub/models--*/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    offline = start(tmp_path, hub.address, offline=True)
    assert offline.status == 1 and offline.err.startswith("error: ") and f"hf download {NAME}" in offline.err, offline
    online = start(tmp_path, hub.address)
    assert Path(online.out.splitlines()[-1], "model.safetensors").read_bytes() == FILES["model.safetensors"], online
    assert hub.asked["model.safetensors"] == 2


@pytest.mark.whole
def test_what_a_model_is_can_be_known_before_its_weights_are_fetched(hub: Hub, tmp_path: Path):
    about = start(tmp_path, hub.address, weights=False)
    assert about.status == 0 and set(hub.asked) == {"config.json", "tokenizer.json"}, about
    assert start(tmp_path, hub.address).status == 0
    assert hub.asked == Counter({"config.json": 1, "model.safetensors": 1, "tokenizer.json": 1})


def test_hub_that_cannot_be_reached_is_named_within_seconds(tmp_path: Path):
    result = start(tmp_path, "http://127.0.0.1:9")
    (line,) = result.error_lines
    assert float(result.out.partition("failed after ")[2]) < 60
    assert result.status == 1 and "http://127.0.0.1:9 cannot be reached" in line and f"hf download {NAME}" in line


def test_a_name_is_the_hubs_also_where_a_folder_is_called_nearly_so_but_not_if_it_is_a_broken_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "Qwen/Qwen2.5-7B").mkdir(parents=True)
    (tmp_path / "Qwen/Qwen2.5-0.5B").symlink_to("/nowhere/at/all")
    monkeypatch.chdir(tmp_path)
    names = ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-0.5B", "./Qwen/x", "Qwen", "/Qwen/x", "../Qwen", "a/b/c")
    assert [name for name in names if is_hub_name(name)] == ["Qwen/Qwen2.5-3B"]


def test_name_that_the_hub_does_not_know_is_said(hub: Hub, tmp_path: Path):
    result = start(tmp_path, hub.address, name="someone/no-such-model")
    (line,) = result.error_lines
    assert result.status == 1 and "someone/no-such-model is no folder here and could not be fetched" in line

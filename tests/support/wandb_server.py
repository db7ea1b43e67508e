"""A stand-in for the wandb server, on loopback: what the real client needs to upload runs, kept where tests read it.

It can lose connections, die and come back with what it had, like a server behind a bad network. Lines of a run are kept
by their offset, as the real server keeps them, so what a client sends again does not stand twice.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "tester"


@dataclass
class Run:
    """What the server holds of a run."""

    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # system metrics
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str | None = None
    said: dict[str, Any] = field(default_factory=dict)  # in announcing it: project, sweep, groupName, tags, ...
    ends: list[int] = field(default_factory=list)  # exit status of every session that ended
    preempted: bool = False

    @property
    def steps(self) -> list[int]:
        """Steps of the history rows, in the order of their lines."""
        return [row["_step"] for row in self.history]

    def value(self, *keys: str) -> Any:
        """An entry of the config, which wandb keeps as {"value": ...} under its first key."""
        inner = self.config[keys[0]]["value"]
        for key in keys[1:]:
            inner = inner[key]
        return inner


class WandbServer:
    """Use as a context manager. `runs` by id; `lossy` loses two of three uploads; `silent` takes and never answers.

    It has one sweep, by the config `sweep` (YAML), whose agents get one of `trials` at a time: id and arguments.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.sweep = ""
        self.trials: list[tuple[str, dict[str, Any]]] = []
        self.lossy = self.silent = False
        self.kept_waiting = threading.Event()  # whether a client waits for a silent server
        self.lost = 0  # connections lost so far
        self._uploads = 0
        self._lock = threading.Lock()
        self._port = 0
        self._http: ThreadingHTTPServer | None = None

    def __enter__(self) -> WandbServer:
        self.come_back()
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def die(self) -> None:
        """From now on its port refuses connections, until `come_back`."""
        if self._http is not None:
            http, self._http = self._http, None
            http.shutdown()
            http.server_close()

    def come_back(self) -> None:
        """Listens, on the same port as before, with all that was uploaded before."""
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: a connection for each request, so that `die` is sudden
            def log_message(self, *arguments: object) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if server.silent:
                    server.kept_waiting.set()
                    threading.Event().wait()
                answer = server.respond(urlsplit(self.path).path, body)
                if answer is None or server._http is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _answer

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):  # the connection that `_answer` closed
                    self.close_connection = True

        return Handler

    def respond(self, path: str, body: bytes) -> dict[str, Any] | None:
        """The answer to a request; None: the connection is lost instead."""
        with self._lock:
            if path == "/graphql":
                request = json.loads(body)
                return {"data": self._graphql(request["query"], request.get("variables") or {})}
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if parts[0] == "storage":
                self.runs[parts[1]].files["/".join(parts[2:])] = body
                return {}
            if parts[-1] != "file_stream":
                return {}
            self._uploads += 1
            turn = self._uploads % 3 if self.lossy else 0
            if turn:
                self.lost += 1
            if turn != 1:  # 1: lost on the way here; 2: lost on the way back
                self._file_stream(self.runs[parts[-2]], json.loads(body))
            return {} if turn == 0 else None

    def _file_stream(self, run: Run, request: dict[str, Any]) -> None:
        for name, chunk in (request.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"] if name.endswith((".json", ".jsonl"))]
            kept = {"wandb-history.jsonl": run.history, "wandb-events.jsonl": run.events}.get(name)
            if kept is not None:
                kept[chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        run.preempted |= bool(request.get("preempting"))
        if request.get("complete"):
            run.ends.append(request["exitcode"])

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": ENTITY}}
        if "mutation UpsertBucket" in query:
            inserted = given["name"] not in self.runs
            run = self.runs.setdefault(given["name"], Run())
            run.name = given.get("displayName") or run.name
            run.commit = given.get("commit") or run.commit
            run.said |= {key: value for key, value in given.items() if value is not None}
            run.config = json.loads(given["config"]) if given.get("config") else run.config
            bucket = {**self._bucket(given["name"], run), "project": project, "sweepName": given.get("sweep")}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if "query RunResumeStatus" in query:
            run = self.runs.get(given["name"])
            bucket = self._bucket(given["name"], run) if run is not None else None
            return {"model": {**project, "bucket": bucket}}
        if "mutation CreateRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.url}/storage/{given['run']}/{name}"} for name in given["files"]
            ]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "mutation CreateArtifact " in query or "mutation CreateArtifact(" in query:
            sequence = {"id": "s", "latestArtifact": None}
            # Committed: the server has its content already, nothing more to upload.
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        if "query ArtifactType" in query:  # of the table, whose artifact the client looks at again
            return {"project": {"artifact": {"artifactType": {"name": "run_table"}}}}
        if "query SweepWithRuns" in query:
            return {"project": {"sweep": {"id": "s", "config": self.sweep, "runs": {"edges": []}}}}
        if "mutation CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "g"}}}
        if "mutation Heartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "g"}, "commands": json.dumps(self._orders(given["runState"]))}}
        if "query Viewer" in query:
            flags = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": None, "flags": "{}"}
            return {"viewer": {**flags, "teams": {"edges": []}}}
        return {}

    def _orders(self, running: str) -> list[dict[str, Any]]:
        """What an agent is to do next, whose trials (a JSON text, by id) are running."""
        if json.loads(running):
            return []
        if not self.trials:
            return [{"type": "exit"}]
        run_id, arguments = self.trials.pop(0)
        values = {key: {"value": value} for key, value in arguments.items()}
        return [{"type": "run", "run_id": run_id, "program": yaml.safe_load(self.sweep)["program"], "args": values}]

    def _bucket(self, run_id: str, run: Run) -> dict[str, Any]:
        # The real server answers `wandbConfig` to tell a run that has begun from one that was only announced.
        return {
            "id": f"id-{run_id}",
            "name": run_id,
            "displayName": run.name,
            "description": "",
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
            "tags": run.said.get("tags", []),
            "notes": run.said.get("notes", ""),
        }

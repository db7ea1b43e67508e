"""Notices of preemption, as the three clouds document them, from a server of our own at another address."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.support.lives import wait_for
from training.base.environment import Ranks
from training.engine import notices
from training.engine.cluster import Watcher
from training.engine.notices import Notices
from training.engine.stopping import SessionOptions, StopFlag, Stopped

AWS = {"PUT /latest/api/token": "secret", "GET /latest/meta-data/spot/instance-action": None}
GOOGLE = {"GET /computeMetadata/v1/instance/preempted": "FALSE"}
NAME = "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text"
EVENTS = "GET /metadata/scheduledevents?api-version=2020-07-01"
AZURE = {NAME: "me", EVENTS: '{"DocumentIncarnation": 1, "Events": []}'}

# What each server wants to see in every request, or it refuses.
WANTED = {"PUT /latest": "X-aws-ec2-metadata-token-ttl-seconds: 60", "GET /latest": "X-aws-ec2-metadata-token: secret"}
WANTED |= {"GET /computeMetadata": "Metadata-Flavor: Google", "GET /metadata": "Metadata: true"}


class Cloud:
    """A metadata server; `answers` may be changed at any time."""

    def __init__(self) -> None:
        self.answers: Mapping[str, str | None] = {}
        self.asked: list[str] = []
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                request = f"{self.command} {self.path}"
                cloud.asked.append(request)
                wanted = next((text for start, text in WANTED.items() if request.startswith(start)), None)
                content = cloud.answers.get(request)
                told = {f"{name}: {value}" for name, value in self.headers.items()}
                status = 404 if content is None else 200 if wanted in told else 401
                self.send_response(status)
                self.end_headers()
                self.wfile.write((content or "").encode() if status == 200 else b"<html>no</html>")

            do_GET = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud = Cloud()
    monkeypatch.setattr(notices, "_ADDRESS", cloud.server.server_address)
    monkeypatch.setattr(notices, "_ASK_EVERY_S", 0.01)
    monkeypatch.setattr(notices, "_PROBE_S", 10.0)  # of a busy machine
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    yield cloud
    # Whoever still asks is told, and so ends: the next test has a server of its own at the same address.
    taken = {"GET /latest/meta-data/spot/instance-action": '{"action": "stop"}', EVENTS: event("Preempt", "me")}
    cloud.answers = {**AWS, **AZURE, **taken, "GET /computeMetadata/v1/instance/preempted": "TRUE"}
    wait_for(lambda: not any(thread.name == "notices" for thread in threading.enumerate()))
    cloud.server.shutdown()


def event(kind: str, *names: str) -> str:
    return json.dumps({"DocumentIncarnation": 2, "Events": [{"EventId": "7", "EventType": kind, "Resources": names}]})


@pytest.mark.parametrize(
    ("quiet", "told", "said"),
    [
        (
            AWS,
            {"GET /latest/meta-data/spot/instance-action": '{"action": "terminate", "time": "2026"}'},
            "AWS (terminate)",
        ),
        (GOOGLE, {"GET /computeMetadata/v1/instance/preempted": "TRUE"}, "Google (preempted)"),
        (AZURE, {EVENTS: event("Preempt", "other", "me")}, "Azure (Preempt)"),
    ],
)
def test_notice_of_each_cloud_stops_the_run_and_silence_or_nonsense_does_not(
    cloud, tmp_path, handlers, quiet, told, said
):
    cloud.answers = quiet
    cluster = SimpleNamespace(is_first=False, launcher=None, maximum=list, watcher=Watcher(), ranks=Ranks(2, 0))
    flag = StopFlag(tmp_path, cluster, SessionOptions())
    (watched,) = told
    wait_for(lambda: cloud.asked.count(watched) >= 3)
    flag.check()
    nonsense = {watched: "[]"}
    cloud.answers = {**quiet, **nonsense}
    asked = len(cloud.asked)
    wait_for(lambda: len(cloud.asked) > asked + 5)
    flag.check()
    cloud.answers = {**quiet, **told}
    wait_for(lambda: flag._notices.found)
    with pytest.raises(Stopped) as stopped:
        flag.check()
    assert str(stopped.value) == f"a notice of preemption by {said}"


@pytest.mark.parametrize("content", [event("Freeze", "me"), event("Preempt", "other")])
def test_what_azure_announces_of_a_pause_or_of_another_machine_is_no_reason(cloud, content):
    cloud.answers = {**AZURE, EVENTS: content}
    found = Notices()
    wait_for(lambda: found.found or cloud.asked.count(EVENTS) >= 3)
    assert found.found is None


def test_where_no_cloud_answers_nobody_is_asked_twice(cloud):
    Notices()
    wait_for(lambda: len(cloud.asked) == 3)
    time.sleep(0.1)
    assert cloud.asked == [next(iter(AWS)), next(iter(GOOGLE)), NAME]


@pytest.mark.parametrize(
    ("variable", "options", "local_rank"),
    [
        ("SLURM_JOB_ID", {}, 0),
        ("KAGGLE_KERNEL_RUN_TYPE", {}, 0),
        ("NOTHING", {"notices": False}, 0),
        ("NOTHING", {}, 1),
    ],
)
def test_nobody_is_asked_under_slurm_on_kaggle_where_the_user_forbids_it_or_by_a_second_rank(
    cloud, tmp_path, handlers, monkeypatch, variable, options, local_rank
):
    monkeypatch.setenv(variable, "7")
    monkeypatch.setattr("training.engine.stopping.time_left", lambda: None)
    cluster = SimpleNamespace(is_first=True, launcher=None, maximum=list, watcher=Watcher(), ranks=Ranks(0, local_rank))
    StopFlag(tmp_path, cluster, SessionOptions(**options)).check()
    time.sleep(0.1)
    assert cloud.asked == []

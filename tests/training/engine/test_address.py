"""A run that lives at an address: machines are killed, frozen, and start with empty disks; servers fail; it goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.addresses import Address, bucket, sftp_server
from tests.support.commands import Launch, Started
from tests.support.disks import mounted
from tests.support.lives import resumed_at
from tests.support.runs import (
    SHORT_RUN,
    assert_same_model,
    assert_same_record,
    command_of,
    losses,
    reference,
    status_of,
)
from training.base.console import TryLaterError, UserError
from training.engine.address import claim as claims
from training.engine.address import home as homes
from training.engine.address.claim import Claim, Link, LostClaim, newest_link, take_claim
from training.engine.address.home import Home
from training.engine.address.store import AddressError, Store, open_store
from training.engine.checkpoint import checkpoints, publish
from training.engine.status import read_sessions, saved_steps

RUN = (*SHORT_RUN, "--optim.epochs", 0.4, "--log.validate_every_steps", 10, "--checkpoint.every_steps", 4)


@pytest.fixture(scope="module")
def s3() -> Iterator[Address]:
    with bucket() as address:
        yield address


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Address]:
    """An empty address of the kind that the test names."""
    if request.param == "s3":
        found = request.getfixturevalue("s3")
        yield Address(f"{found.url}/{tmp_path.name}", found.variables)
    elif request.param == "sftp":
        with sftp_server(tmp_path / "ssh") as server:
            yield Address(f"{server.address.url}/run", server.address.variables)
    else:
        (tmp_path / "drive").mkdir()
        yield Address(f"file://{tmp_path}/drive/run")


def on(*kinds: object) -> Any:
    return pytest.mark.parametrize("place", kinds, indirect=True)


def machine(
    launch: Launch, place: Address, run_dir: Path, data: Path, *accidents: dict[str, Any], **how: Any
) -> Started:
    """A session of RUN in a run folder of its own, to which these accidents happen."""
    run_dir.parent.mkdir(exist_ok=True)
    around = {"ACCIDENTS": json.dumps({"folder": str(run_dir.parent), "list": accidents}), "RELAY_DEAD_AFTER_S": "3"}
    words = command_of(run_dir, data, *RUN, "--run_at", place.url)
    return launch(
        *words, module="tests.support.faulty_training", environment={**place.variables, **around}, real=False, **how
    )


def arrived(place: Address, step: int) -> Link:
    """Waits until a step is published at the address."""
    store, end = open_store(place.url), time.monotonic() + 600
    while max((link := newest_link(store)).checkpoints, default=0) < step:
        assert time.monotonic() < end, link
        time.sleep(0.05)
    return link


@on("s3", "sftp")
def test_a_run_goes_on_from_machine_to_machine_with_empty_disks(launch, sample_data, tmp_path, place, request):
    ranks = {"s3": (None, None, None), "sftp": (None, 2, None)}[request.node.callspec.params["place"]]
    expected = reference(sample_data, *RUN)
    folders = [tmp_path / name / "run" for name in "abc"]
    for number, (folder, step) in enumerate(zip(folders[:2], (10, 22), strict=True)):
        hold = {"at": "forward", "step": step, "do": "hold"}
        started = machine(launch, place, folder, sample_data, hold, ranks=ranks[number])
        arrived(place, (step - 1) // 4 * 4)
        started.kill_all()
        shutil.rmtree(folder)
    last = machine(launch, place, folders[2], sample_data)
    assert last.wait().status == 0 and "warning" not in last.printed(), last.printed()
    assert resumed_at(last) == 20, last.printed()
    if ranks[1] is None:
        assert_same_model(folders[2], expected)
        assert_same_record(folders[2], expected)
    else:
        assert losses(folders[2]) == pytest.approx(losses(expected), rel=1e-4)
    assert [each["from_step"] for each in read_sessions(folders[2])] == [0, 8, 20]
    there = newest_link(open_store(place.url))
    assert there.free and set(there.checkpoints) == set(saved_steps(folders[2])), "retention there is the same"
    assert len(there.checkpoints) <= 3

    again = machine(launch, place, tmp_path / "d/run", sample_data).wait()
    assert again.status == 0 and "is finished" in again.out, again
    assert_same_model(tmp_path / "d/run", folders[2])
    assert (tmp_path / "d/run/report.html").exists()


@on("sftp")
def test_a_frozen_machine_publishes_nothing_and_leaves_when_it_wakes(launch, sample_data, tmp_path, place):
    expected = reference(sample_data, *RUN)
    frozen, next_one = tmp_path / "frozen/run", tmp_path / "next/run"
    # Awake, it looks who has the run while it does these steps.
    slow = [{"at": "forward", "step": step, "do": "pause", "seconds": 0.5} for step in range(11, 16)]
    started = machine(launch, place, frozen, sample_data, {"at": "forward", "step": 10, "do": "hold"}, *slow)
    number = arrived(place, 8).number
    os.kill(started.process.pid, signal.SIGSTOP)
    successor = machine(launch, place, next_one, sample_data, {"at": "forward", "step": 18, "do": "hold"})
    assert arrived(place, 16).number == number + 1
    second = machine(launch, place, tmp_path / "third/run", sample_data).wait()
    assert second.status == 1 and "is in use by process" in second.err, "one that is alive is not taken over"

    (frozen.parent / "go-forward-10").touch()
    os.kill(started.process.pid, signal.SIGCONT)
    left = started.wait()
    assert left.status == 75 and "has taken over the run" in left.err, left
    status = status_of(frozen)
    assert (status["status"], status["restart"]) == ("resumable", False)
    assert status["step"] < 16, "it leaves within a few steps of noticing"
    (next_one.parent / "go-forward-18").touch()
    assert successor.wait().status == 0, successor.printed()
    assert_same_model(next_one, expected)
    assert_same_record(next_one, expected)
    link = newest_link(open_store(place.url))
    assert all(folder.startswith(f"{number + 1}/") for folder in link.checkpoints.values())


@on("drive")
def test_a_run_that_gets_an_address_late_or_has_not_arrived_is_sent_when_it_is_started_again(
    launch, sample_data, tmp_path, place
):
    run_dir = tmp_path / "here/run"
    shutil.copytree(reference(sample_data, *RUN), run_dir)
    again = machine(launch, place, run_dir, sample_data).wait()
    assert again.status == 0 and "is finished" in again.out, again
    assert set(newest_link(open_store(place.url)).checkpoints) == set(saved_steps(run_dir))
    assert {"report.html", "status.json", "metrics.jsonl"} < open_store(place.url).names("1").keys()
    other = launch(*command_of(tmp_path / "other", sample_data, *RUN, "--optim.lr", 5e-3, "--run_at", place.url)).wait()
    assert other.status == 1 and f"{place.url} holds a run with another definition (optim.lr" in other.err, other


# The claim, in every order.


class _Turns:
    """Lets two threads act one at a time, in an order that a seed decides; one of them freezes now and then."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._free = {name: threading.Semaphore(0) for name in "AB"}
        self._waits = threading.Semaphore(0)

    def take(self) -> None:
        """To be called by a thread before it does anything to the store."""
        self._waits.release()
        self._free[threading.current_thread().name].acquire()

    def run(self, work: Callable[[str], None]) -> None:
        """Until work(name) has ended in both threads."""
        living = ["A", "B"]

        def whole() -> None:
            name = threading.current_thread().name
            self._free[name].acquire()
            try:
                work(name)
            finally:
                living.remove(name)
                self._waits.release()

        for name in living:
            threading.Thread(target=whole, name=name, daemon=True).start()
        frozen, awake = self._random.choice("AB"), self._random.randrange(40)
        for turn in range(10_000):
            ready = [name for name in living if name != frozen or turn % 80 <= awake]
            for name in ready and [self._random.choice(ready)]:
                self._free[name].release()
                assert self._waits.acquire(timeout=60)
            if not living:
                return
        raise AssertionError("they never came to an end")


class _InTurns:
    """A store whose every act waits for its turn."""

    def __init__(self, store: Store, turns: _Turns):
        self._store, self._turns, self.guards, self.url = store, turns, store.guards, store.url

    def __getattr__(self, name: str) -> Any:
        def act(*words: Any) -> Any:
            self._turns.take()
            return getattr(self._store, name)(*words)

        return act


@pytest.mark.parametrize(
    "place, tries", [("drive", 100), pytest.param("s3", 6, marks=pytest.mark.whole)], indirect=["place"]
)
def test_two_machines_never_both_publish_in_whatever_order_they_act(place, tries, monkeypatch):
    clock = threading.local()  # each machine has its own, which stands still between its waits
    clocks = SimpleNamespace(
        monotonic=lambda: getattr(clock, "now", 0.0),
        sleep=lambda seconds: setattr(clock, "now", getattr(clock, "now", 0.0) + 7 * seconds),
    )
    monkeypatch.setattr(claims, "time", clocks)
    monkeypatch.setattr(Claim, "_keep", lambda claim: None)  # the machines move their claims themselves
    ends = Counter(end for seed in range(tries) for end in _both_train(f"{place.url}-{seed}", _Turns(seed)))
    assert set(ends) == {"published all", "refused", "lost"}, f"all of it is to happen: {ends}"


def _started_again(store: Any) -> Claim:
    """Takes the claim, if need be at a third start."""
    for _ in range(2):
        with suppress(TryLaterError):
            return take_claim(store)
    return take_claim(store)


def _both_train(url: str, turns: _Turns) -> list[str]:
    """How it ended for both of them."""
    published: list[int] = []
    links: list[tuple[int, int]] = []
    ends = []

    def train(name: str) -> None:
        store: Any = _InTurns(open_store(url), turns)
        first = {"A": 100, "B": 200}[name]
        try:
            claim = _started_again(store)
            for step in range(first, first + 4):
                claim.update()  # as its thread does while files are sent
                folder = f"{claim.link.number}/step-{step:010d}-{0:016x}"
                claim.update(checkpoints={**claim.link.checkpoints, step: folder})
                published.append(step)
                links.append((claim.link.version, claim.link.number))
            ends.append("published all")
        except TryLaterError:
            ends.append("refused")
        except LostClaim:
            ends.append("lost")

    turns.run(train)
    assert len(ends) == 2
    there = set(newest_link(open_store(url)).checkpoints)
    assert there >= set(published), "what was said to be published is"
    # Who froze behind its link, before it could see that it stands, has published it without knowing.
    assert len(there) <= len(published) + ends.count("lost")
    numbers = [number for _, number in sorted(links)]
    assert numbers == sorted(numbers), "who has lost the claim publishes nothing more"
    return ends


# What goes wrong with the server, while a training goes on.


def save(run_dir: Path, step: int, **how: Any) -> None:
    """Publishes a small checkpoint, as a training does."""
    part = {"weight": torch.full((1000,), float(step))}
    tensors = {"model.safetensors": part, "optimizer.safetensors": part}
    state = {"scores": {}, "best_by": "accuracy"}
    about = {"task": "none", "config": {}, "data": {}, "versions": {}}
    publish(run_dir, step, tensors, state=state, about=about, keep=2, **how)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Home]]:
    """Begins a session in a folder, with a home at a URL; whoever has it holds the run folder."""
    begun = []

    def begin(url: str, name: str = "run", store: Callable[[str], Any] = open_store) -> Home:
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        home = Home(url, folder)
        home._store = store(url)
        found = checkpoints(folder)
        home.open(found[-1] if found else None, lambda checkpoint: None)
        home.start()
        begun.append(home)
        return home

    yield begin
    for home in begun:
        home.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again soon."""
    monkeypatch.setattr(homes, "_PAUSES_S", (0.05, 0.2))
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 1.0)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


class _Faulty:
    """A drive that fails as it is told to."""

    def __init__(self, url: str):
        self._store = open_store(url)
        self.refuses = self.loses = False
        self.is_open = threading.Event()
        self.is_open.set()
        self.puts: list[str] = []

    def put(self, source: Path, name: str) -> None:
        self.puts.append(name)
        if self.refuses:
            raise AddressError("refused")
        self.is_open.wait()
        if not (self.loses and name.endswith("optimizer.safetensors")):
            self._store.put(source, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@on("drive")
def test_a_checkpoint_is_published_only_once_all_of_it_has_arrived(begin, hasty, place, tmp_path, capsys):
    home = begin(place.url, store=_Faulty)
    store, folder = home._store, tmp_path / "run"
    store.loses = True
    save(folder, 1)
    home.notice()
    until(lambda: home._failed or home.uploads_s)
    assert newest_link(open_store(place.url)).checkpoints == {}
    assert "does not take the run now (1/step-0000000001" in capsys.readouterr().err
    store.loses = False
    until(lambda: set(newest_link(open_store(place.url)).checkpoints) == {1})
    assert sum(name.endswith("model.safetensors") for name in store.puts) == 1, "what is there is not sent again"
    until(lambda: not home._failed)  # a failure is told once
    store.refuses = True
    save(folder, 2)
    home.notice()
    until(lambda: "(refused)" in capsys.readouterr().err)
    save(folder, 3)
    save(folder, 4)
    store.refuses = False
    home.finish(60)
    link = newest_link(open_store(place.url))
    assert set(link.checkpoints) == {3, 4}
    assert not any(name.startswith("1/step-0000000002") for name in open_store(place.url).names("1"))


@on("drive")
def test_a_slow_server_is_sent_the_newest_and_a_checkpoint_that_is_being_sent_stays(begin, hasty, place, tmp_path):
    home = begin(place.url, store=_Faulty)
    store, folder = home._store, tmp_path / "run"
    store.is_open.clear()
    began = time.monotonic()
    save(folder, 1)
    home.notice()
    until(lambda: store.puts)
    sending = time.monotonic()
    for step in (2, 3, 4, 5):
        save(folder, step)
        home.notice()
    assert time.monotonic() - began < 30 and set(saved_steps(folder)) == {4, 5}, "nobody waited"
    home.finish(0.1)
    slow_s = time.monotonic() - sending
    store.is_open.set()
    until(lambda: home._all_arrived)
    assert home.seconds >= slow_s, "so much time is kept free at the end of a session"
    sent = {name.split("/")[1][:15] for name in store.puts if "step-" in name}
    assert sent == {"step-0000000001", "step-0000000004", "step-0000000005"}, "older ones give way"
    assert set(newest_link(open_store(place.url)).checkpoints) == {4, 5}


@on("drive")
def test_a_machine_that_dies_while_it_sends_loses_nothing_that_was_published(begin, hasty, place, tmp_path, capsys):
    home = begin(place.url, store=_Faulty)
    save(tmp_path / "run", 1)
    home.notice()
    until(lambda: newest_link(open_store(place.url)).checkpoints)
    home._store.is_open.clear()  # here it dies
    save(tmp_path / "run", 2)
    home.notice()
    until(lambda: any("step-0000000002" in name for name in home._store.puts))
    open_store(place.url).put(tmp_path / "run/address.json", "1/step-0000000002-0123456789abcdef/model.safetensors")
    home._claim._over.set()

    other = begin(place.url, "other")
    assert set(saved_steps(tmp_path / "other")) == {1}
    assert not any("step-0000000002" in name for name in open_store(place.url).names("1")), (
        "half a checkpoint is nothing"
    )
    save(tmp_path / "other", 3)
    other.finish(60)
    home._store.is_open.set()
    until(lambda: home.lost)
    assert set(newest_link(open_store(place.url)).checkpoints) == {1, 3}
    other.close()

    capsys.readouterr()
    begin(place.url).close()  # the first machine is back, with a step that never arrived
    assert "goes on without what is here: that is set aside in" in capsys.readouterr().out
    assert set(saved_steps(tmp_path / "run")) == {1, 3}
    assert set(saved_steps(tmp_path / "run-at-2")) == {1, 2}


def test_a_server_that_goes_down_is_said_once_and_gets_all_when_it_is_back(begin, hasty, tmp_path, capsys):
    with sftp_server(tmp_path / "ssh") as server:
        url = f"{server.address.url}/run"
        home = begin(url)
        save(tmp_path / "run", 1)
        home.notice()
        until(lambda: newest_link(open_store(url)).checkpoints)
        server.stop()
        for step in (2, 3):
            save(tmp_path / "run", step)
            home.notice()
        until(lambda: home._failed)
        began = time.monotonic()
        home.finish(60)
        assert time.monotonic() - began < 30, "the end does not wait for a server that is gone"
        home.close()
        assert capsys.readouterr().err.count("does not take the run now") == 1

        home = begin(url)  # the next session begins without it
        save(tmp_path / "run", 4)
        server.start()
        until(lambda: not home._failed)
        home.finish(60)
        assert set(newest_link(open_store(url)).checkpoints) == {3, 4}
        home.close()
        server.stop()
        with pytest.raises(TryLaterError, match="cannot be reached"):
            begin(url, "empty")


def test_a_full_drive_costs_nothing_that_was_published(begin, hasty, tmp_path):
    with mounted(tmp_path / "small", "size=120k") as drive:
        home = begin(f"file://{drive}/run")
        save(tmp_path / "run", 1)
        home.notice()
        until(lambda: newest_link(open_store(home.url)).checkpoints)
        with suppress(OSError):
            (drive / "filler").write_bytes(b"0" * 120_000)
        save(tmp_path / "run", 2)
        home.notice()
        until(lambda: home._failed)
        assert set(newest_link(open_store(home.url)).checkpoints) == {1}
        (drive / "filler").unlink()
        home.finish(60)
        assert set(newest_link(open_store(home.url)).checkpoints) == {1, 2}
        home.close()


@on("drive", pytest.param("s3", marks=pytest.mark.whole))
def test_a_damaged_checkpoint_at_the_address_is_named_and_an_older_one_taken(begin, hasty, place, tmp_path, capsys):
    home = begin(place.url)
    for step in (1, 2):
        save(tmp_path / "run", step)
    home.finish(60)
    home.close()
    folder = newest_link(open_store(place.url)).checkpoints[2]
    open_store(place.url).put(tmp_path / "run/address.json", f"{folder}/model.safetensors")
    other = begin(place.url, "other")
    assert "step 2 at" in (said := capsys.readouterr().err) and "is damaged" in said
    assert set(saved_steps(tmp_path / "other")) == {1}
    other.close()
    folder = newest_link(open_store(place.url)).checkpoints[1]
    open_store(place.url).put(tmp_path / "run/address.json", f"{folder}/model.safetensors")
    with pytest.raises(UserError, match="none of them is whole"):
        begin(place.url, "third")


@on("drive")
def test_a_run_does_not_go_back_because_what_has_come_further_cannot_be_fetched(begin, hasty, place, tmp_path):
    home = begin(place.url)
    for step in (1, 2):
        save(tmp_path / "run", step)
    home.finish(60)
    home.close()
    save(tmp_path / "older", 1)

    class BreaksOff(_Faulty):
        def get(self, name: str, target: Path) -> None:
            raise AddressError("no network")

    with pytest.raises(TryLaterError, match=r"has come further than .*no network"):
        begin(place.url, "older", BreaksOff)
    assert set(saved_steps(tmp_path / "older")) == {1}
    assert set(newest_link(open_store(place.url)).checkpoints) == {1, 2}


@on("drive", "s3")
def test_a_run_is_not_strewn_among_the_files_of_others(begin, place, tmp_path):
    store = open_store(place.url)
    (tmp_path / "letter").write_text("mine")
    for name in ("letter.txt", ".hidden", "1/left"):
        store.put(tmp_path / "letter", name)
    before = set(store.names(""))
    with pytest.raises(UserError, match=f"{place.url} holds .* such as letter.txt: .* own, such as {place.url}/RUN"):
        begin(place.url)
    assert set(store.names("")) == before, "nothing was written"
    store.remove("letter.txt")
    begin(place.url)


def test_other_things_that_turn_up_when_the_address_can_be_reached_end_the_session(begin, hasty, tmp_path):
    save(tmp_path / "run", 1)
    home = begin(f"file://{tmp_path}/drive/run")
    (tmp_path / "other/run").mkdir(parents=True)
    (tmp_path / "other/run/letter.txt").write_text("mine")
    (tmp_path / "other").rename(tmp_path / "drive")
    until(lambda: home.lost)
    assert "holds other things than a run, such as letter.txt" in home.lost


@pytest.mark.parametrize("url", ["s3://key:SECRET@bucket/run", "https://x/run?token=SECRET", "SECRET"])
def test_an_address_with_a_secret_is_refused_and_not_printed(launch, sample_data, tmp_path, url):
    result = launch(*command_of(tmp_path / "run", sample_data, *RUN, "--run_at", url)).wait()
    assert result.status == 1 and "run_at: " in result.err
    assert "SECRET" not in result.out + result.err

"""The check before a run: it finds everything that is wrong at once, names who has it, and leaves nothing behind.

Two nodes are imitated by two tasks of srun, each with a host name of its own.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.doctor import machine, ranks, run
from launch.doctor.findings import Check, DoctorReport, Finding, MustMatch, examine, merge
from launch.doctor.ranks import bus_bandwidth
from launch.supervisor import free_port
from tests.support.commands import ROOT, Launch, Result, Started
from tests.support.ranks import task
from training.base.console import UserError
from training.base.environment import Ranks
from training.engine.cluster import Cluster

CONFIG = ROOT / "configs/gpt/sample.yaml"
DOCTOR = "launch.doctor"


def lines_of(result: Result) -> dict[str, list[tuple[str, str]]]:
    """Level and text of every line of a report, by subject."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in result.out.splitlines():
        parts = re.fullmatch(r"(ok|warning|error) +(\S+(?: \S+)*?)  +(.*)", line)
        if parts:
            found.setdefault(parts[2], []).append((parts[1], parts[3]))
    assert found, result
    return found


def assert_said(result: Result, level: str, subject: str, *words: str) -> None:
    """There is exactly one line of this level and subject, with all of the words."""
    matching = [text for found, text in lines_of(result).get(subject, []) if found == level]
    assert len(matching) == 1, (level, subject, result.out, result.err)
    assert all(word in matching[0] for word in words), (words, matching[0])


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below the folder: what a file holds, and when it was changed last."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in folder.rglob("*")
    }


def home(folder: Path) -> dict[str, str]:
    """A home folder and a folder for temporary files of the command's own, so that what it leaves there is seen."""
    for name in ("home", "temporary"):
        (folder / name).mkdir()
    return {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}


def test_machine_alone_is_looked_at_without_a_config(launch: Launch):
    result = launch(module=DOCTOR).wait()
    assert result.status == 0 and not result.err, result
    expected = {"versions", "GPUs", "config", "disk", "collectives"}
    assert expected <= set(lines_of(result))
    assert "0 errors" in result.out


def test_healthy_run_passes_and_a_run_that_is_there_is_not_touched(launch: Launch, sample_data, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints/step-0000000010").mkdir(parents=True)
    for name in ("status.json", "metrics.jsonl", "checkpoints/step-0000000010/model.safetensors"):
        (run_dir / name).write_text("as it was")
    environment = home(tmp_path)
    words = (CONFIG, "--run_dir", run_dir, "--data", sample_data)
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # by a session that trains meanwhile
        before = {name: snapshot(folder) for name, folder in (("run", run_dir), ("data", sample_data))}
        result = launch(*words, module=DOCTOR, ranks=2, environment=environment).wait()
        assert {name: snapshot(folder) for name, folder in (("run", run_dir), ("data", sample_data))} == before
    assert result.status == 0, result
    for subject in ("versions", "config", "data", "run folder", "collectives"):
        assert "ok" in [level for level, _ in lines_of(result)[subject]], (subject, result.out)
    assert "1 node, 2 ranks: 0 errors" in result.out

    (text,) = [text for _, text in lines_of(result)["collectives"]]
    milliseconds, speed = map(float, re.findall(r"MiB in ([\d.]+) ms: ([\d.]+) GB/s", text)[0])
    expected = (16 << 20) / (milliseconds / 1e3) / 1e9  # 2(n-1)/n is 1 for two ranks
    assert speed == pytest.approx(expected, rel=0.05, abs=0.005)  # which is what two decimals leave out
    left = [name for name in snapshot(tmp_path / "home") if not name.startswith(".triton")]
    assert left == [] and not list((tmp_path / "temporary").glob("tmp*"))


def test_all_faults_are_told_at_once_and_the_status_is_1(launch: Launch, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["--run_dir", tmp_path / "file/run", "--data", tmp_path / "none", "--optim.lrr", 1]
    result = launch(CONFIG, *words, module=DOCTOR, ranks=2).wait()
    assert result.status == 1, result
    assert_said(result, "error", "config", "optim.lrr", "nearest: optim.lr")
    assert_said(result, "error", "data", f"no prepared data set {tmp_path / 'none'}", "data_prep.pairs")
    assert_said(result, "error", "disk", f"{tmp_path / 'file'} is a file", "--run_dir")
    assert_said(result, "ok", "versions")
    assert "3 errors" in result.out


def rename_host() -> list[str]:
    """What starts a command under another host name; skips where that is not allowed."""
    starter = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
    if shutil.which("unshare") is None or subprocess.run([*starter, "node", "true"], capture_output=True).returncode:
        pytest.skip("two nodes on one machine need a name each: `unshare --uts` (root; in Docker: run --privileged)")
    return starter


def two_nodes(launch: Launch, words: list[list[object]], before: list[str], **environments: dict[str, str]) -> Any:
    """The doctor on node1 and node2, as two tasks of srun. words, before: each node's own; before: lines of Python."""
    unshare = rename_host()
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    steps = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_LOCALID": "0"}
    started: list[Started] = []
    for rank in range(2):
        code = f"{before[rank]}\nimport runpy\nrunpy.run_module('launch.doctor', run_name='__main__', alter_sys=True)"
        starter = [*unshare, f"node{rank + 1}", sys.executable, "-c", code]
        own = {**task(rank, **ports, **steps, SLURM_NODEID=str(rank), SLURM_GTIDS=str(rank))}
        environment = own | environments.get(f"node{rank + 1}", {})
        # `launch` puts the module's name behind the starter, where the doctor looks for its config.
        started.append(launch(*words[rank][1:], module=str(words[rank][0]), starter=starter, environment=environment))
    return started


def test_node_that_differs_from_the_others_is_named(launch: Launch, sample_data, tmp_path):
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    shutil.copytree(sample_data, tmp_path / "other")
    meta = tmp_path / "other/meta.json"
    fingerprint = re.search(r'"fingerprint": "(\w+)"', meta.read_text())[1]
    meta.write_text(meta.read_text().replace(fingerprint, "f" * len(fingerprint)))
    package = tmp_path / "packages/sacrebleu-0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: sacrebleu\nVersion: 0.1\n")
    words = [
        [CONFIG, "--data", sample_data, "--run_dir", tmp_path / "shared/run"],
        [CONFIG, "--data", tmp_path / "other", "--run_dir", tmp_path / "own/run"],
    ]
    soon = "from launch.doctor import ranks\nranks._SEEN_WITHIN_S = 1"
    before = snapshot(tmp_path / "shared"), snapshot(tmp_path / "own")
    started = two_nodes(launch, words, [soon, soon], node2={"PYTHONPATH": str(tmp_path / "packages")})
    first, second = [each.wait() for each in started]
    assert (first.status, second.status) == (1, 1), (first, second)
    assert second.out == "", "the first rank speaks for all"
    assert_said(first, "error", "data", f"fingerprint differs: {fingerprint[:12]} [node1], ffffffffffff [node2]")
    assert_said(first, "error", "run folder", "not seen by rank 1 on node2", "--run_dir")
    warnings = [text for level, text in lines_of(first)["versions"] if level == "warning"]
    assert any("sacrebleu 0.1 is installed" in text and text.endswith("[node2]") for text in warnings), warnings
    assert "2 nodes, 2 ranks: 2 errors" in first.out
    assert (snapshot(tmp_path / "shared"), snapshot(tmp_path / "own")) == before


def test_rank_that_hangs_is_named_and_not_waited_for_for_ever(launch: Launch, tmp_path):
    short = "from launch.doctor import ranks\nranks.LIMIT_S, ranks._SEEN_WITHIN_S = 3, 1"
    asleep = f"{short}\nimport time\nranks._own_work = lambda device: time.sleep(3600)"
    words: list[object] = ["--script", "training.gpt", "--run_dir", tmp_path / "run", "--data", tmp_path / "none"]
    elsewhere = [tmp_path / "gpt/none.yaml"]  # whose config is not on this node
    began = time.monotonic()
    first, second = [each.wait() for each in two_nodes(launch, [words, elsewhere], [short, asleep])]
    assert time.monotonic() - began < 60
    assert (first.status, second.status) == (1, 1), (first, second)
    asked = "rank 0 on node1 still waits in an all-reduce", "rank 1 on node2 still waits in its own work"
    assert_said(first, "error", "collectives", *asked, "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "firewall")
    assert_said(first, "error", "data", "no prepared data set", "[node1]")
    assert_said(first, "error", "config", "there is no config file", "gpt/none.yaml", "[node2]")


def test_ranks_that_do_not_meet_still_tell_what_they_know(launch: Launch, tmp_path):
    code = (
        "from launch.doctor import ranks\nranks.PATIENCE_S = 2\n"
        "import runpy\nrunpy.run_module('launch.doctor', run_name='__main__', alter_sys=True)"
    )
    words = ["--script", "training.gpt", "--run_dir", tmp_path / "run", "--data", tmp_path / "none"]
    environment = task(0, MASTER_PORT=str(free_port()))
    starter = (sys.executable, "-c", code)
    result = launch(*words[1:], module=words[0], starter=starter, environment=environment).wait()
    assert result.status == 1, result
    assert_said(result, "error", "ranks", "only 1 of 2 ranks came", "firewall")
    assert_said(result, "error", "data", "no prepared data set")


def test_full_disk_is_an_error_before_the_run_begins(small_disk):
    found = list(run.disk(small_disk / "runs/name"))
    assert found[0].level == "error" and "MB are free" in found[0].text
    (small_disk / "big").write_bytes(bytes(1_500_000))
    with pytest.raises(UserError, match="no space left"):
        list(run.disk(small_disk / "runs/name"))
    assert [path.name for path in small_disk.iterdir()] == ["big"]


def test_packages_are_compared_with_requirements(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"# all\ntorch=={torch.__version__.split('+')[0]}\nnumpy==0.0.1\nno-such-thing==1.0\n")
    found = {each.text: each.level for each in machine.versions(requirements) if isinstance(each, Finding)}
    levels = {text.split()[0]: level for text, level in found.items() if level != "ok"}
    assert levels == {"numpy": "warning", "no-such-thing": "error"}
    assert any(level == "ok" and "1 of 3 packages" in text for text, level in found.items())
    assert any("0.0.1 was tested" in text for text in found)


def test_check_that_breaks_is_a_finding_and_hides_no_other():
    def broken():
        yield Finding("ok", "first", "before it broke")
        raise ZeroDivisionError("so it goes")

    checks = [Check("first", "rank", broken), Check("second", "node", lambda: [Finding("ok", "second", "as ever")])]
    found = merge(checks, [examine(checks, Ranks(), "here")])
    assert [(each.level, each.subject) for each in found] == [("ok", "first"), ("error", "first"), ("ok", "second")]
    assert "ZeroDivisionError: so it goes" in found[1].text


def test_what_all_find_is_said_once_and_what_some_find_with_their_names():
    checks = [Check("disk", "node", list), Check("GPU", "rank", list)]
    full, same = Finding("error", "disk", "full"), Finding("ok", "disk", "there")
    busy = Finding("warning", "GPU", "in use")
    reports = [
        DoctorReport("a", 0, ((same,), (busy, MustMatch("GPU", "type", "T4", "take one")))),
        DoctorReport("a", 1, (None, (MustMatch("GPU", "type", "T4", "take one"),))),
        DoctorReport("b", 2, ((same, full), (MustMatch("GPU", "type", "P100", "take one"),))),
    ]
    assert [each.text for each in merge(checks, reports)] == [
        "there",
        "full [b]",
        "in use [rank 0 on a]",
        "type differs: T4 [rank 0 on a, rank 1 on a], P100 [rank 2 on b]; take one",
    ]


def test_bandwidth_arithmetic():
    # Eight ranks move 64 MB in 1 ms: each link carries 2 x 7/8 of it.
    assert bus_bandwidth(64_000_000, 1e-3, 8) == pytest.approx(112.0)


def test_gpu_is_looked_at_as_torch_describes_it(monkeypatch):
    """A stand-in for the driver, since the tests run without a GPU."""
    about = SimpleNamespace(name="Tesla P100", major=6, minor=0, total_memory=16e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: about}.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(10e9), int(16e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    found = [each for each in machine.gpu(1) if isinstance(each, Finding)]
    assert found[0].level == "ok" and "Tesla P100, sm_60, 16.0 GB" in found[0].text
    assert [each.level for each in found if "6.0 GB of it are in use" in each.text] == ["warning"]


def test_device_that_torch_has_no_kernels_for_is_found_by_working_on_it(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", refuse)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    found, failed = ranks.collectives(Cluster(), ["rank 0 on here"])
    assert failed and found.level == "error"
    assert "rank 0 on here ended in its own work: try another GPU" in found.text
    assert "this one has sm_75, sm_80 (RuntimeError: CUDA error: no kernel image" in found.text


def test_base_model_is_looked_for_and_never_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked the network"))
    (found,) = run.base_model("nobody/nothing", None)
    assert isinstance(found, Finding) and found.level == "warning" and "hf download nobody/nothing" in found.text
    with pytest.raises(UserError, match="holds no model"):
        list(run.base_model(str(tmp_path), None))


def test_options_without_a_config_or_script_and_unknown_scripts_are_errors():
    with pytest.raises(UserError, match="name it first"):
        list(run.config(None, ["--seed", "1"]))
    for script in ("training.none", "training.translation"):
        with pytest.raises(UserError, match=f"{script}.*--script"):
            list(run.config(script, []))


def test_an_address_is_written_to_read_back_and_left_as_it_was(launch, sample_data, tmp_path):
    (tmp_path / "drive").mkdir()
    words = ("--script", "training.gpt", "--run_dir", tmp_path / "run", "--data", sample_data, "--run_at")
    result = launch(*words, f"file://{tmp_path}/drive/run", module=DOCTOR).wait()
    found = lines_of(result)["address"]
    assert [level for level, _ in found] == ["ok", "ok"], result.out
    assert "written and read back" in found[0][1] and "no machine has the run" in found[1][1]
    assert list((tmp_path / "drive").iterdir()) == []
    result = launch(*words, f"file://{tmp_path}/elsewhere/run", module=DOCTOR).wait()
    assert_said(result, "error", "address", "cannot be used", f"there is no folder {tmp_path}/elsewhere")

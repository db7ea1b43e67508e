"""Run folders in places where others write too: what they put there is neither followed nor waited for nor believed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep.layouts import Keys
from data_prep.record_files import files_in
from data_prep.shards import shard_folder
from launch.kaggle.record import RelayRecord
from launch.kaggle.relay import Relay
from launch.slurm.job import JOBS, _error_to_mend, note, read_events
from launch.slurm.status import print_status
from tests.support.commands import Launch
from tests.support.runs import SHORT_RUN, command_of, reference
from tests.training.engine.test_loop import train_here
from training.base.console import UserError, say
from training.base.files import open_in_place, read_plain, sha256_of, temporary_folder, write_atomically
from training.base.options import raw_values
from training.data.tokenizers import load_tokenizer
from training.engine import fork
from training.engine.checkpoint import MANIFEST, _manifest_text, best, checkpoints, newest_valid
from training.engine.metrics import read_metrics
from training.engine.run_folder import RunFolder
from training.engine.status import end_killed_saves, metrics_line, read_sessions, read_status
from training.engine.wandb.log_file import visit_logs
from training.engine.weights import _ancestors
from training.evaluation.translations.report import runs_beside
from training.evaluation.translations.trained import open_trained

SECRET = "a private key\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the user's that nothing here may change or copy."""
    home = tmp_path / "home"
    (home / "documents").mkdir(parents=True)
    for name in ("key", "documents/letter"):
        (home / name).write_text(SECRET)
    return home


def is_untouched(home: Path) -> bool:
    found = {str(path.relative_to(home)): path for path in home.rglob("*")}
    return found.keys() == {"key", "documents", "documents/letter"} and all(
        path.read_text() == SECRET for path in found.values() if path.is_file()
    )


def test_a_run_follows_no_link_that_was_planted_where_it_writes(tmp_path, home, handlers):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "status.json", "sessions.json"):
        (run_dir / f".{name}.partial").symlink_to(home / "key")
    for name in ("lock", "metrics.jsonl"):
        (run_dir / name).symlink_to(home / "key")
    for step in (2, 4, 6, 8):
        (run_dir / f"checkpoints/.step-{step:010}.partial").symlink_to(home / "documents")
        (run_dir / f"checkpoints/.step-{step:010}.replaced").symlink_to(home / "documents")
    assert train_here(tmp_path, checkpoint={"every_steps": 2}) == 0
    assert is_untouched(home)
    assert newest_valid(run_dir) == checkpoints(run_dir)[-1] and read_metrics(run_dir)
    assert not any(path.is_symlink() for path in run_dir.rglob("*"))


@pytest.mark.parametrize("name", ["meta.json", "config.json", "adapter_config.json"])
def test_a_run_is_not_begun_in_prepared_data_a_model_or_an_export(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="a run has a folder of its own"):
        RunFolder(tmp_path).open({}, None, config="", source=None, may_change=set())  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_temporary_name_is_made_anew_whatever_lies_there(tmp_path, home):
    (tmp_path / ".file.partial").symlink_to(home / "key")
    write_atomically(tmp_path / "file", "content")
    for left in ("link", "folder", "file"):
        partial = tmp_path / ".folder.partial"
        if left == "link":
            partial.symlink_to(home / "documents")
        elif left == "folder":
            partial.mkdir()
            (partial / "letter").symlink_to(home / "documents/letter")
        else:
            os.link(home / "key", partial)
        with temporary_folder(tmp_path / "folder") as folder:
            assert folder == partial and list(folder.iterdir()) == [] and not folder.is_symlink()
        partial.rmdir()
    assert (tmp_path / "file").read_text() == "content" and is_untouched(home)


def test_a_private_run_and_its_evaluation_leave_nothing_that_others_may_read(tmp_path, sample_data, launch):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)  # as the launcher, or a session that was not private, has made it
    (run_dir / "metrics.jsonl").touch(mode=0o666)
    (run_dir / "notes").symlink_to(tmp_path / "nothing")
    words = command_of(run_dir, sample_data, *SHORT_RUN, "--optim.steps", 4, "--private", "true")
    assert launch(*words).wait().status == 0
    assert launch(run_dir, "--part", "validation", module="training.evaluation.evaluate").wait().status == 0
    (run_dir / "notes").unlink()
    modes = {path: path.stat().st_mode & 0o777 for path in (run_dir, *run_dir.rglob("*"))}
    assert len(modes) > 10 and {path: mode for path, mode in modes.items() if mode & 0o077} == {}


def test_a_lock_changes_no_file_whose_other_name_it_is(tmp_path, home):
    (tmp_path / "run").mkdir()
    os.link(home / "key", tmp_path / "run/lock")
    folder = RunFolder(tmp_path / "run")
    folder.open({}, SimpleNamespace(kept={}, identity={}), config="", source=None, may_change=set())
    folder.close()
    assert is_untouched(home)


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_what_is_written_in_place_is_a_plain_file(tmp_path, home, kind):
    path = tmp_path / "lines"
    if kind == "link":
        path.symlink_to(home / "key")
    elif kind == "pipe":
        os.mkfifo(path)
    elif os.geteuid() == 0:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
    with open_in_place(path) as file:
        file.write(b"line\n")
    assert path.read_text() == "line\n" and not path.is_symlink() and is_untouched(home)


def test_resuming_from_a_strangers_run_copies_the_files_of_a_run_and_no_links(tmp_path, home, handlers):
    assert train_here(tmp_path, "theirs", stop_at=4) == 75
    theirs = tmp_path / "theirs"
    (theirs / "notes.txt").symlink_to(home / "key")
    (theirs / "wandb.json").symlink_to(home / "key")
    (theirs / "wandb").mkdir()
    (theirs / "wandb/debug.log").symlink_to(home / "key")
    (theirs / "wandb/offline").symlink_to(home / "documents")
    (theirs / "huge.bin").write_bytes(b"x")
    assert train_here(tmp_path, "ours", resume_from=theirs) == 0
    ours = {path.relative_to(tmp_path / "ours").as_posix() for path in (tmp_path / "ours").rglob("*")}
    assert not ours & {"notes.txt", "wandb.json", "wandb/debug.log", "wandb/offline", "huge.bin"}
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "ours").rglob("*") if path.is_file())
    assert len(read_sessions(tmp_path / "ours")) == 2


def test_pipes_and_devices_in_a_run_folder_keep_nobody_waiting(tmp_path, capsys, handlers):
    assert train_here(tmp_path, "good") == 0
    bad = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    for name in ("status.json", "sessions.json", "metrics.jsonl", JOBS, "lock", "wandb.json"):
        (bad / name).unlink(missing_ok=True)
        os.mkfifo(bad / name)
    (last,) = (checkpoint.folder for checkpoint in checkpoints(bad)[-1:])
    (last / "model.safetensors").unlink()
    os.mkfifo(last / "model.safetensors")
    assert read_status(bad) is None and read_sessions(bad) == []
    assert "cannot be read" in (checkpoints(bad)[-1].verify() or "")
    end_killed_saves(bad)
    print_status([str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{tmp_path}/good  finished" in said and f"{tmp_path}/bad" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", {"status": "running", "reason": "x", "restart": True, "step": 1, "steps": 10**400}),
        ("metrics.jsonl", {"kind": "train", "step": 5, "time": 1e308, "loss": 1.0, "tokens_per_s": "fast"}),
        ("slurm.jsonl", {"event": "began", "job": {"a": 1}}),
    ],
)
def test_odd_values_in_one_run_hide_no_other(tmp_path, capsys, name, content):
    for run in ("odd", "plain"):
        (tmp_path / run).mkdir()
        status = {"status": "failed", "reason": "the disk\nis \x1b[31mfull", "restart": True, "step": 1, "steps": 9}
        (tmp_path / run / "status.json").write_text(json.dumps(status))
    (tmp_path / "odd" / name).write_text(json.dumps(content) + "\n")
    print_status([str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{tmp_path}/odd" in said and "\x1b" not in said
    assert f"{tmp_path}/plain  failed: the disk is \\x1b[31mfull  1 of 9" in said


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"step": 4}', '{"step": "4", "files": {}}', '{"step": 4, "files": {"a": 1}}', "[" * 100_000, "\x00"],
)
def test_an_odd_manifest_is_a_damaged_checkpoint(tmp_path, manifest):
    folder = tmp_path / "checkpoints/step-0000000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    (folder / "state.json").write_text("[]")
    (checkpoint,) = checkpoints(tmp_path)
    assert "manifest.json" in (checkpoint.verify() or "")
    assert newest_valid(tmp_path, set_aside=False) is None


def test_what_is_printed_commands_no_terminal(capsys):
    say("\x1b]0;title\x07 runs/\x1b[2Jgpt\r\n\tnext line\x9b1m")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 runs/\\x1b[2Jgpt\\r\n\tnext line\\x9b1m\n"


def test_jobs_are_noted_in_no_file_behind_a_link(tmp_path, home):
    (tmp_path / JOBS).symlink_to(home / "key")
    note(tmp_path, "began", "17", step=0)
    assert [event["job"] for event in read_events(tmp_path)] == ["17"] and is_untouched(home)


def test_a_record_that_is_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "status.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError):
        read_plain(path)
    assert read_status(tmp_path) is None
    path.write_text(json.dumps({"status": "running", "reason": "training", "restart": True}))
    assert read_status(tmp_path) is not None


@pytest.mark.parametrize(
    ("name", "state"),
    [("step-²", "{}"), ("step-0000000004", '{"scores": {"accuracy": "x"}}'), ("step-0000000004", '{"due": []}')],
)
def test_odd_checkpoints_are_no_candidates(tmp_path, name, state):
    folder = tmp_path / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state)
    (tmp_path / "checkpoints/step-0000000005").touch()
    assert best(tmp_path, 1) == [] and newest_valid(tmp_path, set_aside=False) is None


def test_an_error_file_is_read_only_where_it_is_one(tmp_path, home, monkeypatch):
    path = tmp_path / "error-7.txt"
    monkeypatch.setenv("RELAY_ERROR_FILE", str(path))
    path.symlink_to(home / "key")
    assert _error_to_mend() is None
    path.unlink()
    path.write_text("no data")
    assert _error_to_mend() == "no data" and not path.exists()


def test_the_relays_own_folder_is_no_link(tmp_path, home):
    (tmp_path / "kaggle").symlink_to(home)
    relay = SimpleNamespace(_folder=tmp_path / "kaggle")
    assert list(Relay._empty(relay, "documents").iterdir()) == [] and is_untouched(home)


@pytest.mark.parametrize("how", ["a link", "writable for others"])
def test_shards_that_others_can_have_made_are_not_used(tmp_path, how):
    left = tmp_path / ".data.shards"
    real = tmp_path / "theirs" if how == "a link" else left
    real.mkdir(mode=0o755)
    (real / "key.json").write_text('{"a": 1}')
    (real / "train-00000.arrow").write_bytes(b"poison")
    if how == "a link":
        left.symlink_to(real)
    else:
        real.chmod(0o777)
    with shard_folder(tmp_path / "data", {"a": 1}) as folder:
        assert [path.name for path in folder.iterdir()] == ["key.json"]
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_pipe_in_the_place_of_a_tokenizer_or_a_record_keeps_nobody_waiting(tmp_path):
    for name in ("tokenizer.json", "kaggle.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="holds no tokenizer that can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be read; move it away"):
        RelayRecord.read(tmp_path / "kaggle.json")


def test_links_out_of_a_folder_of_records_are_refused(tmp_path, home):
    (tmp_path / "records").mkdir()
    (tmp_path / "records/a.jsonl").symlink_to(home / "key")
    with pytest.raises(UserError, match="a link out of it: copy the file there"):
        files_in(tmp_path / "records", "records", Keys(), text=False)
    hub = tmp_path / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots/1").mkdir(parents=True)
    (hub / "blobs/2").write_text('{"instruction": "a", "output": "b"}\n')
    (hub / "snapshots/1/a.jsonl").symlink_to("../../blobs/2")
    found = files_in(hub / "snapshots/1", "hub", Keys(), text=False)
    assert [file.path.name for file in found] == ["a.jsonl"], "the hub's own layout"


def test_definitions_that_are_no_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has the control character '\\n' in it"):
        raw_values(["--run_dir", "runs/x\n#SBATCH --wrap=touch"])


# Values of other kinds than ours, in a folder that holds together otherwise.


def signed(folder: Path, change: dict[str, object]) -> None:
    """Gives a checkpoint another manifest, which vouches for itself."""
    path = folder / MANIFEST
    found = {**json.loads(path.read_text("utf-8")), **change}
    path.write_text(_manifest_text({key: value for key, value in found.items() if value is not None}), "utf-8")


@pytest.mark.parametrize("change", [{"task": None}, {"data": {"fingerprint": 3}}, {"versions": []}, {"config": "x"}])
def test_manifest_with_values_of_another_kind_is_damage(sample_data, tmp_path, change):
    shutil.copytree(reference(sample_data, *SHORT_RUN, "--optim.steps", 3), tmp_path / "run")
    signed(checkpoints(tmp_path / "run")[-1].folder, change)
    with pytest.raises(UserError, match="no valid checkpoint"):
        open_trained(tmp_path / "run", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "content", ["[]", '{"format": "x", "fingerprint": 3, "files": {}}', "{", '{"fingerprint": "x"}']
)
def test_data_json_of_another_kind_is_one_line(sample_data, tmp_path, content):
    shutil.copytree(reference(sample_data, *SHORT_RUN, "--optim.steps", 3), tmp_path / "run")
    (tmp_path / "run/data.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"data.json cannot be read: copy meta.json"):
        open_trained(tmp_path / "run", device=torch.device("cpu"))


@pytest.mark.parametrize("value", ['"x"', "[1]", '{"a": 1}'])
def test_lines_of_metrics_hold_numbers_alone(value):
    line = b'{"kind": "train", "step": 3, "time": 1.0, "loss": 2.0, "lr": %b}'
    assert metrics_line(line % value.encode()) is None
    for beyond in (b"1e400", b"1" + 400 * b"0"):
        assert metrics_line(line % beyond) == {"kind": "train", "step": 3, "time": 1.0, "loss": 2.0, "lr": None}


def test_scores_of_a_neighbour_are_left_out_where_they_are_none(tmp_path):
    good = {
        "task": "gpt",
        "split": "random",
        "part": "test",
        "synthetic": False,
        "sentences": 3,
        "step": 3,
        "loss": 1.0,
    }
    good |= {"data_fingerprint": "f", "bleu": 1.0, "bleu_interval": [0, 2], "chrf": 1.0, "chrf_interval": [0, 2]}
    odd = ({"bleu": "x"}, {"bleu_interval": 3}, {"sentences": None}, {"chrf": 1e400})
    for name, change in (("own", {}), ("good", {}), *((f"odd-{number}", each) for number, each in enumerate(odd))):
        (tmp_path / name / "evaluation").mkdir(parents=True)
        (tmp_path / name / "evaluation/test.json").write_text(json.dumps({**good, **change}), "utf-8")
    assert [name for name, _ in runs_beside(tmp_path / "own", "test", "gpt")] == ["good"]


def test_checkpoint_of_another_version_is_refused_and_stays(tmp_path, handlers):
    assert train_here(tmp_path) == 0
    for each in checkpoints(tmp_path / "run"):
        path = each.folder / "state.json"
        state = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key != "waited"}
        write_atomically(path, json.dumps(state))
        about = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        signed(each.folder, {"files": {**each.manifest["files"], "state.json": about}})
    with pytest.raises(UserError, match=r"saved by another version of Relay.*, without waited: go on with that one"):
        train_here(tmp_path)
    assert newest_valid(tmp_path / "run", set_aside=False) is not None


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("artifact", "lies elsewhere"),
        ("reference", "lies elsewhere"),
        ("files", "lies elsewhere"),
        ("use_artifact", "a record of kind use_artifact"),
        ("link", "is a link"),
    ],
)
def test_no_file_of_this_machine_is_sent_because_a_strangers_visit_to_wandb_says_so(tmp_path, home, kind, what):
    from wandb.proto.wandb_internal_pb2 import (
        ArtifactManifest,
        ArtifactManifestEntry,
        ArtifactRecord,
        FilesItem,
        FilesRecord,
        Record,
        RunRecord,
        UseArtifactRecord,
    )

    folder = tmp_path / "run/wandb/offline-run-20260101_000000-abc"
    (folder / "files").mkdir(parents=True)
    (folder / "files/own.txt").write_text("own")
    if kind == "link":
        (folder / "files/key").symlink_to(home / "key")
    entries = {"artifact": {"local_path": str(home / "key")}, "reference": {"ref": f"file://{home}/key"}}
    records = [Record(run=RunRecord(run_id="abc")), Record(files=FilesRecord(files=[FilesItem(path="own.txt")]))]
    if kind in entries:
        manifest = ArtifactManifest(contents=[ArtifactManifestEntry(path="loot", **entries[kind])])
        records.append(Record(artifact=ArtifactRecord(name="loot", manifest=manifest)))
    elif kind == "files":
        records.append(Record(files=FilesRecord(files=[FilesItem(path=f"../../../../{home.name}/key")])))
    elif kind == "use_artifact":
        records.append(Record(use_artifact=UseArtifactRecord(id="1")))
    content = b":W&B" + 3 * b"\0"
    for text in (record.SerializeToString() for record in records):
        content += struct.pack("<IHB", zlib.crc32(b"\1" + text), len(text), 1) + text
    (folder / "run-abc.wandb").write_bytes(content)
    (log,) = visit_logs(tmp_path / "run", "abc")
    assert log.begun and what in (log.odd or ""), log


def test_a_pipe_in_the_place_of_a_visit_to_wandb_keeps_nobody_waiting(tmp_path, home):
    folder = tmp_path / "run/wandb/offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "run-abc.wandb")
    assert visit_logs(tmp_path / "run", "abc") == []


@pytest.mark.parametrize("change", [{"number": "x/../../../home"}, {"kernel": "me/../home"}, {"previous": ["/"]}])
def test_the_record_of_a_relay_names_no_folder(tmp_path, change):
    run = {"number": 1, "kernel": "me/relay-a", "version": 1, "previous": [], "pushed": None}
    path = tmp_path / "kaggle.json"
    path.write_text(json.dumps({"dataset": {"name": "me/relay-files"}, "kernel_runs": [run]}))
    assert RelayRecord.read(path).kernel_runs[0].number == 1
    path.write_text(json.dumps({"dataset": {}, "kernel_runs": [{**run, **change}]}))
    with pytest.raises(UserError, match="cannot be read; move it away"):
        RelayRecord.read(path)


def test_what_a_run_was_is_not_taken_to_be_in_a_folder_that_somebody_else_has_filled(sample_data, tmp_path):
    run_dir = tmp_path / "runs/gpt"
    shutil.copytree(reference(sample_data, *SHORT_RUN, "--optim.steps", 4), run_dir)
    latest = checkpoints(run_dir)[-1]
    planted = tmp_path / f"runs/gpt-at-4/checkpoints/{latest.folder.name}"
    planted.mkdir(parents=True)
    shutil.copy(latest.folder / MANIFEST, planted)
    aside = fork.set_aside(run_dir, latest)
    assert aside.name == "gpt-at-4-2" and checkpoints(aside)[-1].verify() is None
    assert fork.set_aside(run_dir, latest) == aside, "after a kill, the same"
    for name in (".gpt-at-4.partial", ".gpt-at-home-at-4.partial"):
        (tmp_path / "runs" / name).mkdir()
    fork.remove_unfinished(run_dir)
    assert [path.name for path in (tmp_path / "runs").glob(".*")] == [".gpt-at-home-at-4.partial"], "another run's"


def test_what_a_stranger_says_of_its_weights_is_kept_within_bounds():
    found: dict[str, object] = {"run": "a", "checkpoints": {"3": "0" * 64}}
    for _ in range(199):
        found = {**found, "init_from": found}
    kept, depth = _ancestors({"init_from": found}), 0
    while kept:
        kept, depth = kept["init_from"], depth + 1
        kept = {"init_from": kept["init_from"]} if "init_from" in kept else {}
    assert depth == 20
    for odd in ([], "x", {"run": 1, "checkpoints": {}}, {"run": "x" * 10**6, "checkpoints": {}}, {"run": "a"}):
        assert _ancestors({"init_from": odd}) == {}


def test_a_command_of_the_users_is_in_nothing_that_others_get(launch: Launch, sample_data, tmp_path):
    words = (*SHORT_RUN, "--optim.steps", 4, "--session.on_end", "true a-secret-address")
    assert launch(*command_of(tmp_path / "run", sample_data, *words)).wait().status == 0
    told = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file() and b"a-secret" in path.read_bytes()]
    assert told == ["config.yaml"]

"""Reading a prepared data set, and the one place that writes files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data_prep import pairs
from data_prep.sources import sample_lines
from tests.support.commands import ROOT
from training.base import known_files
from training.base.console import UserError
from training.base.files import open_atomically, publish_folder, recover, sha256_of, temporary_folder, write_atomically
from training.data.conversations import open_conversations
from training.data.prepared import PARTS, Prepared, Ragged, list_files, open_prepared


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Prepared:
    output = tmp_path_factory.mktemp("prepared") / "sample"
    assert pairs.main(["--source", "sample", "--output", str(output)]) == 0
    return open_prepared(output)


@pytest.fixture
def copy(sample, tmp_path) -> Path:
    return shutil.copytree(sample.folder, tmp_path / "copy")


def test_ids_are_views_on_the_file_and_decode_to_the_texts(sample):
    pairs = [tuple(line.split("\t")[:2]) for line in sample_lines()]
    for name in PARTS:
        allocated = pa.total_allocated_bytes()
        part = sample.part(name)
        assert pa.total_allocated_bytes() == allocated, "copied instead of memory-mapped"
        for ids in (part.source, part.target):
            assert ids.values.dtype == np.int32 and ids.offsets.dtype == np.int64
            assert not ids.values.flags.owndata and not ids.values.flags.writeable and not ids.offsets.flags.owndata
            assert ids.lengths.sum() == len(ids.values)
        for row in range(0, len(part), 97):
            assert (part.target_texts[row], part.source_texts[row]) == pairs[part.rows[row]]
            assert part.source[row].tolist() == sample.source_tokenizer.encode(part.source_texts[row])
            assert part.target[row].tolist() == sample.target_tokenizer.encode(part.target_texts[row])
        assert len(part) == len(part.source) == len(part.target) == len(part.source_texts) == sample.meta["rows"][name]
        assert part.source_texts[:3] == list(part.source_texts)[:3]


def test_padded_rows_stand_side_by_side_with_fill_behind():
    ragged = Ragged(np.array([7, 8, 9, 5], dtype=np.int32), np.array([0, 2, 2, 3, 4]))
    assert len(ragged) == 4 and ragged.lengths.tolist() == [2, 0, 1, 1]
    assert ragged.padded([2, 0, 1, 0], fill=-1).tolist() == [[9, -1], [7, 8], [-1, -1], [7, 8]]
    assert ragged.padded(np.array([1]), fill=0).shape == (1, 0)
    assert ragged.padded([], fill=0).shape == (0, 0)
    taken = ragged.take(np.array([3, 1, 0]))
    assert taken.values.tolist() == [5, 7, 8] and taken.offsets.tolist() == [0, 1, 1, 3]
    assert ragged[-1].tolist() == [5] and [row.tolist() for row in ragged] == [[7, 8], [], [9], [5]]
    with pytest.raises(IndexError):
        ragged[4]


def test_datasets_library_reads_the_parts_and_what_it_saves_again_is_read_too(sample, copy):
    part = sample.part("train")
    loaded = datasets.load_from_disk(str(sample.folder / "train"))
    assert loaded[5]["source"] == part.source_texts[5] and loaded[5]["target_ids"] == part.target[5].tolist()
    assert loaded[5]["attribution"].startswith("Relay sample corpus")
    shutil.rmtree(copy / "train")
    loaded.save_to_disk(str(copy / "train"), num_shards=3)
    meta = json.loads((copy / "meta.json").read_text(encoding="utf-8"))
    meta["files"] = {name: about for name, about in list_files(copy).items() if name != "meta.json"}
    (copy / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    again = open_prepared(copy).part("train")
    np.testing.assert_array_equal(again.source.values, part.source.values)
    np.testing.assert_array_equal(again.target.offsets, part.target.offsets)
    assert list(again.source_texts) == list(part.source_texts)


def test_same_preparation_elsewhere_has_the_same_files(sample, tmp_path):
    words = ["--source", "sample", "--output", str(tmp_path / "other name")]
    subprocess.run([sys.executable, "-m", "data_prep.pairs", *words], cwd=ROOT, check=True, capture_output=True)
    other = open_prepared(tmp_path / "other name")
    assert other.fingerprint == sample.fingerprint
    assert other.meta["files"] == sample.meta["files"]


def test_missing_folder_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"there is no prepared .*python -m data_prep.pairs .*--output"):
        open_prepared(tmp_path / "nothing")


def test_half_written_folder_is_refused(copy):
    (copy / "meta.json").write_text('{"format": ')
    with pytest.raises(UserError, match="cannot be read"):
        open_prepared(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(UserError, match="no complete prepared data set"):
        open_prepared(copy)


def test_folder_of_another_kind_is_not_to_be_prepared_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"is a run's folder \(it holds checkpoints\): name the folder that"):
        open_prepared(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"is no prepared data set \(it holds config.json\)"):
        open_prepared(tmp_path)


def test_lacking_part_is_named(copy, sample):
    shutil.rmtree(copy / "validation")
    with pytest.raises(UserError, match="lacks validation"):
        open_prepared(copy)
    with pytest.raises(UserError, match="train, validation, test"):
        sample.part("dev")


def test_data_of_another_kind_are_called_what_they_are(copy):
    (copy / "meta.json").write_text('{"format": "relay-conversations-1"}')
    with pytest.raises(UserError, match=r"holds conversations \(.*, and sentence pairs .* are expected"):
        open_prepared(copy)
    (copy / "meta.json").write_text('{"format": "relay-sentence-pairs-1"}')
    with pytest.raises(UserError, match=r"holds sentence pairs \(.*, and conversations .* are expected"):
        open_conversations(copy)
    with pytest.raises(UserError, match=r"meta.json is a file, .*: make that with `python -m data_prep.pairs"):
        open_prepared(copy / "meta.json")


def test_another_format_is_refused(copy):
    (copy / "meta.json").write_text('{"format": "relay-sentence-pairs-0"}')
    with pytest.raises(UserError, match="relay-sentence-pairs-1"):
        open_prepared(copy)


def test_truncated_or_missing_file_is_noticed_on_opening(copy):
    (data,) = (copy / "test").glob("data-*.arrow")
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"test/data-.* has .* bytes instead of"):
        open_prepared(copy)
    data.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_prepared(copy)


def test_flipped_bit_is_noticed_by_verify(copy):
    open_prepared(copy).verify()
    (data,) = (copy / "test").glob("data-*.arrow")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="changed or damaged"):
        open_prepared(copy).verify()


def forged(folder: Path, part: str, change: Callable[[dict[str, pa.Array]], None]) -> None:
    """Changes columns as somebody would who has prepared the data so: everything that meta.json says fits."""
    (path,) = (folder / part).glob("data-*.arrow")
    table = pa.ipc.open_stream(path.read_bytes()).read_all().combine_chunks()
    columns = {name: table.column(name).chunk(0) for name in table.column_names}
    change(columns)
    path.unlink()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["files"] = {name: about for name, about in list_files(folder).items() if name != "meta.json"}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def far_offset(columns: dict[str, pa.Array]) -> None:
    ids = columns["source_ids"]
    offsets = ids.offsets.to_numpy().copy()
    offsets[3] = 1 << 40
    columns["source_ids"] = pa.LargeListArray.from_buffers(
        ids.type, len(ids), [None, pa.py_buffer(offsets)], children=[ids.values]
    )


def text_beyond_its_buffer(columns: dict[str, pa.Array]) -> None:
    texts = columns["target"]
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int64)[: len(texts) + 1].copy()
    offsets[3] = 1 << 40
    buffers = [None, pa.py_buffer(offsets), texts.buffers()[2]]
    columns["target"] = pa.Array.from_buffers(pa.large_string(), len(texts), buffers)


def strange_id(columns: dict[str, pa.Array]) -> None:
    ids = columns["target_ids"]
    values = ids.values.to_numpy().copy()
    values[7] = 10**6
    columns["target_ids"] = pa.LargeListArray.from_arrays(ids.offsets, pa.array(values))


def negative_id(columns: dict[str, pa.Array]) -> None:
    columns["source_ids"] = pa.array([[-1]] * len(columns["row"]), pa.large_list(pa.int32()))


def other_kind(columns: dict[str, pa.Array]) -> None:
    columns["row"] = columns["source"]


def lacking_value(columns: dict[str, pa.Array]) -> None:
    columns["source"] = pa.array([None] * len(columns["row"]), pa.large_string())


@pytest.mark.parametrize(
    "change", [far_offset, text_beyond_its_buffer, strange_id, negative_id, other_kind, lacking_value]
)
def test_forged_content_is_refused_before_anything_is_read_by_it(copy, change):
    forged(copy, "validation", change)
    with pytest.raises(UserError, match=r"the validation part of .* is not as Relay writes it"):
        open_prepared(copy)


@pytest.mark.parametrize("name", ["train/data-9.arrow", "tokenizer/source/chat_template.jinja"])
def test_files_that_nobody_prepared_are_refused(copy, name):
    (copy / name).write_text("{{ 1 }}")
    with pytest.raises(UserError, match=f"has files that meta.json does not list, such as {name}"):
        open_prepared(copy)


def test_links_and_paths_out_of_the_folder_are_no_files_of_it(copy, tmp_path):
    (data,) = (copy / "test").glob("data-*.arrow")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is missing"):
        open_prepared(copy)
    meta = json.loads((copy / "meta.json").read_text(encoding="utf-8"))
    for name in ("../secret", "/etc/passwd", "test/.hidden", "test//x"):
        (copy / "meta.json").write_text(json.dumps({**meta, "files": {name: {"bytes": 1, "sha256": "0"}}}))
        with pytest.raises(UserError, match="does not list the files"):
            open_prepared(copy)


def test_what_was_checked_once_is_not_read_again_until_it_changes(copy, monkeypatch):
    monkeypatch.setattr(known_files, "_SETTLED_S", -1)
    open_prepared(copy)
    read: list[Path] = []
    monkeypatch.setattr(known_files, "sha256_of", lambda path: (read.append(path), sha256_of(path))[1])
    monkeypatch.setattr(Prepared, "_check_part", lambda *_: pytest.fail("checked again"))
    open_prepared(copy)
    assert read == []
    (data,) = (copy / "test").glob("data-*.arrow")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="changed or damaged"):
        open_prepared(copy)
    assert read == [data]


def test_reading_needs_neither_torch_nor_the_datasets_library(sample):
    program = (
        "import sys; from training.data.prepared import open_prepared; open_prepared(sys.argv[1]).part('train')\n"
        "print([name for name in ('torch', 'datasets', 'opencc') if name in sys.modules])"
    )
    words = [sys.executable, "-c", program, str(sample.folder)]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_failed_write_keeps_the_previous_file_and_no_temporary(tmp_path):
    write_atomically(tmp_path / "status.json", "first")
    with pytest.raises(RuntimeError), open_atomically(tmp_path / "status.json") as file:
        file.write(b"second, not finished")
        raise RuntimeError
    assert (tmp_path / "status.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    write_atomically(tmp_path / "status.json", b"third")
    assert (tmp_path / "status.json").read_bytes() == b"third"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_kill_during_a_write_keeps_the_previous_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "status.json"
    write_atomically(path, "first")
    program = (
        "import sys, time, pathlib; from training.base.files import open_atomically\n"
        "with open_atomically(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'x' * 100000); file.flush(); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == "first"
    write_atomically(path, "second")
    assert [left.name for left in tmp_path.iterdir()] == ["status.json"]


def test_folder_is_published_whole_or_not_at_all(tmp_path):
    final = tmp_path / "step-10"
    with pytest.raises(RuntimeError), temporary_folder(final) as temporary:
        (temporary / "model").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with temporary_folder(final) as temporary:
        (temporary / "deep").mkdir()
        write_atomically(temporary / "deep/model", "whole")
        assert not final.exists()
        publish_folder(temporary, final)
    assert (final / "deep/model").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def test_published_folder_is_not_replaced_unless_asked_and_survives_a_failed_replacement(tmp_path):
    final = tmp_path / "x"
    for text in ("first", "second"):
        with temporary_folder(final) as temporary:
            (temporary / "file").write_text(text)
            publish_folder(temporary, final, replace=True)
    with pytest.raises(OSError), temporary_folder(final) as temporary:
        (temporary / "file").write_text("third")
        publish_folder(temporary, final)
    with pytest.raises(OSError):
        publish_folder(tmp_path / "nothing", final, replace=True)
    assert (final / "file").read_text() == "second"
    assert not recover(final)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_file_or_folder_is_on_the_disk_before_it_has_its_name_and_the_name_behind_it(tmp_path, monkeypatch):
    events = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def watch(kind, work):
        def watched(path, to):
            events.append((kind, to.name))
            return work(path, to)

        return watched

    def watch_fsync(descriptor):
        fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_ino))

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch("named", rename))
    monkeypatch.setattr(Path, "replace", watch("named", replace))
    write_atomically(tmp_path / "file", "text")
    on_disk = [("fsync", path.stat().st_ino) for path in (tmp_path / "file", tmp_path)]
    assert events == [on_disk[0], ("named", "file"), on_disk[1]]

    events.clear()
    with temporary_folder(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep/model").write_text("whole")
        publish_folder(temporary, tmp_path / "folder")
    paths = (tmp_path / "folder/deep/model", tmp_path / "folder/deep", tmp_path / "folder")
    inner = [("fsync", path.stat().st_ino) for path in paths]
    assert events == [*inner, ("named", "folder"), on_disk[1]]


def test_a_folder_that_another_process_begins_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    final, system_open, others = tmp_path / "folder", os.open, []

    def open_too_early(path: Path, flags: int, *mode: int) -> int:
        if not others and flags & os.O_DIRECTORY:
            others.append(temporary_folder(final))
            (others[0].__enter__() / "begun").touch()
            raise FileNotFoundError
        return system_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_too_early)
    with pytest.raises(UserError, match="another process is writing"), temporary_folder(final):
        pass
    assert (tmp_path / ".folder.partial/begun").exists()
    others[0].__exit__(None, None, None)


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

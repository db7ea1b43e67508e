"""From a config file to its training."""

from __future__ import annotations

import pytest

from launch.scripts import read_options, script_of


@pytest.mark.parametrize(
    ("line", "script"), [("", "training.gpt"), ("training: training.seq2seq\n", "training.seq2seq")]
)
def test_config_says_what_it_is_for_or_its_folder_does(tmp_path, line: str, script: str):
    config = tmp_path / "gpt/mine.yaml"
    config.parent.mkdir()
    config.write_text(f"{line}run_dir: runs/x\ndata: prepared/x\n", encoding="utf-8")
    assert script_of(config) == script
    options = read_options(script, [str(config)])
    assert type(options).__module__ == script and str(options.run_dir) == "runs/x"


def test_folder_decides_where_there_is_no_config_that_could_be_read(tmp_path):
    assert script_of(tmp_path / "seq2seq/none.yaml") == "training.seq2seq"
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/torn.yaml").write_text("a: [", encoding="utf-8")
    assert script_of(tmp_path / "gpt/torn.yaml") == "training.gpt"

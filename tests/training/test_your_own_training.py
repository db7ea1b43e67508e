"""The example of docs/your_own_training.md is what it says: a training that is killed and ends as if it never was."""

from __future__ import annotations

import re

import pytest

from tests.support.commands import ROOT, Launch
from tests.support.runs import assert_same_model, assert_same_record, losses


@pytest.mark.whole
def test_example_is_short_and_resumes_bit_for_bit(launch: Launch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/your_own_training.md").read_text("utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 80
    (tmp_path / "characters.py").write_text(code, encoding="utf-8")
    words = (
        *("--data", ROOT / "data_prep/sample.tsv", "--batch.tokens_per_micro_batch", 512),
        *("--optim.steps", 60, "--optim.warmup_steps", 4, "--optim.lr", 0.01, "--checkpoint.every_steps", 5),
        *("--log.every_steps", 1, "--log.validate_every_steps", 15),
    )

    def start(name: str):
        environment = {"PYTHONPATH": str(tmp_path)}
        return launch("--run_dir", tmp_path / name, *words, module="characters", environment=environment)

    whole = start("whole").wait()
    assert whole.status == 0, whole
    killed = start("run")
    killed.wait_for_step(tmp_path / "run", 12)
    killed.kill_all()
    resumed = start("run").wait()
    assert resumed.status == 0 and "resuming at step" in resumed.out, resumed
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    assert_same_record(tmp_path / "run", tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < 0.9 * losses(tmp_path / "whole")[0]

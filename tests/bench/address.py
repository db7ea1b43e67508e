"""What an address costs a training: the processor's time to send a checkpoint, beside that of the steps between two.

The GPT of configs/gpt/plain.yaml is trained for some steps, and its checkpoint sent to a drive, an SFTP server and
a bucket on this machine. Counted is the processor's time of this process, all threads, so that what else the machine
does plays no part: a training on a GPU has processors to spare for it, one on a CPU loses that much. The servers' own
time is not counted, since an address is elsewhere.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.bench.common import NO_RUN, PLAIN, Figure, read_arguments, report
from tests.support.addresses import bucket, sftp_server
from training.base.console import run_main, say
from training.base.options import parse
from training.engine.address.home import Home
from training.engine.checkpoint import bytes_of, publish, tensors_of
from training.gpt import GPTConfig
from training.models.gpt import GPT, Vocabularies

VOCABULARY = 8000
EVERY_STEPS, MICRO_BATCHES, SENTENCES, WORDS = 250, 4, 40, 25  # 1,000 tokens a micro-batch


def processor_s(model: GPT, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """The processor's time of a step, the mean of so many behind a first one."""
    for step in range(steps + 1):
        for _ in range(MICRO_BATCHES):
            tokens = torch.randint(0, VOCABULARY, (SENTENCES, WORDS + 1))
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            began = time.process_time()
    return (time.process_time() - began) / steps


@contextmanager
def addresses(folder: Path) -> Iterator[dict[str, str]]:
    """A URL of each kind."""
    (folder / "drive").mkdir()
    with sftp_server(folder / "ssh") as server, bucket() as s3:
        yield {"drive": f"file://{folder}/drive/run", "sftp": f"{server.address.url}/run", "s3": f"{s3.url}/run"}


def send(url: str, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], times: int) -> float:
    """The processor's time of a checkpoint from when it is published to when it has arrived, the mean of so many."""
    (folder / "checkpoints").mkdir(parents=True)
    home = Home(url, folder)
    home.open(None, lambda checkpoint: None)
    home.start()
    spent = 0.0
    for step in range(times + 1):
        publish(folder, step, tensors, state={"scores": {}}, about=NO_RUN, keep=2)
        began = time.process_time()
        home.notice()
        while len(home.uploads_s) <= step:
            time.sleep(0.01)
        spent += (time.process_time() - began) if step else 0  # the first one also sets things up
    home.finish(60)
    home.close()
    shutil.rmtree(folder)
    return spent / times


def main(words: Sequence[str] | None = None) -> int:
    arguments = read_arguments("address", __doc__, words)
    steps, times = arguments.sized(whole=(10, 5), quick=(4, 3), smoke=(1, 1))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, _ = parse(GPTConfig, [str(PLAIN)], prog="python -m training.gpt", about="")
    model = GPT(config.model, Vocabularies(VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step_s = processor_s(model, optimizer, steps)
    tensors = tensors_of(model, optimizer)
    say(f"a checkpoint of {bytes_of(tensors) / 1e6:,.1f} MB; a step takes {step_s:.3f} s of the processor")
    figures = []
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as name, addresses(Path(name)) as places:
        for kind, url in places.items():
            spent_s = send(url, Path(name, "run"), tensors, times)
            say(f"{kind}: {spent_s:.3f} s, {spent_s / (EVERY_STEPS * step_s):.3%} of {EVERY_STEPS} steps")
            meaning = f"sending a checkpoint, over {EVERY_STEPS} steps"
            figures.append(Figure(f"{kind}_share", spent_s / (EVERY_STEPS * step_s), meaning, "< 0.01"))
    report("address", arguments, figures)
    return 0


if __name__ == "__main__":
    run_main(main)

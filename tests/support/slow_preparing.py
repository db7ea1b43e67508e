"""A preparation of conversations, each shard of which takes a second more, but for the first: time to kill it.

python -m tests.support.slow_preparing data_prep.disc_law --source ... --output ...
"""

from __future__ import annotations

import importlib
import sys
import time

from data_prep import conversation_rows
from training.base.console import run_main

_make_shard = conversation_rows._make_shard


def make_shard(shard: conversation_rows.Shard) -> int:
    if shard.path.name != "train-00000.arrow":
        time.sleep(1)
    return _make_shard(shard)


if __name__ == "__main__":
    from tests.support import slow_preparing  # which workers find by this name

    conversation_rows._make_shard = slow_preparing.make_shard
    main = importlib.import_module(sys.argv[1]).main
    run_main(lambda: main(sys.argv[2:]))

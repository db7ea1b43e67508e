"""From a config file to the training that it is for: its options, read as the script itself would read them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from training.base.console import UserError
from training.base.options import parse, raw_values
from training.engine.task import RunOptions


def script_of(config: Path) -> str:
    """The module that trains by a config file: what its key `training` says, or `training.NAME` for configs/NAME/..."""
    named = None
    if config.is_file():
        with suppress(UserError):  # whoever reads all of it tells what is wrong with it
            named = raw_values([str(config)]).get("training")
    return str(named) if named else f"training.{config.resolve().parent.name}"


def read_options(script: str, words: Sequence[str]) -> RunOptions:
    """The options `words` as the module `script` reads them. Raises UserError with every mistake in them."""
    try:
        found = vars(importlib.import_module(script)).values()
    except ModuleNotFoundError as error:
        if error.name is None or not script.startswith(error.name):
            raise  # the script is there, and something that it needs is not
        raise UserError(f"there is no module {script}: name it by --script, as in --script training.gpt") from None
    options = [each for each in found if isinstance(each, type) and issubclass(each, RunOptions)]
    own = [each for each in options if each.__module__ == script]
    if not own:
        raise UserError(f"{script} is no training: name one by --script, as in --script training.gpt")
    return parse(own[0], words, prog=f"python -m {script}", about="")[0]

"""Talks with what a run has trained, or with an export of it.

    python -m training.evaluation.chat runs/QLORA            # or exports/law, or the folder of any chat model
    python -m training.evaluation.chat runs/TRANSLATOR       # a sentence a line
    python -m training.evaluation.chat runs/NAME < questions.txt

An answer appears while it comes, and the model remembers the conversation. On a line of its own, /base shows what the
base model, its adapters switched off, answers to the last question, and /new begins another conversation; for a
translator /attention FILE.svg draws what the last translation looked at. At a terminal, Ctrl-C ends an answer, and
Ctrl-D, or Ctrl-C again, the program. From a pipe a line is a question, and only answers are printed.

Promises: greedy, as `evaluate` answers; a line that cannot be asked is named, and the next one is.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from training.base.console import UserError, run_main, say, say_part, warn
from training.base.files import check_folder_of, write_atomically, writing_to
from training.base.options import CommandLine
from training.data.text import split_lines
from training.engine.cluster import Cluster
from training.evaluation.runs import QLORA, TRANSLATION, kind_of
from training.evaluation.setting import (
    NEW_TOKENS,
    OptionsOf,
    add_base_options,
    add_model_options,
    add_search_options,
    search_of,
)

_COMMAND = re.compile(r"/[a-z]+|/(base|new)\b.*", re.IGNORECASE)  # as a line; a question may begin with a path


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.chat", __doc__.partition("\n\nPromises:")[0])
    add_model_options(parser, several=True)
    of_answers, of_translations = OptionsOf(QLORA, parser), OptionsOf(TRANSLATION, parser)
    of_answers.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")
    of_answers.add_argument("--max_new_tokens", type=int, metavar="N", help=f"of an answer (default {NEW_TOKENS})")
    add_base_options(of_answers)
    add_search_options(of_translations)
    arguments = parser.parse_args(argv)
    kind = kind_of(arguments.run_dir) or QLORA  # an export, or what is refused when it is opened
    for options in (of_answers, of_translations):
        options.check(arguments, kind)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")
    with Cluster() as cluster:
        if cluster.world_size > 1:
            raise UserError("a chat runs as one process: start it with python, not with torchrun")
        (_translations if kind == TRANSLATION else _answers)(arguments, cluster)
    return 0


# What one kind needs is imported for that kind only: transformers and peft take seconds.


def _answers(arguments: Namespace, cluster: Cluster) -> None:
    from training.evaluation.chat_model.conversation import Conversation, open_chat

    opened = open_chat(
        arguments.run_dir,
        arguments.checkpoint,
        device=cluster.device,
        base_model=arguments.base_model,
        precision=arguments.precision,
    )
    most = arguments.max_new_tokens or NEW_TOKENS
    conversation = Conversation(opened, system=arguments.system, max_new_tokens=most)

    def tell(answer: Callable[[Callable[[str], None]], bool]) -> None:
        ended = answer(say_part)
        say()
        if not ended:
            warn(f"the answer was cut off: --max_new_tokens {most}, or the end of the model's context")

    def work(text: str) -> None:
        if text == "/new":
            conversation.begin_anew()
        elif text == "/base":
            tell(conversation.ask_base)
        elif _COMMAND.fullmatch(text):
            raise UserError(f"there is no {text}, only /base and /new")
        else:
            tell(lambda show: conversation.ask(text, show))

    of_base = "/base is the base model's answer, " if opened.has_adapters else ""
    _for_each_line(work, f"{opened.name}: {of_base}/new begins another conversation")


def _translations(arguments: Namespace, cluster: Cluster) -> None:
    from training.data.tokenizers import UNK
    from training.evaluation.translations.trained import open_translator
    from training.models.decoding import translate

    search = search_of(arguments)
    trained = open_translator(arguments.run_dir, arguments.checkpoint, device=cluster.device)
    last: tuple[list[int], list[int]] | None = None  # source and translation

    def work(text: str) -> None:
        nonlocal last
        command, _, name = text.partition(" ")
        if command == "/attention":
            draw(name.strip())
            return
        if _COMMAND.fullmatch(text):
            raise UserError(f"there is no {text}, only /attention FILE.svg")
        source = trained.encode(text)
        (result,) = translate(
            trained.decoder, [source], beam_size=search.beam_size, length_penalty=search.length_penalty
        )
        if result.problem is not None:
            raise UserError(result.problem)
        say(trained.target_tokenizer.decode(result.ids))
        last = source, result.ids
        if not result.ended:
            warn(f"the translation was cut off after {len(result.ids)} tokens")
        if UNK in source:
            warn("the sentence holds characters that the model does not know (<unk>)")

    def draw(name: str) -> None:
        if not name or last is None:
            raise UserError("/attention FILE.svg draws what the last translation looked at; translate a sentence first")
        path = Path(name)
        if path.exists():
            raise UserError(f"{path} is there already: name another file")
        sheet = trained.decoder.attention(*last, trained.source_tokenizer, trained.target_tokenizer)
        if sheet is None:
            raise UserError("there is no map: no attention, several models, or a sentence longer than the context")
        check_folder_of(path, "/attention")
        with writing_to(path, "/attention"):
            write_atomically(path, sheet.svg())

    directed = " to ".join(map(str, trained.languages))
    _for_each_line(work, f"{arguments.run_dir}, {directed}: /attention FILE.svg draws what a translation looked at")


def _for_each_line(work: Callable[[str], None], greeting: str) -> None:
    """Calls `work` with each line of standard input; what it refuses is named, and the next line is read.

    At a terminal Ctrl-C ends the work on a line.
    """
    is_typed = sys.stdin.isatty()
    if is_typed:
        say(f"{greeting}, Ctrl-D ends")
    for number, line in enumerate(_typed() if is_typed else split_lines(sys.stdin.buffer), 1):
        where = "" if is_typed else f"line {number}: "
        try:
            if text := line.decode().strip("\ufeff \t"):
                work(text)
        except UnicodeDecodeError:
            warn(f"{where}this is not UTF-8, and was not read")
        except UserError as error:
            warn(f"{where}{error}")
        except KeyboardInterrupt:
            if not is_typed:
                raise
            say(" (stopped)")


def _typed() -> Iterator[bytes]:
    """What is typed at the terminal, line by line."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets the line be edited, and earlier ones come back
    while True:
        try:
            yield input("> ").encode("utf-8", "surrogateescape")
        except UnicodeDecodeError as error:
            yield error.object
        except (EOFError, KeyboardInterrupt) as end:
            say()
            if isinstance(end, KeyboardInterrupt):
                raise
            return


if __name__ == "__main__":
    run_main(main, prints_product=True)

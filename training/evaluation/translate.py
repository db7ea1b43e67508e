"""Translates sentences with a trained model, one a line.

    python -m training.evaluation.translate runs/NAME "你好。"
    python -m training.evaluation.translate runs/NAME --checkpoint last "你好。" "谢谢。"
    python -m training.evaluation.translate runs/NAME --input source.txt --output target.txt --beam_size 5
    cat source.txt | python -m training.evaluation.translate runs/NAME > target.txt

Promises: line N of the output belongs to line N of the input, whatever becomes of it; what cannot be translated is
named on standard error with its line number and leaves an empty line; what the model does not know is `<unk>` in the
text, and counted; a file larger than memory is no problem. A file that is not UTF-8 is refused before any of it is
translated, with the command that converts it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from training.base.console import UserError, run_main, say, warn
from training.base.files import check_folder_of, open_atomically, writing_to
from training.base.options import CommandLine
from training.data.text import encoding_advice, split_lines
from training.data.tokenizers import UNK
from training.engine.cluster import Cluster
from training.evaluation.runs import QLORA, kind_of
from training.evaluation.setting import Search, add_model_options, add_search_options, search_of
from training.evaluation.translations.trained import TrainedModel, open_translator
from training.models.decoding import translate

# Sentences are sorted by length within a block, so a block holds many batches; in memory it is nothing.
LINES_PER_BLOCK = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine("python -m training.evaluation.translate", __doc__.split("\n")[0])
    add_model_options(parser, several=True)
    add_search_options(parser)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="sentences (default: standard input)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="UTF-8 text, a sentence a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default standard output; appears when complete")
    arguments = parser.parse_intermixed_args(argv)  # sentences may stand behind options, too
    if arguments.input and arguments.sentences:
        raise UserError("both sentences and --input were given; leave one out")
    if arguments.output is not None:
        check_folder_of(arguments.output)
        if arguments.input is not None and arguments.output.resolve() == arguments.input.resolve():
            raise UserError(f"--output {arguments.output} would replace what --input reads: name another file")
    search = search_of(arguments)
    if kind_of(arguments.run_dir) == QLORA:
        raise UserError(
            f"{arguments.run_dir} is a {QLORA} run, which answers questions and does not translate: "
            f"`python -m training.evaluation.chat {arguments.run_dir}` talks with it"
        )
    with Cluster() as cluster, ExitStack() as files:
        if cluster.world_size > 1:
            raise UserError("translation runs as one process: start it with python, not with torchrun")
        if arguments.sentences:
            lines: Iterable[bytes] = (sentence.encode("utf-8", "surrogateescape") for sentence in arguments.sentences)
        elif arguments.input:
            lines = split_lines(files.enter_context(_opened(arguments.input)))
        else:
            lines = split_lines(sys.stdin.buffer)
        trained = open_translator(arguments.run_dir, arguments.checkpoint, device=cluster.device)
        # Whoever types at a terminal wants an answer to every line.
        typed = not (arguments.sentences or arguments.input) and sys.stdin.isatty()
        if not typed:
            lines = _checked(lines, arguments.input)
        translations = translate_lines(trained, lines, search, lines_per_block=1 if typed else LINES_PER_BLOCK)
        if arguments.output is None:
            for translation in translations:
                say(translation)
            return 0
        with writing_to(arguments.output), open_atomically(arguments.output) as output:
            for translation in translations:
                output.write(translation.encode() + b"\n")
    return 0


def translate_lines(
    trained: TrainedModel, lines: Iterable[bytes], search: Search, *, lines_per_block: int
) -> Iterator[str]:
    """One translation per line (UTF-8, with or without its line end), in order; what went wrong is warned about."""
    lines = iter(lines)
    language = trained.source_tokenizer.language
    script = re.compile(f"[{language.script}]") if language.script else None
    first = 1
    unknown_sources = unknown_translations = foreign = 0
    while block := [line.decode("utf-8", "replace") for line in islice(lines, lines_per_block)]:
        sources = [trained.encode(line) for line in block]
        label = f"translating from line {first:,}" if lines_per_block > 1 else None
        results = translate(
            trained.decoder,
            sources,
            beam_size=search.beam_size,
            length_penalty=search.length_penalty,
            label=label,
        )
        unknown_sources += sum(UNK in source for source in sources)
        if script is not None:
            foreign += sum(bool(line.strip()) and not script.search(line) for line in block)
        unknown_translations += sum(UNK in result.ids for result in results)
        for number, (line, result) in enumerate(zip(block, results, strict=True), first):
            if "\ufffd" in line:
                warn(f"line {number}: not UTF-8 throughout; what could not be read counts as unknown characters")
            if result.problem is not None:
                warn(f"line {number}: {result.problem}; its line in the output is empty")
            elif not result.ended:
                warn(f"line {number}: the translation was cut off after {len(result.ids)} tokens")
            yield trained.target_tokenizer.decode(result.ids)
        first += len(block)
    if foreign:
        warn(f"{foreign:,} of {first - 1:,} sentences hold no {language}, which this model translates from")
    if unknown_sources or unknown_translations:
        warn(
            f"{unknown_sources:,} of {first - 1:,} sentences hold characters that the model does not know (<unk>); "
            f"{unknown_translations:,} translations hold <unk>"
        )


def _checked(lines: Iterable[bytes], path: Path | None) -> Iterator[bytes]:
    """The same lines. Raises UserError where most of the first that are not plain ASCII are no UTF-8.

    path: where they come from; None: standard input.
    """
    lines = iter(lines)
    first = list(islice(lines, LINES_PER_BLOCK))
    telling = [line for line in first if not line.isascii()]
    wrong = [line for line in telling if not _is_utf8(line)]
    if 2 * len(wrong) > len(telling) and len(wrong) > 1:
        advice = encoding_advice(b"".join(first), Path(path or "-"))
        raise UserError(f"{path or 'the input'} is not UTF-8 text; {advice}")
    return chain(first, lines)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main, prints_product=True)

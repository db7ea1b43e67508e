"""Writes what a run has trained as a folder that other programs load.

    python -m training.evaluation.export runs/NAME --output FOLDER [--checkpoint WHICH] [--overwrite]
    python -m training.evaluation.export runs/QLORA --output FOLDER --merge [--dtype bfloat16]
    python -m training.evaluation.export runs/QLORA --output FOLDER --gguf f16|q8_0

A GPT that translates becomes a folder for Hugging Face transformers, without custom code. The adapters of a QLoRA run
become a folder for peft, some megabytes to use with the base model in 4 bits; with --merge they and their base model
become one model in 16 bits, which transformers loads alone, and with --gguf one file, which llama.cpp loads, with a
Modelfile for Ollama. Each has its tokenizer, a model card (README.md), and export.json: what it was made from, and the
size and SHA-256 of every other file.

Promises: the folder is complete or absent; before it appears, it was loaded as users load it and its logits were
compared with the run's. Nothing is replaced but an earlier export that nobody has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.base.console import UserError, run_main, warn
from training.base.options import FLAG, CommandLine
from training.engine.status import read_status
from training.evaluation.exports.folder import add_output_options, needing, output_of
from training.evaluation.exports.gguf_file import KINDS
from training.evaluation.runs import QLORA, TRANSLATION, kind_of
from training.evaluation.setting import OptionsOf, add_model_options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises UserError for everything the user can mend."""
    parser = CommandLine(
        "python -m training.evaluation.export",
        __doc__.split("\n")[0],
        epilog="Merging needs as much memory as the merged model and about 3 GB: 18 GB for 7 billion parameters.",
    )
    add_model_options(parser)
    add_output_options(parser)
    of_adapters = OptionsOf(QLORA, parser)
    of_adapters.add_argument("--base_model", metavar="FOLDER", help="where the base model is (default: where it was)")
    of_adapters.add_argument("--merge", **FLAG, help="one model of base and adapters, instead of adapters")
    of_adapters.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="type of a merged model (default bfloat16)"
    )
    of_adapters.add_argument("--gguf", choices=KINDS, help="the merged model as a GGUF file, for llama.cpp and Ollama")
    arguments = parser.parse_args(argv)
    kind = kind_of(arguments.run_dir)
    if arguments.gguf and kind == TRANSLATION:
        raise UserError(
            f"{arguments.run_dir} is a translator, which GGUF has no structure for here: export it without --gguf, and "
            "try llama.cpp's own converter on that folder, `python convert_hf_to_gguf.py FOLDER`"
        )
    of_adapters.check(arguments, kind)
    if arguments.gguf and (arguments.merge or arguments.dtype):
        raise UserError("--gguf merges by itself, and says the type: leave --merge and --dtype out")
    if arguments.dtype and not arguments.merge:
        raise UserError("--dtype has no effect on adapters, which are in fp32: add --merge, or leave it out")
    status = read_status(arguments.run_dir)
    if status is not None and status["status"] != "finished":
        warn(
            f"{arguments.run_dir} is not finished ({status['reason']}): this exports what it has come to; export it "
            "again, with --overwrite, when it is"
        )
    output = output_of(arguments, example="exports/law" if kind == QLORA else "exports/gpt")
    # What one kind needs is imported for that kind only.
    if kind != QLORA:
        from training.evaluation.exports import translator
        from training.evaluation.translations.trained import open_trained

        cpu = torch.device("cpu")
        translator.export(open_trained(arguments.run_dir, arguments.checkpoint, device=cpu), output)
        return 0
    from training.evaluation.exports import adapters
    from training.qlora import LIBRARIES

    with needing(*LIBRARIES):
        # The base model can go when it is no longer needed: nothing here holds it.
        export = adapters.Export(adapters.open_run(arguments.run_dir, arguments.checkpoint, arguments.base_model))
    if arguments.gguf:
        with needing("gguf"):
            export.gguf(output, arguments.gguf)
    elif arguments.merge:
        export.merged(output, arguments.dtype or "bfloat16")
    else:
        export.adapters(output)
    return 0


if __name__ == "__main__":
    run_main(main)

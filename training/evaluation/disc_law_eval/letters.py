"""Which of the letters A to D an answer to a multiple-choice question chooses, by the rule of DISC-Law-Eval.

The rule gives the verdict that was released with the benchmark for each of the 3 x 2,563 published answers, so scores
by it can be put beside the published ones. A careful reader would find other letters in some answers, but also give
other scores than the published models got.
"""

from __future__ import annotations

import re

SHORT = 10  # characters; an answer of fewer is read as it stands

_SEPARATORS = r",，、\s"
_RUN = rf"[A-D][A-D{_SEPARATORS}]*"
# Behind a phrase commas alone are a run, too, and one without letters: so the published answers were read that say
# 选择，… or 人选，… somewhere in the middle.
_RUN_OR_COMMAS = rf"[A-D,，、][A-D{_SEPARATORS}]*"
_BEHIND = rf"\s*({_RUN_OR_COMMAS})"
# The same where something has to stand behind them: begun at the first of a row of such characters, and taken whole. A
# search from each of them would take a time that grows as the square of the row.
_ROW = rf"A-D{_SEPARATORS}"
_WHOLE_RUN = rf"(?<![{_ROW}])[{_SEPARATORS}]*+([A-D][{_ROW}]*+)"
_WHOLE_RUN_OR_COMMAS = rf"(?<![{_ROW}])\s*+([A-D,，、][{_ROW}]*+)"

# The first one that is found decides, wherever in the answer it stands. The benchmark knows more phrases, none of which
# is ever reached: 答案是 and 选择答案 are found as others before them, as is 选 at the start of an answer.
_STATED = [
    re.compile(pattern)
    for pattern in (
        rf"答案应?该?[为是]{_BEHIND}",
        rf"选项应?该?[是为]{_BEHIND}",
        rf"答案{_BEHIND}",
        rf"答案应该?选{_BEHIND}",
        rf"选择{_BEHIND}",
        rf"选[:：]?{_BEHIND}",
        rf"{_WHOLE_RUN_OR_COMMAS}</s>",
        rf"\A\s*({_RUN_OR_COMMAS})。",
    )
]

_OPTION = re.compile(r"([A-D])[.．]")

# Again the first one that is found decides, but here by all of its places.
_CALLED_RIGHT = [
    re.compile(pattern)
    for pattern in (
        rf"{_WHOLE_RUN}都?是正确的",
        rf"选项\s*({_RUN})正确",
        rf"{_WHOLE_RUN}选项正确",
        rf"{_WHOLE_RUN}都?[是为]正确答案",
        rf"{_WHOLE_RUN}都?[是为]正确选项",
        rf"{_WHOLE_RUN}选?项?都?属于(?![错不])",
    )
]


def letters_of(answer: str) -> str:
    """The letters that `answer` chooses, each once and in order ("ACD"); "" where it chooses none.

    In this order:

    1. A short answer is read as it stands: all of its A to D.
    2. Else the letters behind the first phrase of a list that has some behind it (答案是 B; 选择 A、C), those before
       the end token </s>, or those that begin the answer and have 。 behind them.
    3. Else the letter of every option that is written out: "A. …", full-width dots included.
    4. Else all letters that are called right (A、B都是正确的; C选项正确).
    5. Else the answer is read as it stands, as in 1.
    """
    return "".join(sorted(set(re.findall("[A-D]", _part_read(answer)))))


def _part_read(answer: str) -> str:
    if len(answer) < SHORT:
        return answer
    for pattern in _STATED:
        if found := pattern.search(answer):
            return found[1]
    if options := _OPTION.findall(answer):
        return "".join(options)
    for pattern in _CALLED_RIGHT:
        if called := pattern.findall(answer):
            return "".join(called)
    return answer

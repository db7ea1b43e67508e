"""Made-up records of DISC-Law-SFT's published layouts, all twelve tasks, and a small tokenizer that reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_prep.disc_law_records import FILES, TASK_NAMES
from tests.support import base_models
from tests.support.base_models import CHATML, make_tiny_qwen2
from tests.support.commands import launching
from tests.support.once import once
from tests.support.runs import reference

RUN_STEPS = 30  # of `law_run`

PAIR, PAIR_QA, TRIPLET_QA, TRIPLET = (file.stem for file in FILES)


def sentence(*numbers: object, length: int = 24) -> str:
    """A Chinese text of `length` characters that is another for other numbers."""
    digest = hashlib.shake_128(repr(numbers).encode()).digest(length)
    return "".join(chr(0x4E00 + byte) for byte in digest)


def record(task: str, number: int) -> tuple[str, dict[str, object]]:
    """The file it belongs in and a record of the layout that this task has there."""
    text, label = sentence(task, number, length=60), f"标签{number % 7}"
    statute = f"《刑法》第{number}条：{sentence('statute', number, length=40)}。"
    prose = f"根据《刑法》，{sentence(task, 'answer', number, length=30)}。"
    spans = {
        "jud_read_compre": (f"请根据案例回答\n文本为：'{text}'，问题为：'问{number}？'", text[5:11]),
        "leg_ele_extra": (f"请标注以下条款：\n{text}", " ".join("OBI"[ord(char) % 3] for char in text)),
        "leg_eve_detec": (f"请贴上标签\n片段：'{text}'", f"标签：'{label}'"),
        "exam": (f"请给出答案：\n问题：{text}？\nA. {text[:9]}\nB. {text[9:18]}", f"B. {text[9:18]}\n解析：{prose}"),
        "leg_case_cls": (f"以下文本反映了什么类型的风险\n{text}", label),
        "sent_pred": (f"预测下列案件的最终裁决。\n{text}", prose),
        "jud_doc_sum": (f"请大致描述这篇文书的内容。\n\n{text}\n{text[::-1]}\n书记员　某", f"总结：{prose}"),
        "sim_case_match": (f'判断A更接近于B还是C\n{{"A": {text}\n, "B": {text[::-1]}\n}}', '{"LABEL":"C"}'),
        "op_sum": (f"请大致描述这段文本的内容。\n\n{text}", prose),
        "legal_question_answering": (f"{text}是否正确？\n\n请先给出答案。", prose),
        "legal_question_answering_reference": (f"{statute}\n<问题>：\n{text}？", prose),
        "judgement_predict": (f"基于下列案件，推测可能的判决结果。\n{text}", prose),
    }
    question, answer = spans[task]
    values: dict[str, object] = {"id": f"{task}-{number}", "input": question, "output": answer}
    if task == "legal_question_answering":
        return PAIR_QA, {**values, "id": f"legal_question_answering_{number}"}
    if task == "legal_question_answering_reference":
        return TRIPLET_QA, {**values, "id": f"legal_question_answering_{number}", "reference": [statute]}
    if task == "judgement_predict":
        name = f"judgement_predit-{number}" if number % 3 == 0 else None
        return TRIPLET, {"id": name, "reference": [statute], "input": question, "output": answer}
    return PAIR, values


def write_source(folder: Path, per_task: int = 30, extra: dict[str, list[object]] | None = None) -> Path:
    """The four files with records of all tasks; `extra`: more lines (bytes) or records, by file."""
    lines: dict[str, list[bytes]] = {file.stem: [] for file in FILES}
    for number in range(per_task):
        for task in TASK_NAMES:
            file, values = record(task, number)
            lines[file].append(json.dumps(values, ensure_ascii=False).encode())
    for file, more in (extra or {}).items():
        lines[file] += (x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode() for x in more)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in lines.items():
        if content:
            (folder / f"{file}.sample.jsonl").write_bytes(b"\n".join(content) + b"\n")
    return folder


def make_tokenizer(folder: Path, template: str | None = CHATML, **special: str) -> Path:
    """A byte-level tokenizer of such records in `folder`: 600 ids, the control tokens of ChatML among them."""
    texts = [str(record(task, number)) for task in TASK_NAMES for number in range(20)]
    return base_models.make_tokenizer(folder, texts, template=template, special={"eos_token": "<|im_end|>", **special})


def prepare(folder: Path, tokenizer: Path) -> Path:
    """Legal records of every task, prepared by the real command."""
    source = write_source(folder / "source", per_task=20)
    with launching(folder) as launch:
        words = ("--source", source, "--tokenizer", tokenizer, "--output", folder / "data", "--validation_share", 0.1)
        result = launch(*words, "--max_length", 300, module="data_prep.disc_law").wait()
    assert result.status == 0, result
    return folder / "data"


def law_tokenizer() -> Path:
    """A tokenizer for legal records, whose padding token is none of the conversation's."""
    return once("law-tokenizer", lambda folder: make_tokenizer(folder / "small", pad_token="<|endoftext|>")) / "small"


def law_base(width: int = 64) -> Path:
    """A tiny random chat model with that tokenizer."""
    tokenizer = law_tokenizer()
    return once(f"law-base-{width}", lambda folder: make_tiny_qwen2(folder / "tiny", tokenizer, width=width)) / "tiny"


def law_data() -> Path:
    """Legal records of every task, prepared for that model."""
    base = law_base()
    return once("law-data", lambda folder: prepare(folder, base)) / "data"


def law_run_base() -> Path:
    """A tiny model that has more words than its tokenizer, as real ones often have."""
    tokenizer = law_tokenizer()
    return once("answers", lambda folder: make_tiny_qwen2(folder / "base", tokenizer, vocabulary_size=700)) / "base"


def law_run() -> Path:
    """A run in which that model has learned something of these records."""
    words = (
        *("--base_model", law_run_base(), "--lora.rank", 16, "--optim.steps", RUN_STEPS, "--optim.warmup_steps", 2),
        *("--batch.tokens_per_micro_batch", 1200, "--batch.micro_batches_per_step", 2, "--optim.lr", 1e-2),
    )
    return reference(law_data(), *words, module="training.qlora")

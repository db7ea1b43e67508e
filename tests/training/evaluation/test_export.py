"""A trained GPT in Hugging Face transformers: the same logits, the same ids, the same translations.

Everything is loaded from the exported folder as users do it, without a network and without custom code.
"""

import ast
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.evaluation
from data_prep import pairs
from tests.support.commands import REAL_TATOEBA, launching
from tests.support.exports import assert_older_transformers_loads_the_same, content_of, nobody_asked
from training.base.console import UserError
from training.data.prepared import PARTS, open_prepared
from training.data.text import clean
from training.data.tokenizers import EOS, PAD, SEP, SOS, SPECIALS
from training.engine.status import write_status
from training.evaluation import evaluate, export
from training.evaluation.exports import hugging_face, translator
from training.evaluation.translations.trained import TrainedModel, open_trained
from training.evaluation.translations.translators import GPTTranslator
from training.models.decoding import translate
from training.models.gpt import GPT, GPTOptions, Vocabularies

CPU = torch.device("cpu")
CLASSES = {
    ("learned", "layer"): "GPT2LMHeadModel",
    ("rotary", "layer"): "GPTNeoXForCausalLM",
    ("rotary", "rms"): "ArceeForCausalLM",
}
FILES = {
    *("README.md", "config.json", "export.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}


def train(folder: Path, data: Path, *words: object, module: str = "training.gpt") -> Path:
    """A run of a few steps, made by the real training script."""
    short = ("--optim.steps", 8, "--optim.warmup_steps", 2, "--batch.tokens_per_micro_batch", 512)
    with launching(folder) as launch:
        result = launch("--run_dir", folder / "run", "--data", data, *short, *words, module=module).wait()
    assert result.status == 0, result
    return folder / "run"


def prepare(output: Path, source: str | Path, kind: str, *words: str) -> Path:
    joint = ("--vocabularies", "joint", "--simplify", "false")
    options = ["--source", str(source), "--tokenizer", kind, *joint, "--output", str(output), *words]
    assert pairs.main(options) == 0
    return output


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """The sample corpus in sentencepiece pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    return prepare(folder / "data", "sample", "sentencepiece", "--vocabulary_size", "600")


SHAPE = {"layers": 2, "heads": 2, "width": 48, "context": 48}


@pytest.fixture(scope="module")
def run(pieces, tmp_path_factory) -> Path:
    """A run with several checkpoints and a moving average."""
    saved = ("--checkpoint.every_steps", 2, "--log.validate_every_steps", 2, "--checkpoint.keep_best", 3)
    shape = [word for key, value in SHAPE.items() for word in (f"--model.{key}", value)]
    return train(tmp_path_factory.mktemp("gpt"), pieces, *shape, *saved, "--optim.ema_decay", 0.5)


def with_another_model(trained: TrainedModel, **options: object) -> TrainedModel:
    """As if a model of this shape had been trained: it has learned nothing, but says something else to each source."""
    shape = GPTOptions(**{**SHAPE, **options})
    torch.manual_seed(2)
    model = GPT(shape, Vocabularies(trained.target_tokenizer.vocabulary_size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.embedding.weight[EOS] *= 4  # some of the translations shall end
    config = trained.config.model_copy(update={"model": shape})
    return replace(trained, model=model, config=config, decoder=GPTTranslator(model))


@pytest.fixture(scope="module", params=CLASSES, ids=" ".join)
def exported(request, run, tmp_path_factory) -> tuple[TrainedModel, Path]:
    """A model of each kind that can be exported, and its export."""
    positions, norm = request.param
    trained = with_another_model(open_trained(run, device=CPU), positions=positions, norm=norm)
    folder = tmp_path_factory.mktemp("-".join(request.param)) / "export"
    translator.export(trained, folder)
    return trained, folder


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@contextmanager
def no_complaints() -> Iterator[None]:
    """Fails if transformers, or anything else, warns of something in the block."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        library.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    assert [str(warning.message) for warning in caught] == []


def sentences(trained: TrainedModel, number: int) -> list[str]:
    return list(open_prepared(trained.config.data).part("test").source_texts[:number])


def without_padding(answer: list[int]) -> list[int]:
    """The ids of an answer up to its first `<eos>`; behind that there is padding and nothing else."""
    if EOS not in answer:
        return answer
    end = answer.index(EOS)
    assert set(answer[end + 1 :]) <= {PAD}
    return answer[:end]


def test_transformers_loads_the_model_without_a_word_and_with_the_runs_logits(exported):
    trained, folder = exported
    with no_complaints():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    options = trained.model.options
    assert type(model).__name__ == CLASSES[options.positions, options.norm]
    assert not model.training and model.dtype == torch.float32
    assert model.num_parameters() == sum(parameter.numel() for parameter in trained.model.parameters())
    test = open_prepared(trained.config.data).part("test")
    with torch.inference_mode():
        for row in range(20):
            tokens = torch.tensor([[SOS, *test.source[row], SEP, *test.target[row]]])
            torch.testing.assert_close(model(tokens).logits, trained.model(tokens), rtol=0, atol=1e-5)


# What transformers 4 would else take its own defaults for, or not know.
OLDER_KEYS = {
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {"rotary_pct": 1.0, "rotary_emb_base": 10_000.0},
    "ArceeForCausalLM": {"rope_theta": 10_000.0},
}


def test_the_keys_of_transformers_4_stand_beside_those_of_5(exported):
    trained, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config == {**config, **OLDER_KEYS[config["architectures"][0]]}
    assert ("rope_parameters" in config) == (trained.model.options.positions == "rotary")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.whole
def test_transformers_4_loads_the_same_model_and_tokenizer(exported, tmp_path):
    assert_older_transformers_loads_the_same(exported[1], tmp_path / "older.pt")


def test_training_further_has_the_runs_dropout(exported):
    trained, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    shares = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    if "Arcee" in type(model).__name__:  # it has none, and the card says so
        assert shares == {}
        assert "dropout 0.1" in (folder / "README.md").read_text()
    else:
        on_weights = {name for name in shares if name.endswith("attn_dropout")}
        assert {shares[name] for name in on_weights} <= {0.0}
        others = [share for name, share in shares.items() if name not in on_weights]
        assert others == [trained.model.options.dropout] * (1 + 2 * trained.model.options.layers)


def test_a_sentence_is_translated_as_the_run_does(exported):
    trained, folder = exported
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = sentences(trained, 20)
    ours = translate(trained.decoder, [trained.encode(text) for text in texts])
    assert sum(result.ended for result in ours) >= 5 and len({tuple(result.ids) for result in ours}) > 10
    for text, result in zip(texts, ours, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        prompt = inputs["input_ids"].shape[1]
        limit = 2 * (prompt - 2) + 10  # as `translate` has it
        answer = model.generate(**inputs, max_new_tokens=min(limit, 48 - prompt))[0, prompt:]
        assert answer.tolist() == [*result.ids, *([EOS] if result.ended else [])]
        assert tokenizer.decode(answer, skip_special_tokens=True) == trained.target_tokenizer.decode(result.ids)
        with no_complaints():
            as_usual = model.generate(**inputs)[0, prompt:].tolist()
        assert as_usual[: len(answer)] == answer.tolist() and prompt + len(as_usual) <= 48


def test_a_batch_padded_on_the_left_gets_what_each_sentence_gets_alone(exported):
    trained, folder = exported
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = sentences(trained, 40)
    with no_complaints():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    assert (inputs["input_ids"][:, -1] == SEP).all() and (inputs["input_ids"][:, 0] == PAD).any()
    ours = translate(trained.decoder, [trained.encode(text) for text in texts])
    for answer, result in zip(answers, ours, strict=True):
        shown = without_padding(answer)
        assert shown == result.ids if result.ended else shown[: len(result.ids)] == result.ids


def test_what_the_run_never_produces_is_not_generated_either(exported):
    trained, folder = exported
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(sentences(trained, 1), return_tensors="pt")
    before = model.generate(**inputs)
    # Now these three are by far the most probable, wherever the model is.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(trained.model.vocabularies.target))
    model.lm_head.bias.data[[PAD, SOS, SEP]] = 1e4
    assert torch.equal(model.generate(**inputs), before)


def assert_same_tokenizer(data: Path, texts_of: list[str], folder: Path) -> None:
    """Saved and loaded as in an export: every row of `data`, `texts_of`, and random ids."""
    prepared = open_prepared(data)
    languages = prepared.source_tokenizer.language, prepared.target_tokenizer.language
    hugging_face.tokenizer_of(data / "tokenizer/source", languages[1], 128).save_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    source, target = prepared.source_tokenizer, prepared.target_tokenizer
    rows = 0
    for name in PARTS:
        part = prepared.part(name)
        ids = theirs(list(part.source_texts))["input_ids"]
        assert ids == [[SOS, *row.tolist(), SEP] for row in part.source]
        decoded = theirs.batch_decode([[*row.tolist(), EOS, PAD] for row in part.target], skip_special_tokens=True)
        assert decoded == [target.decode(row.tolist()) for row in part.target]
        rows += len(part)
    assert rows == sum(prepared.meta["rows"].values())
    for text in texts_of:
        assert theirs(text)["input_ids"] == [SOS, *source.encode(clean(text)), SEP], repr(text)
    dice = random.Random(1)
    answers = [dice.choices(range(source.vocabulary_size), k=8) for _ in range(500)]
    for ids in [[], [EOS], *([number] for number in range(source.vocabulary_size)), *answers]:
        assert theirs.decode(ids, skip_special_tokens=True) == target.decode(ids), ids


def strange_texts(data: Path) -> list[str]:
    """Texts that no corpus has: hostile ones, and the corpus's own characters and pieces in random order."""
    source = open_prepared(data).source_tokenizer
    pieces = [piece for piece in source.token_texts(range(len(SPECIALS), source.vocabulary_size)) if piece]
    dice = random.Random(0)
    few = [dice.sample(pieces, 2) for _ in range(300)]
    return [
        *SPECIALS,
        *(f"你好{special}吗" for special in SPECIALS),
        "  你好\u200b。\t\r\n我\u3000\u00a0是\x1c Ｔom’s\ufeff 书 ",
        "▁你▁▁好",
        "한국어 ÿÿÿ 你 ÿ",
        "???",
        "。。。",
        "?",
        "3.14、Ⅷ、½、〇々、é e\u0301",
        *("".join(dice.choices(pieces, k=dice.randint(1, 15))) for _ in range(1000)),
        *("".join(dice.choices(pair, k=dice.randint(2, 30))) for pair in few),
    ]


def test_texts_become_the_pieces_that_the_run_makes_of_them(pieces, tmp_path):
    assert_same_tokenizer(pieces, strange_texts(pieces), tmp_path)


def test_texts_become_the_words_that_the_run_makes_of_them(sample_data, tmp_path):
    assert_same_tokenizer(sample_data, strange_texts(sample_data), tmp_path)


@pytest.mark.parametrize("words", [("sentencepiece", "--vocabulary_size", "600"), ("word",)], ids=lambda each: each[0])
def test_texts_of_the_other_direction_become_what_the_run_makes_of_them(words, tmp_path):
    back = ("--source_language", "en", "--target_language", "zh")
    data = prepare(tmp_path / "data", "sample", *words, *back)
    texts = ["L’été d'1’an, d''x 'y'", "हिन्दी می\u200cخواهم القِطّة", "I\u00ad’m\u200e here", *strange_texts(data)]
    assert_same_tokenizer(data, texts, tmp_path / "tokenizer")


@pytest.mark.skipif(not REAL_TATOEBA.is_file(), reason=f"the real Tatoeba file is not at {REAL_TATOEBA}")
@pytest.mark.parametrize("kind", ["sentencepiece", "word"])
@pytest.mark.whole
def test_all_real_sentences_become_the_ids_that_training_saw(kind, tmp_path):
    data = prepare(tmp_path / "data", REAL_TATOEBA, kind, "--simplify", "true")
    assert_same_tokenizer(data, strange_texts(data), tmp_path / "tokenizer")


def test_the_command_makes_a_folder_that_works_as_its_card_says_without_a_network(run, tmp_path):
    named, folder = shutil.copytree(run, tmp_path / "my-run"), tmp_path / "deep/export"
    with launching(tmp_path) as launch, nobody_asked() as environment:
        words = (named, "--output", folder)
        made = launch(*words, module="training.evaluation.export", environment=environment).wait()
    assert made.status == 0 and made.err == "", made
    assert "as GPTNeoXForCausalLM" in made.out
    assert {path.name for path in folder.iterdir()} == FILES
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    trained = open_trained(run, device=CPU)
    about = json.loads((folder / "export.json").read_text())
    assert (about["run"], about["step"], set(about["files"])) == ("my-run", trained.step, FILES - {"export.json"})

    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["language"] == ["zh", "en"] and header["library_name"] == "transformers"
    assert trained.data["fingerprint"] in card and trained.data["source"]["licence"] in card
    assert str(tmp_path) not in card
    # The lines of the card, as they stand, from the folder they are about.
    script = re.search("```python\n(.*?)```", card, re.S)[1]
    with nobody_asked() as environment:
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0 and "warn" not in done.stderr.lower(), done.stderr
    results = translate(trained.decoder, [trained.encode("你好。"), trained.encode("他喜欢买书。")])
    for printed, result in zip(ast.literal_eval(done.stdout), results, strict=True):
        expected = trained.target_tokenizer.decode(result.ids)
        assert printed == expected if result.ended else printed.startswith(expected)


@pytest.mark.parametrize("which", ["best", "last", "best:3", "last:2", "ema"])
def test_the_weights_that_were_asked_for_are_exported_and_named(run, tmp_path, which):
    assert export.main([str(run), "--output", str(tmp_path / "export"), "--checkpoint", which]) == 0
    trained = open_trained(run, which, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(model.get_input_embeddings().weight, trained.model.embedding.weight, rtol=0, atol=0)
    about = json.loads((tmp_path / "export/export.json").read_text())
    card = (tmp_path / "export/README.md").read_text(encoding="utf-8")
    file = "ema.safetensors" if which == "ema" else "model.safetensors"
    assert about["weights"] == which and len(about["checkpoints"]) == int(which.partition(":")[2] or 1)
    for step, sha256 in about["checkpoints"].items():
        content = (run / f"checkpoints/step-{int(step):010d}" / file).read_bytes()
        assert sha256 == hashlib.sha256(content).hexdigest() and sha256 in card
    said = {
        "best": f"| step {trained.step} of the run run, the best on validation |",
        "last": "| step 8 of the run run, the newest |",
        "best:3": f"| the mean of steps {', '.join(about['checkpoints'])} of the run run, the best on validation |",
        "last:2": "| the mean of steps 8, 6 of the run run, the newest |",
        "ema": "| step 8 of the run run, the moving average of the weights |",
    }
    assert said[which] in card


def test_the_card_has_the_scores_of_these_weights_and_of_no_others(run_copy, tmp_path, capsys):
    def card_of(name: str, *words: str) -> str:
        assert export.main([str(run_copy), "--output", str(tmp_path / name), *words]) == 0
        return (tmp_path / name / "README.md").read_text(encoding="utf-8")

    assert "have not been evaluated" in card_of("before", "--checkpoint", "last:2")
    command = f"python -m training.evaluation.evaluate {run_copy} --checkpoint last:2"
    assert f"scores    none of these weights: `{command}`, then again" in capsys.readouterr().out
    assert evaluate.main([str(run_copy), "--checkpoint", "last:2"]) == 0
    capsys.readouterr()
    path = run_copy / "evaluation/test-last2.json"
    scores = json.loads(path.read_text())
    card = card_of("after", "--checkpoint", "last:2")
    assert f"| BLEU | {scores['bleu']:.2f} | `nrefs:1\\|" in card
    assert "say nothing about real translation" in card and "none of these" not in capsys.readouterr().out
    assert "have not been evaluated" in card_of("others", "--checkpoint", "last")
    path.write_text(json.dumps({**scores, "checkpoints": [*scores["checkpoints"][:-1], 2]}))
    assert "have not been evaluated" in card_of("later", "--checkpoint", "last:2")


def test_a_run_on_simplified_text_says_what_the_tokenizer_does_not_do(run_copy, tmp_path, capsys):
    about = json.loads((run_copy / "data.json").read_text(encoding="utf-8"))
    about["options"]["simplify"] = True
    (run_copy / "data.json").write_text(json.dumps(about), encoding="utf-8")
    assert export.main([str(run_copy), "--output", str(tmp_path / "export")]) == 0
    assert "does not convert traditional characters" in capsys.readouterr().out
    assert 'opencc.OpenCC("t2s")' in (tmp_path / "export/README.md").read_text()


def test_a_run_that_is_not_finished_is_exported_with_a_warning(run_copy, tmp_path, capsys):
    write_status(run_copy, "resumable", "signal SIGTERM", restart=True)
    assert export.main([str(run_copy), "--output", str(tmp_path / "export")]) == 0
    assert "is not finished (signal SIGTERM): this exports what it has come to" in capsys.readouterr().err


def test_a_run_on_words_is_exported_with_its_tokenizer(run, sample_data, tmp_path):
    trained, words = open_trained(run, device=CPU), open_prepared(sample_data)
    tokenizers = {"source_tokenizer": words.source_tokenizer, "target_tokenizer": words.target_tokenizer}
    config = trained.config.model_copy(update={"data": sample_data})
    trained = with_another_model(replace(trained, run_dir=sample_data, config=config, data=words.meta, **tokenizers))
    translator.export(trained, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for text in sentences(trained, 5):
        inputs = tokenizer(text, return_tensors="pt")
        prompt = inputs["input_ids"].shape[1]
        (result,) = translate(trained.decoder, [trained.encode(text)])
        answer = model.generate(**inputs)[0, prompt:][: len(result.ids)]
        assert tokenizer.decode(answer, skip_special_tokens=True) == trained.target_tokenizer.decode(result.ids)
    assert "drops punctuation" in (tmp_path / "export/README.md").read_text()


def test_only_an_earlier_export_that_nobody_changed_is_replaced(run, tmp_path):
    output = tmp_path / "export"
    assert export.main([str(run), "--output", str(output)]) == 0
    first = content_of(output)

    def refusal(*words: str) -> str:
        before = content_of(tmp_path)
        with pytest.raises(UserError) as error:
            export.main([str(run), "--output", str(output), *words])
        assert content_of(tmp_path) == before
        return str(error.value)

    assert "already; choose another --output, or replace it with --overwrite" in refusal()
    assert export.main([str(run), "--output", str(output), "--overwrite"]) == 0
    assert content_of(output) == first  # the same checkpoint gives the same bytes
    assert export.main([str(run), "--output", str(output), "--overwrite", "--checkpoint", "last"]) == 0
    last = open_trained(run, "last", device=CPU)
    assert json.loads((output / "export.json").read_text())["step"] == last.step
    card = output / "README.md"
    card.write_text(card.read_text() + "my own words\n")
    assert "was changed since it was exported (README.md)" in refusal("--overwrite")
    card.write_bytes(card.read_bytes().removesuffix(b"my own words\n"))
    (output / "notes.txt").write_text("mine")
    assert "(notes.txt)" in refusal("--overwrite")
    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "holds something else than an export" in refusal("--overwrite")
    (output / "notes.txt").unlink()
    assert export.main([str(run), "--output", str(output)]) == 0  # an empty folder is as good as none
    with pytest.raises(UserError, match="is not the name of a folder to make"):
        export.main([str(run), "--output", str(output / "README.md")])


def refused(run: Path, output: Path, *words: str) -> str:
    """What the command says; it must leave nothing behind."""
    with pytest.raises(UserError) as error:
        export.main([str(run), "--output", str(output), *words])
    assert list(output.parent.glob("*export*")) + list(output.parent.glob(".*export*")) == []
    return str(error.value)


def test_a_model_that_transformers_does_not_have_is_refused_with_the_reason(run, pieces, tmp_path):
    unknown = with_another_model(open_trained(run, device=CPU), positions="learned", norm="rms")
    with pytest.raises(UserError, match="no architecture with learned positions and rms norm"):
        translator.export(unknown, tmp_path / "export")
    apart = GPT(GPTOptions(**SHAPE), Vocabularies(unknown.target_tokenizer.vocabulary_size, 40))
    with pytest.raises(UserError, match="no architecture with a vocabulary for each side"):
        translator.export(replace(unknown, model=apart), tmp_path / "export")
    small = ("--model.embedding_width", 16, "--model.hidden_width", 16)
    seq2seq = train(tmp_path, pieces, *small, module="training.seq2seq")
    assert "holds a seq2seq model: transformers has no architecture" in refused(seq2seq, tmp_path / "export")
    assert "there is no run folder" in refused(tmp_path / "nowhere", tmp_path / "export")
    said = refused(run, tmp_path / "export", "--merge", "--dtype", "float16")
    assert f"{run} is a translation run: leave out --merge, --dtype, which would have no effect" in said


@pytest.mark.parametrize("damage", ["value", "key"])
def test_what_transformers_would_load_as_another_model_is_not_published(run, tmp_path, monkeypatch, damage):
    if damage == "value":
        monkeypatch.setattr(hugging_face, "ROTARY_BASE", 9_000.0)
    else:

        def save_with_another_key(model, folder, **more):
            torch_state = {"surplus": torch.zeros(1), **model.state_dict()}
            del torch_state["lm_head.weight"]
            model.config.save_pretrained(folder)
            save_file(torch_state, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "save_pretrained", save_with_another_key)
    said = refused(run, tmp_path / "export")
    assert "loads the exported model as another one" in said
    assert damage == "value" or "keys that do not fit: surplus" in said


def test_a_full_disk_is_named_and_nothing_is_left(run, small_disk):
    assert "no space left on the disk" in refused(run, small_disk / "export")


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_without_transformers_the_command_says_what_to_install(run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "training.evaluation.exports.hugging_face")
    monkeypatch.delattr(training.evaluation.exports, "hugging_face")
    assert f"needs {package}: `pip install -r requirements.txt`" in refused(run, tmp_path / "export")

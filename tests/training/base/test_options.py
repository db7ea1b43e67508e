"""Options: every mistake is found at once and answered, and what is valid means the same wherever it is written."""

from __future__ import annotations

import argparse
import re
from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.support.commands import ROOT, Launch
from training.base.console import UserError
from training.base.options import FLAG, CommandLine, Options, all_keys, parse, raw_values, to_yaml
from training.gpt import GPTConfig
from training.qlora import QLoRAConfig
from training.seq2seq import Seq2SeqConfig

REQUIRED = ["--run_dir", "runs/x", "--data", "prepared/x"]
CONFIGS = sorted(ROOT.glob("configs/gpt/*.yaml"))


def read(*words: str) -> GPTConfig:
    return parse(GPTConfig, words, prog="python -m training.gpt", about="")[0]


def refusal(*words: str) -> str:
    """The one line that these words are answered with."""
    with pytest.raises(UserError) as caught:
        read(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def config_file(folder: Path, text: str | bytes) -> str:
    path = folder / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.widht", "model.width"),  # a slip
        ("width", "model.width"),  # without its group
        ("optim.dropout", "model.dropout"),  # under the wrong group
        ("batch.token_per_microbatch", "batch.tokens_per_micro_batch"),
        ("rundir", "run_dir"),
        ("log.validate_steps", "log.validate_every_steps"),
    ],
)
def test_misspelt_key_is_answered_with_the_nearest(tmp_path, written, meant):
    assert f"there is no key {written} (nearest: {meant})" in refusal(*REQUIRED, f"--{written}", "3")
    nested = "3"
    for name in reversed(written.split(".")):
        nested = f"{{{name}: {nested}}}"
    assert f"there is no key {written} (nearest: {meant})" in refusal(config_file(tmp_path, nested), *REQUIRED)


def test_all_mistakes_are_reported_at_once(tmp_path):
    file = config_file(tmp_path, "data: prepared/x\nmodel: {widht: 3}\noptim: {lr: fast}\n")
    message = refusal(file, "--log.every_steps", "0", "--precision", "fp8", "--seed")
    for part in (
        "6 mistakes",
        "run_dir is required",
        "there is no key model.widht (nearest: model.width)",
        "optim.lr: input should be a valid number, unable to parse string as a number, got 'fast' (expected float)",
        "log.every_steps: input should be greater than or equal to 1, got '0' (expected int)",
        "precision: input should be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8' (expected auto|fp32|bf16|fp16)",
        "--seed has no value (write --seed VALUE)",
        "python -m training.gpt --help",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--checkpoint.every_steps", "0"), "a mistake in the options"),  # a key of two types
        (("--checkpoint.every_steps", "0"), "or input should be 'auto', got '0' (expected int|auto)."),
        (("--model.heads", "5"), ": model.heads (5) must divide model.width (128)."),
        (("--offline",), ": there is no key offline."),
        (("--budget", "1y"), "say the unit, as in 40m or 1h30m, got '1y' (expected duration|null)."),
        (("--seed", "9" * 30), "seed: input should be less than"),
        (("maybe",), "there is no config file maybe (a word that belongs to no option is the config file)."),
    ],
)
def test_a_mistake_is_said_once_and_without_what_pydantic_calls_things(words, said):
    assert said in refusal(*REQUIRED, *words)


def test_a_path_below_the_home_folder_is_found_where_no_shell_has_read_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = read("--run_dir=~/runs/x", "--data", "~me/x", "--resume_from", "x/~")
    assert (options.run_dir, options.data, options.resume_from) == (Path("/home/me/runs/x"), Path("~me/x"), Path("x/~"))


def test_config_of_another_training_is_named_as_that(tmp_path):
    for config in (ROOT / "configs/seq2seq/sample.yaml", ROOT / "configs/qlora/tiny.yaml"):
        name = config.parent.name
        assert f"{config} is for another training: python -m training.{name} {config}" in refusal(str(config))
    other = config_file(tmp_path, "run_dir: x\ndata: y\ntraining: characters\n")
    assert "is for another training: python -m characters" in refusal(other)
    mistaken = config_file(tmp_path, "run_dir: x\ndata: y\nmodle: 3\n")
    assert "another training" not in refusal(mistaken)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model.layers", "0"], "model.layers"),
        (["--model.layers", "2.5"], "model.layers"),
        (["--model.dropout", "1"], "model.dropout"),
        (["--model.heads", "3", "--model.width", "32"], "model.heads (3) must divide model.width (32)"),
        (["--model.heads", "32", "--model.width", "32"], "even width per head, got 1"),
        (["--model", "3"], "model is a group of keys (model."),
        (["--run_dir="], "--run_dir has an empty value (write --run_dir VALUE"),
        (["--run_dir", ""], "--run_dir has an empty value"),
        (["-o", "x"], "a mistake in the options (the command line): -o: options begin with two dashes"),
        (["--model.width.x", "3"], "model.width"),
        (["--optim.lr", "0"], "optim.lr"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr", "inf"], "optim.lr"),
        (["--optim.epochs", "inf"], "optim.epochs"),
        (["--optim.epochs", "-1"], "optim.epochs"),
        (["--optim.lr", "none"], "optim.lr"),
        (["--optim.schedule", "cos"], "cosine|linear|wsd|constant"),
        (["--seed", "-1"], "seed"),
        (["--seed", "1e3"], "seed"),
        (["--checkpoint.keep", "0"], "checkpoint.keep"),
        (["--loss.label_smoothing", "1"], "loss.label_smoothing"),
        (["--batch.micro_batches_per_step", "0"], "batch.micro_batches_per_step"),
        (["--batch.tokens_per_micro_batch", "null"], "one bound is needed"),
    ],
)
def test_impossible_value_is_refused_with_its_key(words, named):
    assert named in refusal(*REQUIRED, *words)


def test_help_lists_every_key_with_type_default_and_meaning(launch: Launch):
    result = launch("--help").wait()
    assert result.status == 0, result
    listed = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("  --")}
    keys = all_keys(GPTConfig)
    assert list(listed) == [*(f"--{key}" for key in keys), "--dry-run"]
    for key, field in keys.items():
        line = listed[f"--{key}"]
        assert field.description and field.description in line
        default = {"session.margin": "30s", "session.hang_timeout": "10m00s"}.get(key, field.default)
        default = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        assert line.endswith("(required)" if field.is_required() else f"(default {default})")
    kinds = {key: listed[f"--{key}"].split()[1] for key in keys}
    assert kinds["data"] == "path"
    assert kinds["model.layers"] == "int"
    assert kinds["optim.lr"] == "float"
    assert kinds["optim.clip_norm"] == "float|null"
    assert kinds["model.positions"] == "learned|rotary"


def test_mistake_on_the_command_line_is_one_line_without_a_traceback(launch: Launch):
    result = launch(*REQUIRED, "--model.widht", 3).wait()
    assert result.status == 1
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "nearest: model.width" in line


def test_a_key_means_the_same_in_yaml_after_a_blank_and_after_an_equals_sign(tmp_path):
    file = config_file(tmp_path, "optim: {lr: 3e-4, clip_norm: null}\nmodel:\n  width: 64\n")
    from_file = read(file, *REQUIRED)
    assert from_file == read(*REQUIRED, "--optim.lr", "3e-4", "--optim.clip_norm", "null", "--model.width", "64")
    assert from_file == read(*REQUIRED, "--optim.lr=3e-4", "--optim.clip_norm=null", "--model.width=64")
    assert (from_file.optim.lr, from_file.optim.clip_norm, from_file.model.width) == (3e-4, None, 64)


def test_only_null_is_null_since_none_is_the_name_of_a_choice(tmp_path):
    file = config_file(tmp_path, "data: prepared/x\nrun_dir: runs/x\nmodel: {attention: none}\n")
    words = (*REQUIRED, "--model.attention", "none")
    from_file, from_words = (parse(Seq2SeqConfig, given, prog="", about="")[0] for given in ([file], words))
    assert from_file == from_words and from_words.model.attention == "none"
    assert "clip_norm" in refusal(*REQUIRED, "--optim.clip_norm", "none")


def test_on_the_command_line_a_dash_may_stand_for_an_underscore():
    assert read(*REQUIRED, "--log.every-steps", "7") == read(*REQUIRED, "--log.every_steps", "7")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("3m05s", 185),
        ("11h30m", 41400),
        ("1d04h", 100800),
        ("1.5h", 5400),
        ("4:00:00", 14400),
        ("30:00", 1800),
        ("1-00:00:00", 86400),
    ],
)
def test_durations_are_read_as_people_and_slurm_write_them(tmp_path, text, seconds):
    config = read(*REQUIRED, "--session.time_limit", text)
    assert config.session.time_limit == seconds
    assert read(config_file(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("text", ["soon", "-5", "5 apples", "1h2", "inf", "nan", "0", "1:2:3:4"])
def test_what_is_no_duration_is_refused_with_the_key(text):
    assert "session.time_limit" in refusal(*REQUIRED, "--session.time_limit", text)


def test_the_command_line_wins_over_the_file_and_the_last_of_two_wins(tmp_path):
    file = config_file(tmp_path, "optim: {lr: 1, beta1: 0.5}\n")
    options = read(*REQUIRED, "--optim.lr", "2", file, "--optim.lr=3")
    assert (options.optim.lr, options.optim.beta1) == (3, 0.5)


def test_a_value_may_hold_an_equals_sign_or_begin_with_a_dash():
    assert read("--run_dir=runs/a=b", "--data", "x").run_dir == Path("runs/a=b")
    assert "optim.beta1: input should be greater than or equal to 0, got '-1'" in refusal(
        *REQUIRED, "--optim.beta1", "-1"
    )


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "optim: {lr: 1, beta1: 0.5, lr: 1}\n"])
def test_key_twice_in_yaml_is_refused(tmp_path, text):
    assert "stands twice" in refusal(config_file(tmp_path, text), *REQUIRED)


LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijkl"))


@pytest.mark.parametrize(
    "text", [LAUGHS, "data: &a [*a]\n", "data: &a {b: *a}\n", "optim: &a {lr: 1}\nmodel: {<<: *a}\n"]
)
def test_an_alias_in_yaml_is_refused(tmp_path, text):
    assert re.search(
        r"line \d+ is not valid YAML: \*a is an alias, .* write the value itself",
        refusal(config_file(tmp_path, text), *REQUIRED),
    )


@pytest.mark.parametrize("revision", ['x"; import os', "$(id)", "--token", "a b", "x\u2028y"])
def test_a_revision_is_a_name_and_nothing_that_a_shell_or_python_would_run(revision):
    with pytest.raises(UserError, match="revision"):
        parse(QLoRAConfig, [*REQUIRED, "--base_model", "m", f"--base_revision={revision}"], prog="", about="")
    for good in ("main", "refs/pr/1", "v1.0", "0123456789abcdef"):
        read, _ = parse(QLoRAConfig, [*REQUIRED, "--base_model", "m", "--base_revision", good], prog="", about="")
        assert read.base_revision == good


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nmodel: width: 3\n", ", line 2 is not valid YAML"),
        ("\tseed: 3\n", "is not valid YAML"),
        ("seed: [1\n", "is not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("data: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("{[a]: b}\n", "is not valid YAML"),  # a key that is a list
        ("data: 2024-13-45\n", "is not valid YAML"),  # a date that does not exist
        ("- seed: 3\n", "holds a list, not `key: value` lines"),
        ("seed\n", "holds a str, not `key: value` lines"),
        ("种子: 1\n".encode("gb18030"), "is not a UTF-8 text file"),
        (bytes(range(256)), "is not a UTF-8 text file"),
        (b"seed: \x00", "is not valid YAML"),
        ("data: " + 5000 * "[", "is not valid YAML"),
    ],
)
def test_file_that_is_no_config_is_one_clear_line(tmp_path, text, said):
    file = config_file(tmp_path, text)
    message = refusal(file, *REQUIRED)
    assert message.startswith(file)
    assert said in message


def test_missing_config_file_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert refusal("configs/gpt/smaple.yaml") == (
        "there is no config file configs/gpt/smaple.yaml. Did you mean configs/gpt/sample.yaml?"
    )


def test_folder_for_a_config_file_is_one_clear_line(tmp_path):
    assert refusal(str(tmp_path)) == f"{tmp_path} is a folder; name a .yaml file in it"


def test_two_config_files_are_refused(tmp_path):
    file = config_file(tmp_path, "seed: 1\n")
    assert "one config file is expected, found 2" in refusal(file, file, *REQUIRED)


def test_empty_config_file_means_the_defaults(tmp_path):
    assert read(config_file(tmp_path, "# nothing yet\n"), *REQUIRED) == read(*REQUIRED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_survives_writing_and_reading(path, tmp_path):
    options = read(str(path))
    assert read(config_file(tmp_path, to_yaml(options))) == options


def test_there_are_shipped_configs():
    assert {"base", "sample"} <= {path.stem for path in CONFIGS}


def test_no_option_is_taken_by_torchrun():
    """torchrun looks for abbreviations of its own options behind the script's name too: `--d` would not get through."""
    for key in all_keys(GPTConfig):
        for words in ([f"--{key}", "1"], [f"--{key}=1"]):
            parsed = get_args_parser().parse_args(["--standalone", "-m", "training.gpt", *words])
            assert parsed.training_script_args == words
    for word in ("--help", "--dry-run"):
        parsed = get_args_parser().parse_args(["--standalone", "-m", "training.gpt", word])
        assert parsed.training_script_args == [word]


def test_no_plain_key_abbreviates_an_option_of_torchrun():
    theirs = [text for action in get_args_parser()._actions for text in action.option_strings]
    plain = [key for key in all_keys(GPTConfig) if "." not in key]
    assert [(key, text) for key in plain for text in theirs if text.startswith(f"--{key}")] == []


class Switches(Options):
    run_dir: str = "runs/x"
    fast: bool = False
    slow_start: bool = True


@pytest.mark.parametrize(
    ("words", "fast", "slow_start", "dry_run"),
    [
        ([], False, True, False),
        (["--fast"], True, True, False),
        (["--fast", "--run-dir", "runs/y"], True, True, False),
        (["--slow-start", "false", "--fast", "on"], True, False, False),
        (["--slow_start=no", "--dry_run"], False, False, True),
        (["--dry-run", "false", "--fast=false"], False, True, False),
    ],
)
def test_a_key_of_true_or_false_is_true_alone_and_undone_by_false(words, fast, slow_start, dry_run, tmp_path):
    file = config_file(tmp_path, "run_dir: runs/z\n")
    for argv in (words, [file, *words], [*words, file]):
        options, dry = parse(Switches, argv, prog="prog", about="")
        assert (options.fast, options.slow_start, dry) == (fast, slow_start, dry_run)
        assert raw_values([file, *words]).get("fast", False) in ((True, "true", "on") if fast else (False, "false"))


def test_commands_without_a_config_read_their_options_in_the_same_style():
    def read(*words: str) -> argparse.Namespace:
        parser = CommandLine("prog", "What it does.")
        parser.add_argument("run_dir")
        parser.add_argument("--beam_size", type=int, default=1)
        parser.add_argument("--no-dry-run", **FLAG)
        return parser.parse_args(words)

    assert read("--no_dry_run", "runs/x", "--beam-size", "4") == read("runs/x", "--beam_size=4", "--no-dry-run", "true")
    assert not read("--no-dry-run", "false", "runs/x").no_dry_run
    for words, said in (
        (("runs/x", "--no-dry-run=perhaps"), "expected true or false, got perhaps"),
        (("runs/x", "--beam"), "--beam is none of the options (nearest: --beam_size). All options: prog --help"),
        (("runs/x", "--beam-size", "two"), "argument --beam_size: invalid int value: 'two'"),
        ((), "the following arguments are required: run_dir"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            read(*words)

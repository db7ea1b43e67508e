"""Trained adapters outside of Relay: loaded by peft with the run's logits, or merged into what they were trained on.

Everything is loaded from the exported folder as users do it, without a network.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import disc_law
from tests.support.base_models import make_tiny_qwen2, make_tokenizer
from tests.support.commands import launching
from tests.support.exports import assert_older_transformers_loads_the_same, content_of, nobody_asked
from training.base.console import UserError
from training.data.conversations import FORMAT as CONVERSATIONS
from training.data.prepared import FORMAT as PAIRS
from training.evaluation import export
from training.evaluation.chat_model.adapters import TrainedAdapters, open_adapters
from training.evaluation.exports import adapters
from training.evaluation.exports.adapter_card import licence_of
from training.evaluation.exports.adapters import Export, prompts_of, trained_in
from training.evaluation.exports.folder import older_keys
from training.evaluation.exports.merging import difference, logits_of
from training.models.adapted_model import LoraOptions
from training.models.base_model import QuantisationOptions
from training.qlora import build_model

CPU = torch.device("cpu")
MODULE = "training.evaluation.export"
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ADAPTERS = {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "export.json", *TOKENIZER}
MERGED = {"README.md", "config.json", "export.json", "generation_config.json", "model.safetensors", *TOKENIZER}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny base model whose layers matter, as those of a trained one do: what 4 bits take from them is heard."""
    folder = tmp_path_factory.mktemp("base")
    dice = random.Random(0)
    texts = ["".join(chr(0x4E00 + dice.randrange(300)) for _ in range(60)) for _ in range(40)]
    made = make_tiny_qwen2(folder / "tiny", make_tokenizer(folder / "tokenizer", texts))
    model = AutoModelForCausalLM.from_pretrained(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.mul_(8)
    model.config.rope_parameters["rope_theta"] = 1_000_000.0  # Qwen2.5's
    model.save_pretrained(made)
    # As published tokenizers have it, whose files transformers 4 can read.
    settings = made / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return made


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A run of a few steps with so high a learning rate that its adapters change what the model says."""
    folder = tmp_path_factory.mktemp("qlora")
    dice = random.Random(1)

    def text(length: int) -> str:
        return "".join(chr(0x4E00 + dice.randrange(300)) for _ in range(length))

    records = [
        {"id": f"legal_question_answering_{number}", "input": f"{text(30)}是否正确？", "output": text(20)}
        for number in range(60)
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (folder / "source").mkdir()
    (folder / "source/DISC-Law-SFT-Pair-QA-released.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--source", folder / "source", "--tokenizer", base, "--output", folder / "data", "--workers", 1]
    assert disc_law.main([str(word) for word in words]) == 0
    options = {
        **{"run_dir": folder / "run", "data": folder / "data", "base_model": base, "wandb.mode": "disabled"},
        **{"lora.rank": 8, "optim.lr": 0.01, "optim.steps": 6, "optim.warmup_steps": 1},
        **{"batch.tokens_per_micro_batch": 1024, "checkpoint.every_steps": 3, "log.validate_every_steps": 3},
    }
    with launching(folder) as launch:
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        result = launch(*words, module="training.qlora").wait()
    assert result.status == 0, result
    return folder / "run"


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def opened(run: Path, *, kind: str = "nf4", **lora: object) -> TrainedAdapters:
    """As if the adapters had been trained with these options: they have learned nothing, but change a lot."""
    trained = open_adapters(run, "last", device=CPU)
    if kind != "nf4" or lora:
        changed = {"lora": LoraOptions(rank=4, **lora), "quantisation": QuantisationOptions(kind=kind)}
        trained = replace(trained, config=trained.config.model_copy(update=changed))
        torch.manual_seed(1)
        model = build_model(trained.config, trained.base, torch.float32, CPU, trains=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    magnitude = "magnitude" in name
                    parameter.mul_(torch.rand_like(parameter) + 0.5) if magnitude else parameter.normal_(std=0.2)
        trained = replace(trained, model=model.eval())
    return trained


def logits(model: torch.nn.Module, trained: TrainedAdapters) -> torch.Tensor:
    prompts = prompts_of(trained)
    return logits_of(model, prompts.ids, prompts.lengths).float()


def script_of(folder: Path) -> str:
    """The lines of the card, as they stand."""
    return re.search("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]


def test_the_command_makes_adapters_that_peft_loads_with_the_runs_logits(run, base, tmp_path, monkeypatch, capsys):
    named, folder = shutil.copytree(run, tmp_path / "my-run"), tmp_path / "deep/export"
    with launching(tmp_path) as launch, nobody_asked() as environment:
        words = (named, "--output", folder, "--checkpoint", "last")
        made = launch(*words, module=MODULE, environment=environment).wait()
    assert made.status == 0 and made.err == "", made
    assert "logits are the run's, bit for bit" in made.out
    assert {path.name for path in folder.iterdir()} == ADAPTERS
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    about = json.loads((folder / "export.json").read_text())
    assert (about["kind"], about["run"], about["step"], about["weights"]) == ("adapters", "my-run", 6, "last")
    weights = run / "checkpoints/step-0000000006/model.safetensors"
    assert about["checkpoints"] == {"6": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert set(about["files"]) == ADAPTERS - {"export.json"}
    for name, file in about["files"].items():
        content = (folder / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["peft_type"], settings["r"]) == (str(base), "LORA", 8)
    # What vLLM asks of a folder of adapters: names of layers, and nothing that is trained beside the adapters.
    assert settings["target_modules"] == sorted(f"{each}_proj" for each in ["down", "gate", "k", "o", "q", "up", "v"])
    assert (settings["bias"], settings["modules_to_save"], settings["use_dora"]) == ("none", None, False)

    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "peft" and header["datasets"] == ["ShengbinYue/DISC-Law-SFT"]
    assert about["data_fingerprint"] in card and "Apache-2.0" in card and str(tmp_path) not in card
    # Where a CPU can compute in bf16, the library does so without being asked to; the training keeps it from that.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    found: dict[str, object] = {}
    exec(script_of(folder), found)
    assert capsys.readouterr().out
    trained = opened(run)
    assert torch.equal(logits(found["model"].eval(), trained), logits(trained.model.model, trained))
    assert found["tokenizer"].chat_template == trained.tokenizer._tokenizer.chat_template


def test_the_command_merges_them_into_a_model_that_needs_neither_peft_nor_bitsandbytes(run, tmp_path):
    folder = tmp_path / "export"
    with launching(tmp_path) as launch, nobody_asked() as environment:
        words = (run, "--output", folder, "--merge", "--checkpoint", "last")
        made = launch(*words, module=MODULE, environment=environment).wait()
    assert made.status == 0 and made.err == "", made
    assert "needs about" in made.out and "in bfloat16" in made.out and "differ from the run's by" in made.out
    assert {path.name for path in folder.iterdir()} == MERGED
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings and settings["dtype"] == "bfloat16" and settings["use_cache"]
    about = json.loads((folder / "export.json").read_text())
    assert (about["kind"], about["dtype"], about["architecture"]) == ("merged", "bfloat16", "Qwen2ForCausalLM")

    with nobody_asked() as environment:
        alone = f"import sys\nsys.modules.update(peft=None, bitsandbytes=None)\n{script_of(folder)}"
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", alone], cwd=folder, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0 and "warn" not in done.stderr.lower(), done.stderr

    trained = opened(run)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == torch.bfloat16
    apart = difference(logits(loaded.eval(), trained), logits(trained.model.model, trained))
    assert about["difference"] == apart.rounded() and str(apart) in made.out
    # What the adapters say is far above rounding, and rounding is what the difference is.
    assert about["of_the_base_model"]["mean"] > 20 * apart.mean
    assert 0.2 < apart.mean / about["of_computing_in_this_type"]["mean"] < 4


@pytest.fixture(scope="module")
def merged_export(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "export"
    Export(opened(run)).merged(folder, "bfloat16")
    return folder


def test_a_merged_model_has_the_keys_of_transformers_4_beside_those_of_5(merged_export):
    config = json.loads((merged_export / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 1_000_000.0, "rope_type": "default"}
    assert config["rope_theta"] == 1_000_000.0 and "rope_scaling" not in config
    assert "Its keys are those of transformers 4.57, too." in (merged_export / "README.md").read_text(encoding="utf-8")


def test_adapters_whose_tokenizer_would_be_another_are_not_exported(run, tmp_path, monkeypatch):
    export = Export(opened(run))
    read = adapters.reopened

    def read_otherwise(folder: Path, about: dict[str, object]) -> object:
        return read(folder, about) if folder.parent == run else SimpleNamespace(sha256="another")

    monkeypatch.setattr(adapters, "reopened", read_otherwise)
    with pytest.raises(UserError, match="in an export it is read as another: add --merge"):
        export.adapters(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_in_prepared_data_and_exports_as_it_was_published(run, base, merged_export, tmp_path):
    Export(opened(run)).adapters(tmp_path / "adapters")
    for folder in (run / "tokenizer", tmp_path / "adapters", merged_export):
        for name in TOKENIZER:
            assert (folder / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.whole
def test_transformers_4_loads_the_same_merged_model_and_tokenizer(merged_export, tmp_path):
    assert_older_transformers_loads_the_same(merged_export, tmp_path / "older.pt")


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("kind", "rotary", "expected"),
    [
        ("qwen2", YARN, {"rope_theta": 5e5, "rope_scaling": YARN}),
        ("stablelm", {"partial_rotary_factor": 0.5}, {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
    ],
)
def test_rotary_positions_of_every_kind_have_keys_that_both_versions_read(kind, rotary, expected):
    rotary = {"rope_type": "default", "rope_theta": 5e5, **rotary}
    written = transformers.AutoConfig.for_model(kind, **SMALL, rope_parameters=rotary).to_dict()
    assert older_keys(written) == expected
    both = transformers.AutoConfig.for_model(**{**written, **expected})
    assert both.rope_parameters == written["rope_parameters"]


def test_where_transformers_4_has_other_keys_nothing_is_promised():
    rotary = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert older_keys({"model_type": "gemma3_text", "rope_parameters": rotary}) is None
    capped = {"model_type": "gemma2", "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}
    assert older_keys(capped) is not None and older_keys({**capped, "attn_logit_softcapping": 50.0}) is None
    assert older_keys({"model_type": "gemma3", "text_config": {"rope_parameters": rotary}}) is None
    assert older_keys({"model_type": "gpt2"}) == {}


VARIANTS = {
    "lora": {},
    "dora": {"dora": True},
    "some layers, rslora": {"targets": ("q_proj", "v_proj"), "rslora": True},
    "unquantised": {"kind": "none"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_adapters_is_exported_and_merged_exactly(run, base, tmp_path, variant):
    options = VARIANTS[variant]
    trained = opened(run, **options)
    expected = logits(trained.model.model, trained)
    typical = expected.abs().mean().item()
    Export(trained).adapters(tmp_path / "adapters")
    Export(opened(run, **options)).merged(tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    exact = difference(logits(merged, trained), expected)
    assert exact.mean < 1e-5 * typical and exact.same > 0.99
    # Into the weights as they were before they went into 4 bits: another model.
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(original, tmp_path / "adapters").merge_and_unload().eval()
    wrong = difference(logits(adapted, trained), expected)
    if options.get("kind") == "none":
        assert wrong.mean < 1e-5 * typical
    else:
        assert wrong.mean > 1000 * exact.mean


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_even_in_16_bits_the_original_base_would_be_another_model_by_far(run, base, tmp_path, dtype):
    trained = opened(run)
    expected = logits(trained.model.model, trained)
    Export(trained).adapters(tmp_path / "adapters")
    Export(opened(run)).merged(tmp_path / "merged", dtype)
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert right.dtype == getattr(torch, dtype)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrong = peft.PeftModel.from_pretrained(original, tmp_path / "adapters").merge_and_unload().to(right.dtype).eval()
    factor = difference(logits(wrong, trained), expected).mean / difference(logits(right, trained), expected).mean
    assert factor > 8, factor


def test_generation_ends_where_answers_end_in_training(run, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"eos_token_id": 0, "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = [str(run), "--output", str(tmp_path / "export"), "--merge", "--base_model", str(folder)]
    assert export.main(words) == 0
    written = json.loads((tmp_path / "export/generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(tmp_path / "export").convert_tokens_to_ids("<|im_end|>")
    assert written["eos_token_id"] == [end, 0] and written["temperature"] == 0.7


def test_only_an_earlier_export_that_nobody_changed_is_replaced(run, tmp_path):
    output = tmp_path / "export"

    def refusal(*words: str) -> str:
        before = content_of(tmp_path)
        with pytest.raises(UserError) as error:
            export.main([str(run), "--output", str(output), *words])
        assert content_of(tmp_path) == before
        return str(error.value)

    assert export.main([str(run), "--output", str(output)]) == 0
    first = content_of(output)
    assert "already; choose another --output, or replace it with --overwrite" in refusal()
    assert export.main([str(run), "--output", str(output), "--overwrite"]) == 0
    assert content_of(output) == first  # the same checkpoint gives the same bytes
    assert export.main([str(run), "--output", str(output), "--overwrite", "--merge"]) == 0
    assert {path.name for path in output.iterdir()} == MERGED
    (output / "notes.txt").write_text("mine")
    assert "was changed since it was exported (notes.txt)" in refusal("--overwrite")
    (output / "export.json").unlink()
    assert "holds something else than an export" in refusal("--overwrite")


def refused(run: Path, output: Path, *words: object) -> str:
    """What the command says, in one line; it must leave nothing behind."""
    with pytest.raises(UserError) as error:
        export.main([str(run), "--output", str(output), *map(str, words)])
    assert list(output.parent.glob("*export*")) + list(output.parent.glob(".*export*")) == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_exported_is_refused_in_one_line(run, run_copy, base, tmp_path):
    output = tmp_path / "export"
    assert "there is no run folder" in refused(tmp_path / "nowhere", output)
    assert "is not a run folder, but a model or an export: " in refused(base, output)
    assert "has no effect on adapters" in refused(run, output, "--dtype", "float16")
    assert "names no weights: best, last" in refused(run, output, "--checkpoint", "newest")
    assert "there is no such folder" in refused(run, output, "--base_model", tmp_path / "gone/model/folder")
    other = make_tiny_qwen2(tmp_path / "other", base, seed=1)
    assert "is not the one that the adapters" in refused(run, output, "--base_model", other)

    tokenizer = run_copy / "tokenizer/tokenizer.json"
    content = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(content.replace("<|endoftext|>", "<|end|>"), encoding="utf-8")
    assert "is not the tokenizer that the adapters were trained with" in refused(run_copy, output)
    tokenizer.unlink()
    assert "copy tokenizer/ from the run's prepared data" in refused(run_copy, output)
    data = run_copy / "data.json"
    about = data.read_text(encoding="utf-8")
    data.write_text(about.replace(CONVERSATIONS, PAIRS), encoding="utf-8")
    assert f"{run_copy} holds a qlora model; only those of training.gpt and" in refused(run_copy, output)
    data.write_text(about, encoding="utf-8")
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "checkpoints").mkdir()
    assert "has no valid checkpoint" in refused(run_copy, output)


@pytest.mark.parametrize("damage", ["forgotten adapter", "original base", "missing weight", "adapters of zeros"])
def test_what_would_be_loaded_as_another_model_is_not_published(run, base, tmp_path, monkeypatch, damage):
    if damage == "adapters of zeros":
        save = peft.PeftModel.save_pretrained

        def save_zeros(model, folder, **more):
            save(model, folder, state_dict={k: torch.zeros_like(v) for k, v in model.state_dict().items()}, **more)

        monkeypatch.setattr(peft.PeftModel, "save_pretrained", save_zeros)
        assert "loads the exported adapters as others" in refused(run, tmp_path / "export")
        return
    if damage == "missing weight":
        save = transformers.PreTrainedModel.save_pretrained

        def save_less(model, folder, **more):
            state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("q_proj.bias")}
            save(model, folder, state_dict=state, **more)

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_less)
    elif damage == "forgotten adapter":
        monkeypatch.setattr(peft.tuners.lora.bnb.Linear4bit, "get_delta_weight", lambda *_: torch.zeros(()))
    else:
        Export(opened(run)).adapters(tmp_path / "adapters")

        def merged_into_the_original(model, config, dtype):
            original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            return peft.PeftModel.from_pretrained(original, tmp_path / "adapters").merge_and_unload().to(dtype)

        monkeypatch.setattr(adapters, "merged", merged_into_the_original)
    said = refused(run, tmp_path / "export", "--merge")
    assert ("keys that do not fit" if damage == "missing weight" else "is another one than the run's") in said


def test_a_model_whose_values_exceed_fp16_is_not_written_in_it(run, tmp_path):
    trained = opened(run)
    with torch.no_grad():
        trained.model.model.get_base_model().model.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match="exceed that type; export it with --merge --dtype bfloat16"):
        Export(trained).merged(tmp_path / "export", "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [(), ("--merge",)], ids=["adapters", "merged"])
def test_a_full_disk_is_named_and_nothing_is_left(run, small_disk, words):
    (small_disk / "filler").write_bytes(bytes(1_500_000))
    assert "no space left on the disk" in refused(run, small_disk / "export", *words)


@pytest.mark.parametrize("package", ["peft", "bitsandbytes", "transformers"])
def test_without_a_library_the_command_says_what_to_install(run, tmp_path, monkeypatch, package):
    opened(run)  # first: transformers would remember for the other tests of this process that the library is missing
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs {package}: `pip install -r requirements.txt`" in refused(run, tmp_path / "export")


def test_logits_are_compared_on_held_out_conversations_or_without_them_on_random_ids(run, tmp_path):
    trained = opened(run)
    assert "conversations of the test part" in str(prompts_of(trained))
    gone = replace(trained, config=trained.config.model_copy(update={"data": tmp_path / "gone"}))
    other = replace(trained, data={**trained.data, "fingerprint": "another"})
    assert str(prompts_of(gone)) == str(prompts_of(other)) == "768 tokens of random ids"


def test_the_four_bits_are_made_of_the_type_that_the_run_computed_in(run_copy):
    assert trained_in(run_copy) == "fp32"  # auto, on a CPU
    sessions = json.loads((run_copy / "sessions.json").read_text())
    sessions[-1]["device"] = "NVIDIA H100"
    (run_copy / "sessions.json").write_text(json.dumps(sessions))
    assert trained_in(run_copy) == "bf16"
    state = run_copy / "checkpoints/step-0000000006/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "scaler": {"scale": 1024}}))
    assert trained_in(run_copy) == "fp16"
    assert trained_in(run_copy / "nowhere") is None


def test_the_card_names_the_base_models_licence_as_far_as_it_is_known(tmp_path):
    assert licence_of("Qwen/Qwen2.5-3B-Instruct", tmp_path)[0] == "qwen-research"
    assert licence_of("models/Qwen2.5-7B-Instruct/", tmp_path)[0] == "apache-2.0"
    assert licence_of("own/model", tmp_path) == (None, "not known here: see where it comes from")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# a model\n")
    assert licence_of("Qwen/Qwen2.5-3B-Instruct", tmp_path)[0] == "mine"


def test_a_card_that_would_become_gigabytes_counts_as_none(tmp_path):
    laughs = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijkl"))
    for header in (f"{laughs}license: *l\n", "license: &a [*a]\n", "[" * 5000):
        (tmp_path / "README.md").write_text(f"---\n{header}---\n")
        assert licence_of("Qwen/Qwen2.5-3B-Instruct", tmp_path)[0] == "qwen-research"

"""Base models from anywhere: no code of theirs runs, and they are what they were."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.base_models import make_model, make_tokenizer
from training.base.console import UserError
from training.data.chat import load_chat_tokenizer
from training.models.base_model import (
    QuantisationOptions,
    find_base_model,
    fingerprint_of,
    load_base_model,
    read_config,
)

SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", SHAPE)


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked a question here would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


def test_code_of_a_model_never_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig as Config\n"
    (folder / "theirs.py").write_text(code)
    change(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    with pytest.raises(UserError, match="needs code of its own, which is never run here"):
        read_config(folder, QuantisationOptions(kind="none"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_kernels_of_a_strangers_are_never_asked_for(folder, place):
    config = json.loads((folder / "config.json").read_text())
    for value in ("evil/kernel", {"": "eager", "text_config": "evil/kernel"}, {"a": [{"b": "evil:kernel"}]}):
        (folder / "config.json").write_text(json.dumps({**config, place: value}))
        with pytest.raises(UserError, match="asks for kernels of its own"):
            read_config(folder, QuantisationOptions())
    (folder / "config.json").write_text(json.dumps({**config, place: "eager"}))
    assert read_config(folder, QuantisationOptions()).model_type == config["model_type"]


def test_code_of_a_tokenizer_never_runs(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer", ["什么是合同？", "A contract."])
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"
    (folder / "theirs.py").write_text(code)
    auto_map = {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=auto_map)
    with pytest.raises(UserError, match="needs code of its own, which is never run here"):
        load_chat_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", ".x.safetensors", 7])
def test_index_names_files_of_tensors_beside_it(folder, name):
    change(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    with pytest.raises(UserError, match=r"no \.safetensors file beside it"):
        find_base_model(str(folder), None)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_odd_index_is_said_to_be_one(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is no index of weights"):
        find_base_model(str(folder), None)


def test_adapters_in_the_folder_are_not_loaded_in_silence(folder):
    change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="elsewhere")
    with pytest.raises(UserError, match="holds adapters"):
        find_base_model(str(folder), None)


def test_a_run_or_other_data_is_not_a_model_to_fetch_again(tmp_path):
    with pytest.raises(UserError, match="holds no model: name a folder"):
        find_base_model(str(tmp_path), None)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"is a run, and base_model is a model: .* pass --init_from"):
        find_base_model(str(tmp_path), None)


def test_an_unknown_kind_of_model_is_one_line(folder):
    change(folder / "config.json", model_type="foo9", architectures=["Foo9"])
    with pytest.raises(UserError, match=r"describes no model that transformers knows \(.*foo9.*") as caught:
        read_config(folder, QuantisationOptions())
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off_or_another_models_are_one_line(folder):
    plain, cpu = QuantisationOptions(kind="none"), torch.device("cpu")
    change(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(UserError, match=r"lack \d+ that its config\.json asks for \(model\.layers\.2\."):
        load_base_model(folder, plain, torch.float32, cpu)
    change(folder / "config.json", hidden_size=128)
    with pytest.raises(UserError, match=r"are not those of its config\.json: fetch both again"):
        load_base_model(folder, plain, torch.float32, cpu)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"are damaged or not all there \(.*\): fetch them again"):
        load_base_model(folder, plain, torch.float32, cpu)


def test_every_byte_counts_in_the_fingerprint(folder):
    path = folder / "model.safetensors"
    before, content = fingerprint_of(folder), bytearray(path.read_bytes())
    times = path.stat()
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_of(folder) != before


def test_header_that_says_it_is_endless_is_not_believed(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match="is no file of tensors"):
        fingerprint_of(folder)


def test_weights_that_may_hold_code_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="which may hold code"):
        find_base_model(str(folder), None)

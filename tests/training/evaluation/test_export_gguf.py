"""Merged models as GGUF: what stands in the file, what a llama.cpp makes of it, and the Modelfile for Ollama."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2

from tests.support.base_models import CHATML, make_tokenizer, smollm2
from tests.support.commands import PATIENCE_S, ROOT, Launch
from tests.support.legal_records import law_run, law_tokenizer
from tests.support.runs import reference
from training.base.console import UserError
from training.data.chat import assistant, load_chat_tokenizer, user
from training.evaluation import chat, export
from training.evaluation.chat_model.conversation import ChatModel, open_chat
from training.evaluation.chat_model.streaming import Speaker
from training.evaluation.exports.adapters import Export, open_run
from training.evaluation.exports.gguf_file import check_convertible, write
from training.evaluation.exports.modelfile import modelfile, pieces_of

TOKENIZERS = ROOT / "tests/cases/tokenizers"
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 128},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 256}
# Structures as their families have them: own head sizes, tied heads, biases, scaled positions.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-yarn": {"tie_word_embeddings": False, "rope_parameters": YARN},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
}

QUESTIONS = [
    *(f"第{number}号合同如何解除？" for number in (3, 61, 75)),
    *("What is the capital of France?", "Name three colours.", "How many days has a week?", "What is gravity?"),
    *("Who wrote Hamlet?", "What do bees make?", "Translate 'good morning' into Spanish.", "Why is the sky blue?"),
    *("What is 2 + 2?", "Give me a recipe for tea.", "What is a contract?", "How do I boil an egg?", "Say hello."),
    *("What is the largest ocean?", "Explain photosynthesis.", "What is a noun?", "Write a short poem about rain."),
]


def structure_of(name: str) -> str:
    return "llama" if name.startswith("llama") else name.partition("-")[0]


def made(name: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """A random model of this structure, in float16, with a tokenizer that has fewer words than it."""
    shutil.copytree(tokenizer or law_tokenizer(), folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder)) + 4
    config = transformers.AutoConfig.for_model(structure_of(name), **SHAPE, **MODELS[name], vocab_size=size)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # norms and biases, too, so that one in another's place is seen
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.half().save_pretrained(folder)
    return folder


def written(source: Path, kind: str = "f16") -> Path:
    output = source.parent / f"{source.name}-{kind}.gguf"
    end_id = load_chat_tokenizer(str(source)).end_id
    write(source, output, kind, name="tiny", end_id=end_id)
    return output


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model_and_tokenizer_out_of_the_file(name, tmp_path):
    source = made(name, tmp_path / name)
    path = written(source)
    transformers.utils.logging.disable_progress_bar()
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    # Biases of attention are no part of what transformers reads of Llama's GGUF.
    ids = torch.randint(expected.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    if name != "llama":
        with torch.inference_mode():
            assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-4)
    state = found.state_dict()
    for key, tensor in expected.state_dict().items():
        assert not (key in state and not key.endswith("proj.bias")) or torch.equal(state[key], tensor), key
    assert not [key for key in expected.state_dict().keys() - state.keys() if not key.endswith("proj.bias")]
    ours = transformers.AutoTokenizer.from_pretrained(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "根据《刑法》第3条，标签5。 What now?<|im_end|>\n"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"] and theirs.chat_template == ours.chat_template


@pytest.mark.parametrize("name", MODELS)
def test_everything_that_decides_how_it_is_computed_stands_in_the_file(name, tmp_path):
    source = made(name, tmp_path / name)
    path = written(source)
    fields, kind, more = fields_of(path), structure_of(name), MODELS[name]
    config = transformers.AutoConfig.from_pretrained(source)
    head_size = more.get("head_dim", 16)
    expected = {
        "general.architecture": kind,
        "general.file_type": 1,
        f"{kind}.block_count": 2,
        f"{kind}.context_length": 512,
        f"{kind}.embedding_length": 64,
        f"{kind}.feed_forward_length": 96,
        f"{kind}.attention.head_count": 4,
        f"{kind}.attention.head_count_kv": 2,
        f"{kind}.attention.key_length": head_size,
        f"{kind}.attention.value_length": head_size,
        f"{kind}.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        f"{kind}.rope.dimension_count": head_size,
        f"{kind}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{kind}.vocab_size": config.vocab_size,
    }
    if name == "qwen2-yarn":
        expected |= {
            f"{kind}.rope.scaling.type": "yarn",
            f"{kind}.rope.scaling.factor": 2.0,
            f"{kind}.rope.scaling.original_context_length": 256,
        }
    assert {key: fields.get(key) for key in expected} == expected
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in tensors) is not more["tie_word_embeddings"]
    assert ("rope_freqs.weight" in tensors) is (name == "llama3")
    assert {tensor.tensor_type.name for each, tensor in tensors.items() if "norm" in each or "bias" in each} == {"F32"}
    assert {tensor.tensor_type.name for each, tensor in tensors.items() if "proj" in each} <= {"F16"}


def test_the_tokenizer_stands_in_the_file_with_what_is_a_control_token(tmp_path):
    source = made("qwen3", tmp_path / "qwen3", TOKENIZERS / "qwen3_like")
    fields, tokenizer = fields_of(written(source)), transformers.AutoTokenizer.from_pretrained(source)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(tokenizer) + 4 and kinds[-4:] == [gguf.TokenType.UNUSED] * 4
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(set(tokens)) == len(tokens)
    for number, added in tokenizer.added_tokens_decoder.items():
        assert kinds[number] == (gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED), added
    merges = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [each if isinstance(each, str) else " ".join(each) for each in merges]
    expected = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eot_token_id": load_chat_tokenizer(str(source)).end_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: fields.get(key) for key in expected} == expected


def test_in_8_bits_a_weight_is_off_by_half_a_step_and_the_rounding_of_that_step_at_most(tmp_path):
    source = made("qwen2", tmp_path / "qwen2")
    plain, packed = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(written(source, kind)).tensors} for kind in ("f16", "q8_0")
    )
    assert fields_of(tmp_path / "qwen2-q8_0.gguf")["general.file_type"] == 7
    assert plain.keys() == packed.keys()
    assert sum(tensor.tensor_type.name == "Q8_0" for tensor in packed.values()) == 2 * 7 + 1
    for name, tensor in packed.items():
        values = plain[name].data.astype(np.float32)
        if tensor.tensor_type.name == "Q8_0":
            step = np.abs(values.reshape(-1, 32)).max(-1, keepdims=True) / 127
            apart = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - values).reshape(-1, 32)
            assert (apart <= 0.57 * step).all(), name
        else:
            assert np.array_equal(tensor.data, plain[name].data)


def test_what_gguf_cannot_say_here_is_refused_with_the_converter_that_can(tmp_path, sample_data):
    tokenizer = law_tokenizer()
    tell = transformers.AutoConfig.for_model
    cases = {
        "gemma2": tell("gemma2"),
        "layer_types": tell("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=64),
        "hidden_act": tell("llama", hidden_act="gelu"),
        "rope_parameters": tell("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "attention_bias": tell("qwen3", attention_bias=True),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=f"{message}.*convert_hf_to_gguf.py"):
            check_convertible(config, tokenizer)
    strange = shutil.copytree(tokenizer, tmp_path / "strange")
    about = json.loads((strange / "tokenizer.json").read_text("utf-8"))
    for change in ({"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": {"type": "Lowercase"}}):
        (strange / "tokenizer.json").write_text(json.dumps({**about, **change}), encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer cannot be said.*convert_hf_to_gguf.py"):
            check_convertible(tell("llama"), strange)
    shape = ("--model.layers", 1, "--model.heads", 2, "--model.width", 48, "--model.context", 40)
    steps = ("--optim.steps", 40, "--optim.warmup_steps", 5, "--batch.tokens_per_micro_batch", 512)
    gpt = reference(sample_data, *shape, *steps)
    with pytest.raises(UserError, match=r"is a translator.*convert_hf_to_gguf.py"):
        export.main([str(gpt), "--output", str(tmp_path / "gpt"), "--gguf", "f16"])
    for more in (("--merge",), ("--dtype", "float16")):
        with pytest.raises(UserError, match="leave --merge and --dtype out"):
            export.main([str(law_run()), "--output", str(tmp_path / "x"), "--gguf", "f16", *more])
    assert not (tmp_path / "gpt").exists() and not (tmp_path / "x").exists()


def test_a_run_becomes_a_file_with_modelfile_and_card_and_nothing_beside_them(tmp_path, capsys):
    output = tmp_path / "law"
    assert export.main([str(law_run()), "--output", str(output), "--gguf", "q8_0"]) == 0
    name = f"{law_run().name}-q8_0.gguf"
    assert {path.name for path in output.iterdir()} == {name, "Modelfile", "README.md", "export.json"}
    said = capsys.readouterr().out
    assert "read back by gguf" in said and f"ollama create {law_run().name}" in said
    about = json.loads((output / "export.json").read_text("utf-8"))
    assert about["kind"] == "gguf" and set(about["files"]) == {name, "Modelfile", "README.md"}
    card = (output / "README.md").read_text("utf-8")
    assert "```sh\nollama create" in card and f"llama-cli -m {name}" in card and "library_name: gguf" in card
    lines = (output / "Modelfile").read_text("utf-8").splitlines()
    assert lines[0] == f"FROM ./{name}" and 'PARAMETER stop "<|im_end|>"' in lines and 'SYSTEM """You help."""' in lines
    with pytest.raises(UserError, match=r"is for llama\.cpp and Ollama"):
        chat.main([str(output)])


def test_a_model_whose_weights_exceed_float16_is_refused_and_nothing_is_left(tmp_path):
    trained = open_run(law_run(), "last", None)
    with torch.no_grad():
        trained.model.model.get_base_model().model.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match="exceed that type; export it with --merge --dtype bfloat16"):
        Export(trained).gguf(tmp_path / "export", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_modelfile_says_the_prompt_of_the_chat_template_or_there_is_none(tmp_path):
    turns = [user("甲？"), assistant("乙。"), user("丙？")]
    for folder in (law_tokenizer(), TOKENIZERS / "llama3_like", TOKENIZERS / "qwen3_like"):
        tokenizer = load_chat_tokenizer(str(folder))
        pieces = pieces_of(tokenizer)
        assert pieces is not None, folder
        for system in (None, "丁。"):
            before = [] if system is None else [{"role": "system", "content": system}]
            assert pieces.render(system, ["甲？", "乙。", "丙？"]) == tokenizer.prompt([*before, *turns])
    # A template that says something else in a long conversation is made of no such pieces.
    counting = "{%- if messages | length > 3 %}{{- 'At last: ' }}{%- endif %}" + CHATML
    folder = make_tokenizer(tmp_path / "counting", ["你好。"] * 9, template=counting)
    assert pieces_of(load_chat_tokenizer(str(folder))) is None


def test_a_modelfile_leaves_out_what_llama_cpp_begins_every_text_with():
    pieces = pieces_of(load_chat_tokenizer(str(law_tokenizer())))
    text = modelfile(pieces, "x.gguf", end="<|im_end|>", begin="<|im_start|>")
    (template,) = (line for line in text.splitlines() if line.startswith("TEMPLATE"))
    assert template.startswith('TEMPLATE """{{ if .System }}{{ "system\\n" }}{{ .System }}')


class LlamaCpp:
    """llama.cpp with a GGUF file, asked for what is most probable."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp")
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.n_gpu_layers, options.verbosity = 512, 1, 0, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(options)

    def first(self, prompt: list[int]) -> dict[int, float]:
        """The most probable tokens behind `prompt`, with their log-probabilities; none where no character is whole."""
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "logprobs": 5, "cache_prompt": False}
        logprobs = self._server.handle_completions(asked)["choices"][0]["logprobs"]
        found = logprobs["content"][0]["top_logprobs"] if logprobs and logprobs["content"] else []
        return {each["id"]: each["logprob"] for each in found}

    def answer(self, prompt: list[int], most: int) -> str:
        """The text behind `prompt`, of `most` tokens at most."""
        asked = {"prompt": prompt, "n_predict": most, "temperature": 0, "cache_prompt": False}
        return self._server.handle_completions(asked)["choices"][0]["text"]

    def tokens_of(self, text: str) -> int:
        """How many tokens it makes of a text."""
        asked = {"prompt": text, "n_predict": 1}
        return self._server.handle_completions(asked)["usage"]["prompt_tokens"]


def with_rules(rules: str, folder: Path) -> Path:
    """The tokenizer, which parts a text by these rules first, as those of such models do."""
    pattern = {
        "qwen2": tokenization_qwen2.PRETOKENIZE_REGEX,
        "llama-bpe": inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default,
    }
    shutil.copytree(law_tokenizer(), folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, bytes_too = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rules in pattern:
        split = first.Split(tokenizers.Regex(pattern[rules]), "isolated")
        plain.pre_tokenizer = first.Sequence([split, first.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif rules == "smollm":
        plain.pre_tokenizer = first.Sequence([first.Digits(individual_digits=True), bytes_too])
    else:
        plain.pre_tokenizer = bytes_too
    about = json.loads(plain.to_str())
    about["model"]["ignore_merges"] = rules == "llama-bpe"
    (folder / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.mark.parametrize("rules", ["qwen2", "llama-bpe", "smollm", "gpt-2"])
def test_the_rules_by_which_a_text_is_parted_are_called_as_llama_cpp_does(rules, tmp_path):
    source = made("qwen2", tmp_path / "model", with_rules(rules, tmp_path / "tokenizer"))
    assert fields_of(written(source))["tokenizer.ggml.pre"] == rules


@pytest.mark.whole
@pytest.mark.parametrize("rules", ["qwen2", "llama-bpe", "smollm", "gpt-2"])
def test_llama_cpp_parts_a_text_as_the_tokenizer_does(rules, tmp_path):
    source = made("qwen2", tmp_path / "model", with_rules(rules, tmp_path / "tokenizer"))
    llama_cpp, tokenizer = LlamaCpp(written(source)), transformers.AutoTokenizer.from_pretrained(source)
    texts = ["根据《刑法》第3条，12345 days don't  matter.\n\n 什么？", "  2026年12月01日\tI'LL go!!", "標籤😀 ab12cd"]
    assert [llama_cpp.tokens_of(text) for text in texts] == [len(ids) for ids in tokenizer(texts)["input_ids"]]


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    source = made(name, tmp_path / name, TOKENIZERS / "qwen3_like" if name == "qwen3" else None)
    llama_cpp = LlamaCpp(written(source))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    compared = 0
    for seed in range(6):
        # Longer than what positions were scaled from.
        ids = torch.randint(3, 300, (1, 300), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected = model(ids).logits[0, -1].log_softmax(-1)
        for token, logprob in llama_cpp.first(ids[0].tolist()).items():
            assert logprob == pytest.approx(expected[token].item(), abs=0.03)
            compared += 1
    assert compared >= 10


@pytest.mark.whole
@pytest.mark.timeout(PATIENCE_S)
def test_a_real_chat_model_with_trained_adapters_answers_in_llama_cpp_as_it_does_here(launch: Launch, tmp_path: Path):
    base, data, run = smollm2(), tmp_path / "data", tmp_path / "run"
    records = ROOT / "tests/cases/records/i60_plain.jsonl"
    words = ("--source", records, "--tokenizer", base, "--output", data)
    assert launch(*words, module="data_prep.instructions").wait().status == 0
    recipe = (
        *("--optim.steps", 6, "--optim.warmup_steps", 1, "--optim.lr", 3e-3, "--lora.dropout", 0),
        *("--log.validate_every_steps", 6, "--batch.tokens_per_micro_batch", 256, "--batch.micro_batches_per_step", 1),
    )
    words = (ROOT / "configs/qlora/smollm2-cpu.yaml", "--base_model", base, "--data", data, "--run_dir", run, *recipe)
    assert launch(*words, module="training.qlora").wait().status == 0
    result = launch(run, "--output", tmp_path / "gguf", "--gguf", "f16", module="training.evaluation.export").wait()
    assert result.status == 0, result

    llama_cpp = LlamaCpp(tmp_path / "gguf/run-f16.gguf")
    opened = open_chat(run, "best", device=torch.device("cpu"), base_model=None, precision=None)
    end_id, same = opened.tokenizer.end_id, 0
    for question in QUESTIONS:
        (prompt,) = opened.tokenizer.encode([opened.tokenizer.prompt([user(question)])])
        ours: list[int] = []
        Speaker(opened.model, end_id, opened.precision).answer(prompt, 24, ours.append)
        theirs = llama_cpp.answer(prompt, 24)
        if text_of(opened, ours) == theirs:
            same += 1
            continue
        # As far as both say the same; then theirs goes on with a token that is nearly as probable here.
        place = next(n for n in range(len(ours), -1, -1) if theirs.startswith(text_of(opened, ours[:n])))
        with torch.inference_mode():
            logits = opened.model(input_ids=torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1]
        near = (logits >= logits.max() - 0.05).nonzero()[:, 0].tolist()
        behind = [text_of(opened, [*ours[:place], token]) for token in near if token not in ours[place : place + 1]]
        assert any(theirs.startswith(text) for text in behind), question
    assert len(QUESTIONS) == 20 and same >= 18


def text_of(opened: ChatModel, ids: list[int]) -> str:
    """Their text as far as its characters are whole."""
    return opened.tokenizer.decode(ids).rstrip("\ufffd")

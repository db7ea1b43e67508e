"""QLoRA keeps the engine's promises too, learns from the answers alone, and refuses what it would train wrongly on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from tests.support.base_models import make_tiny_qwen2
from tests.support.commands import ROOT, Launch
from tests.support.legal_records import law_base, law_data, law_tokenizer
from tests.support.lives import Life
from tests.support.runs import (
    assert_only_one_line_is_said,
    assert_same_model,
    command_of,
    last_checkpoint,
    losses,
    reference,
    status_of,
)
from training.base.console import UserError
from training.base.files import sha256_of
from training.data.conversations import ConversationPart, open_conversations
from training.data.prepared import PARTS, Ragged
from training.engine.checkpoint import model_state
from training.models.adapted_model import Head, LoraOptions, add_adapters, head_loss
from training.models.base_model import QuantisationOptions, fingerprint_of, load_base_model, repeat_heads_in_attention
from training.qlora import Answers, QLoRAConfig, build_model, losses_of

STEPS = 20
LIKE_ANOTHER = ("qwen2.5-3b-h100", "qwen2.5-7b-t4x2", "qwen2.5-14b-t4x2")  # qwen2.5-3b-t4x2, but for sizes and ranks
CPU = torch.device("cpu")
RUN = (
    *("--lora.rank", 4, "--lora.alpha", 8, "--lora.dropout", 0.2, "--memory.logits_tokens", 50),
    *("--batch.tokens_per_micro_batch", 400, "--batch.micro_batches_per_step", 4),
    *("--optim.steps", STEPS, "--optim.warmup_steps", 4, "--optim.lr", 1e-2, "--log.every_steps", 1),
    *("--log.validate_every_steps", 10, "--checkpoint.every_steps", 4),
)


@pytest.fixture
def tokenizer() -> Path:
    return law_tokenizer()


@pytest.fixture
def base() -> Path:
    return law_base()


@pytest.fixture
def data() -> Path:
    return law_data()


@pytest.fixture
def uninterrupted(data: Path, base: Path) -> Callable[[int], Path]:
    return lambda ranks: reference(data, "--base_model", base, *RUN, module="training.qlora", ranks=ranks)


def small_config(data: Path, base: Path, **more: object) -> QLoRAConfig:
    return QLoRAConfig.model_validate({"run_dir": "unused", "data": data, "base_model": str(base), **more})


# --- the engine's promises ------------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_curve_does_not_depend_on_the_number_of_ranks(uninterrupted, ranks):
    alone, together = losses(uninterrupted(1)), losses(uninterrupted(ranks))
    assert len(alone) == STEPS and np.mean(alone[-5:]) < np.mean(alone[:5])
    assert together == pytest.approx(alone, rel=1e-4)


def test_run_killed_twice_ends_with_the_same_adapters_optimizer_and_record(
    uninterrupted, launch: Launch, data: Path, base: Path, tmp_path: Path
):
    life = Life(launch, tmp_path, data, ranks=2, run=("--base_model", base, *RUN), module="training.qlora")
    for step in (7, 14):
        life.kill_at(step)
    life.finish(uninterrupted(2))


def test_run_with_eight_bit_optimizer_and_dora_resumes_exactly(launch: Launch, data: Path, base: Path, tmp_path: Path):
    # Adapters of 4,096 numbers and more are kept in 8 bits, smaller ones never.
    more = ("--optim.kind", "adamw8bit", "--lora.rank", 64, "--lora.dora", "true", "--lora.rslora", "true")
    more += ("--optim.steps", 10, "--optim.lr", 1e-3, "--checkpoint.background", "false")
    folders = [tmp_path / name for name in ("whole", "halves")]
    for folder in folders:
        folder.mkdir()
    run = ("--base_model", base, *RUN, *more)
    whole, halves = (Life(launch, folder, data, ranks=None, run=run, module="training.qlora") for folder in folders)
    assert whole.start().wait().status == 0
    halves.kill_at(7)
    assert halves.start().wait().status == 0
    assert_same_model(halves.run_dir, whole.run_dir)
    state = last_checkpoint(whole.run_dir).optimizer_state()
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()), "moments in 8 bits"


def test_checkpoint_holds_the_adapters_and_nothing_of_the_base_model(uninterrupted, base: Path):
    checkpoint = last_checkpoint(uninterrupted(2))
    weights = checkpoint.model_state()
    assert weights and all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in weights.items())
    assert not all(tensor.any() == 0 for name, tensor in weights.items() if "lora_B" in name), "they were trained"
    assert sum(tensor.nbytes for tensor in weights.values()) < (base / "model.safetensors").stat().st_size / 2
    assert checkpoint.manifest["built_on"]["base_model"] == fingerprint_of(base)
    assert {"peft", "bitsandbytes", "transformers"} <= set(checkpoint.manifest["versions"])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trains_in_mixed_precision_with_adapters_in_fp32(precision, launch: Launch, data, base, tmp_path: Path):
    command = command_of(tmp_path / "run", data, "--base_model", base, *RUN, "--optim.steps", 5)
    assert launch(*command, "--precision", precision, module="training.qlora").wait().status == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert {tensor.dtype for tensor in last_checkpoint(tmp_path / "run").model_state().values()} == {torch.float32}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path.name, marks=[pytest.mark.whole] * (path.stem in LIKE_ANOTHER))
        for path in sorted((ROOT / "configs/qlora").glob("*.yaml"))
    ],
)
def test_every_config_trains(config: str, launch: Launch, data: Path, base: Path, tmp_path: Path):
    words = ("--data", data, "--run_dir", tmp_path / "run", "--precision", "fp32", "--dry-run")
    words += ("--base_model", base, "--base_revision", "null", "--optim.warmup_steps", 1)  # the data is small
    result = launch(ROOT / "configs/qlora" / config, *words, module="training.qlora").wait()
    assert result.status == 0 and "dry run: loss" in result.out, result


def test_a_base_model_of_the_hub_is_named_with_its_commit(launch: Launch, data: Path, base: Path, tmp_path: Path):
    folder = tmp_path / "snapshots/0123456789abcdef0123456789abcdef01234567"
    folder.parent.mkdir()
    folder.symlink_to(base)
    command = command_of(tmp_path / "run", data, "--base_model", folder, *RUN, "--dry-run")
    result = launch(*command, module="training.qlora").wait()
    assert f"base model {folder} at {folder.name}\n" in result.out, result


# --- what is learned ------------------------------------------------------------------------------------------------


def test_supervised_are_the_answer_and_its_end_in_every_task(data: Path, base: Path):
    law = open_conversations(data)
    tokens = transformers.AutoTokenizer.from_pretrained(base)
    tasks = set()
    for name in PARTS:
        part = law.part(name)
        answers = Answers(part, law.meta["tokenizer"]["pad_id"])
        for samples in np.array_split(np.arange(len(part)), max(1, len(part) // 3)):
            inputs, scored, labels = answers.batch(samples)
            assert answers.answer_tokens[samples].sum() == len(labels)
            said = iter(tokens.decode(labels.tolist()).split("<|im_end|>"))
            for sample, row in zip(samples.tolist(), inputs, strict=True):
                answer = json.loads(part.messages[sample])[-1]["content"]
                assert next(said) == answer
                assert f"assistant\n{answer}" in tokens.decode(row.tolist())
                tasks.add(part.tasks[sample])
            assert next(said) == "" and next(said, None) is None
            # Each is predicted from the position before it: the next label is what stands there.
            follows = scored[1:] == scored[:-1] + 1
            assert torch.equal(labels[:-1][follows], inputs.flatten()[scored[1:]][follows])
    assert tasks == set(law.meta["tasks"])


def test_only_the_answer_and_its_end_are_learned_each_from_what_stands_before_it():
    rows, prompts, pad, end = [[5, 6, 7, 8, 9, 2], [5, 6, 7, 2], [5, 6, 7, 8, 9, 10, 11, 2]], [3, 3, 2], 0, 2
    ids = Ragged(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64))
    none = [""] * len(rows)
    answers = Answers(ConversationPart("train", ids, np.array(prompts), none, none, none), pad)
    inputs, scored, labels = answers.batch(np.arange(3))
    assert inputs.tolist() == [[5, 6, 7, 8, 9, 2, pad], [5, 6, 7, 2, pad, pad, pad], [5, 6, 7, 8, 9, 10, 11]]
    learned = [[8, 9, end], [end], [7, 8, 9, 10, 11, end]]
    assert labels.tolist() == [label for row in learned for label in row]
    assert scored.tolist() == [2, 3, 4, 9, 15, 16, 17, 18, 19, 20]
    assert answers.answer_tokens.tolist() == [len(row) for row in learned]


def test_adapters_are_in_fp32_whatever_the_base_model_is_in():
    """A gradient scaler refuses gradients in fp16, and small steps would be rounded away."""
    about = transformers.Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.Qwen2ForCausalLM(about).half()
    trained = [each for each in add_adapters(base, LoraOptions(rank=2)).parameters() if each.requires_grad]
    assert trained and {each.dtype for each in trained} == {torch.float32}


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_in_chunks_is_the_cross_entropy_of_all_logits_and_has_its_gradient(chunk):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16), torch.randint(50, (23,))
    upstream = torch.rand(23)
    found, right = head_loss(hidden, Head(torch.nn.Parameter(weight, requires_grad=False), chunk), labels)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(right, logits.argmax(-1) == labels)


def test_losses_are_those_of_the_library_on_each_conversation_alone(data: Path, base: Path):
    law = open_conversations(data)
    part = law.part("train")
    answers = Answers(part, law.meta["tokenizer"]["pad_id"])
    torch.manual_seed(3)
    model = build_model(small_config(data, base), base, torch.float32, CPU)
    with torch.no_grad():  # adapters that do something
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    samples = np.array([0, 5, 9, 17])
    found, _ = losses_of(model, answers, samples, CPU)
    alone = []
    for sample in samples:
        ids = torch.from_numpy(part.ids[int(sample)].astype(np.int64))[None]
        logits = model.model(input_ids=ids).logits[0, :-1]
        start = int(part.prompt_lengths[sample])
        alone.append(F.cross_entropy(logits[start - 1 :], ids[0, start:], reduction="none"))
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_training_and_validation_leave_every_bit_of_the_base_model_alone(data: Path, base: Path):
    """On some CPUs the library converts the weights of a model in evaluation mode in place."""
    law = open_conversations(data)
    answers = Answers(law.part("train"), 0)
    model = build_model(small_config(data, base), base, torch.float32, CPU)
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    assert any(each.dtype == torch.uint8 for each in frozen.values()), "the base model is in 4 bits"
    before, _ = losses_of(model.eval(), answers, np.arange(4), CPU)
    model.train()
    losses_of(model, answers, np.arange(4), CPU)[0].sum().backward()
    with torch.no_grad():
        after, _ = losses_of(model.eval(), answers, np.arange(4), CPU)
    assert torch.equal(before, after)
    assert all(torch.equal(frozen[name], each) for name, each in model.named_parameters() if name in frozen)
    assert {name for name, each in model.named_parameters() if each.grad is not None} == set(model_state(model))


def test_residual_stream_survives_numbers_that_fp16_cannot_hold(base: Path, tmp_path: Path):
    """As in models of the Qwen2.5 kind: one value of an embedding is large, and every layer adds to it."""
    large = shutil.copytree(base, tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 3] = 40_000.0
    weights["model.layers.0.self_attn.v_proj.bias"][:] = 1.0
    weights["model.layers.0.self_attn.o_proj.weight"][3] = 500.0  # a sum over 64 numbers that are about 1
    weights["model.norm.weight"][3] = 0.001
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    model = load_base_model(large, QuantisationOptions(kind="none"), torch.float16, CPU).eval()
    layers: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        logits = model(torch.arange(5, 25)[None]).logits
    assert max(float(each.abs().max()) for each in layers) > torch.finfo(torch.float16).max
    assert logits.dtype == torch.float16 and logits.isfinite().all()


def test_attention_with_repeated_heads_is_the_same_attention(base: Path, monkeypatch: pytest.MonkeyPatch):
    """On cards whose kernels cannot share heads; the library's own choice comes back after the test."""
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    asked: list[tuple[int, int, bool]] = []
    own = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *words: object, **options: object) -> torch.Tensor:
        asked.append((query.shape[1], key.shape[1], bool(options.get("enable_gqa"))))
        return own(query, key, *words, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = load_base_model(base, QuantisationOptions(kind="none"), torch.float32, CPU).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        shared = model(ids).logits
        repeat_heads_in_attention()
        repeated = model(ids).logits
    assert set(asked) == {(4, 2, True), (4, 4, False)}
    torch.testing.assert_close(repeated, shared)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(launch: Launch, data: Path, base: Path | str, *words: object, folder: Path) -> object:
    command = command_of(folder / "refused", data, "--base_model", base, *RUN, *words)
    result = launch(*command, module="training.qlora").wait()
    assert not (folder / "refused/checkpoints").exists()
    return result


def test_data_of_another_tokenizer_is_refused(launch: Launch, data: Path, base: Path, tmp_path: Path):
    other = shutil.copytree(base, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("You help.", "You do not."), encoding="utf-8")
    assert_only_one_line_is_said(
        refused(launch, data, other, folder=tmp_path), "another tokenizer or chat template", f"--tokenizer {other}"
    )


def test_model_with_a_smaller_vocabulary_is_refused(launch: Launch, data: Path, tokenizer: Path, tmp_path: Path):
    small = make_tiny_qwen2(tmp_path / "small", tokenizer, vocabulary_size=100)
    assert_only_one_line_is_said(refused(launch, data, small, folder=tmp_path), "knows 100", "prepare the data with")


def test_another_base_model_is_refused_on_resume_and_the_moved_one_is_not(
    uninterrupted, launch: Launch, data: Path, base: Path, tokenizer: Path, tmp_path: Path
):
    run_dir = uninterrupted(1)
    other = make_tiny_qwen2(tmp_path / "other", tokenizer, seed=1)
    result = launch(*command_of(run_dir, data, "--base_model", other, *RUN), module="training.qlora").wait()
    assert_only_one_line_is_said(result, "built_on.base_model", "nothing was changed")
    moved = shutil.copytree(base, tmp_path / "moved")
    result = launch(*command_of(run_dir, data, "--base_model", moved, *RUN), module="training.qlora").wait()
    assert result.status == 0 and "is finished" in result.out, result
    changed = command_of(run_dir, data, "--base_model", base, *RUN, "--lora.dropout", 0.3)
    result = launch(*changed, module="training.qlora").wait()
    assert_only_one_line_is_said(result, "another definition (lora.dropout: ", "nothing was changed")
    assert "memory: " not in result.out, "the base model was loaded first"


@pytest.mark.parametrize(
    "name, said",
    [
        ("./models/none", "there is no such folder"),
        ("Qwen/Qwen2.5-3B-Instruct", "hf download Qwen/Qwen2.5-3B-Instruct"),
    ],
)
def test_base_model_that_is_not_there_says_how_to_get_it(name, said, launch: Launch, data: Path, tmp_path: Path):
    command = command_of(tmp_path / "run", data, "--base_model", name, *RUN)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = launch(*command, module="training.qlora", environment=environment).wait()
    assert_only_one_line_is_said(result, name, said)


def test_base_model_with_missing_weights_is_refused(launch: Launch, data: Path, base: Path, tmp_path: Path):
    half = shutil.copytree(base, tmp_path / "half")
    (half / "model.safetensors").unlink()
    assert_only_one_line_is_said(refused(launch, data, half, folder=tmp_path), "model.safetensors is missing")


def test_encoder_decoder_and_quantised_models_are_refused(launch: Launch, data: Path, base: Path, tmp_path: Path):
    def changed(name: str, **values: object) -> Path:
        folder = shutil.copytree(base, tmp_path / name)
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**about, **values}), encoding="utf-8")
        return folder

    t5 = changed("t5", model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert_only_one_line_is_said(refused(launch, data, t5, folder=tmp_path), "no decoder-only language model")
    quantised = changed("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    assert_only_one_line_is_said(refused(launch, data, quantised, folder=tmp_path), "quantised already")


def test_model_without_layers_for_4_bits_is_refused_unless_none_is_asked_for(
    launch: Launch, data, base, tmp_path: Path
):
    gpt2 = shutil.copytree(base, tmp_path / "gpt2")
    about = transformers.GPT2Config(vocab_size=700, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    transformers.AutoModelForCausalLM.from_config(about).save_pretrained(gpt2)
    assert_only_one_line_is_said(refused(launch, data, gpt2, folder=tmp_path), "4 bits", "--quantisation.kind none")


def test_adapters_on_layers_that_do_not_exist_or_the_head_are_refused(base: Path):
    def adapted(*targets: str) -> torch.nn.Module:
        model = load_base_model(base, QuantisationOptions(), torch.float32, CPU)
        return add_adapters(model, LoraOptions(targets=targets))

    for wrong in ("q_prj", "lm_head"):
        with pytest.raises(UserError, match=f"lora.targets {wrong}.*q_proj"):
            adapted("v_proj", wrong)
    chosen = {name.split(".lora_")[0].rpartition(".")[2] for name in model_state(adapted("q_proj", "v_proj"))}
    assert chosen == {"q_proj", "v_proj"}


def test_moving_average_of_a_whole_base_model_is_refused(launch: Launch, data: Path, base: Path, tmp_path: Path):
    result = refused(launch, data, base, "--optim.ema_decay", 0.9, folder=tmp_path)
    assert_only_one_line_is_said(result, "optim.ema_decay", "second copy")


def test_conversation_longer_than_the_model_takes_is_refused(launch: Launch, data: Path, base: Path, tmp_path: Path):
    short = shutil.copytree(base, tmp_path / "short")
    about = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**about, "max_position_embeddings": 64}), encoding="utf-8")
    assert_only_one_line_is_said(refused(launch, data, short, folder=tmp_path), "takes 64", "--max_length")


def test_data_without_a_supervised_token_is_refused(data: Path):
    law = open_conversations(data)
    part = law.part("train")
    broken = type(part)(
        part.name, part.ids, part.ids.lengths.copy(), part.uids, part.tasks, part.messages
    )  # as a template gives it that marks no answer
    with pytest.raises(UserError, match="no supervised token"):
        Answers(broken, 0)


def test_status_of_a_finished_run_says_which_step_was_best(uninterrupted):
    status = status_of(uninterrupted(2))
    assert status["status"] == "finished" and status["best_step"] in (10, 20)


def test_fingerprint_tells_models_apart_and_not_places(base: Path, tokenizer: Path, tmp_path: Path):
    assert fingerprint_of(shutil.copytree(base, tmp_path / "copy")) == fingerprint_of(base)
    assert fingerprint_of(make_tiny_qwen2(tmp_path / "other", tokenizer, seed=1)) != fingerprint_of(base)
    assert sha256_of(base / "model.safetensors") == sha256_of(tmp_path / "copy/model.safetensors")

"""Chat models of every family: the losses of their own forward pass, and runs from the dry run to the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.support.base_models import make_model
from tests.support.commands import Launch
from tests.support.families import FAMILIES, chat_model, config_of, estimate_error, live_through, make_family
from training.base.console import UserError
from training.data.conversations import open_conversations
from training.models.adapted_model import AdaptedModel, Logits, LoraOptions, add_adapters
from training.models.base_model import QuantisationOptions, load_base_model, read_config

CPU = torch.device("cpu")
PLAIN = QuantisationOptions(kind="none")
ALWAYS, ALL = ("gemma2", "qwen3", "llama3"), ("phi3", "glm4", "granite")
LIVED = [*ALWAYS, *(pytest.param(name, marks=pytest.mark.whole) for name in ALL)]
LENGTHS = (40, 23, 12)  # two of them longer than the windows
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}  # some families have their own


def adapted(folder: Path, **lora: object) -> AdaptedModel:
    """The model in `folder` with adapters that change what it says."""
    torch.manual_seed(1)
    model = add_adapters(load_base_model(folder, PLAIN, torch.float32, CPU), LoraOptions(rank=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return AdaptedModel(model, logits_tokens=20, checkpoint_layers=True)


def batch() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Rows of several lengths; the same padded on the right; what is scored of them, each with its label."""
    torch.manual_seed(2)
    rows = [torch.randint(3, 600, (length,)) for length in LENGTHS]
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, :-1]
    places = [width * inputs.shape[1] + torch.arange(len(row) - 1) for width, row in enumerate(rows)]
    return rows, inputs, torch.cat(places), torch.cat([row[1:] for row in rows])


def gradients(model: nn.Module, losses: Tensor) -> list[Tensor]:
    trained = [each for each in model.parameters() if each.requires_grad]
    return list(torch.autograd.grad((losses * torch.linspace(0.5, 1.5, len(losses))).sum(), trained))


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_of_a_padded_batch_are_those_of_the_stock_forward(name: str, tmp_path: Path) -> None:
    model = adapted(make_family(name, tmp_path / "model", **NO_DROPOUT))
    model.check()
    rows, inputs, scored, labels = batch()
    losses, right = model(inputs, scored, labels)
    stock = torch.cat([model.model(input_ids=row[None, :-1]).logits[0] for row in rows])  # each of them alone
    expected = F.cross_entropy(stock, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert torch.equal(right, stock.argmax(-1) == labels)
    for found, wanted in zip(gradients(model, losses), gradients(model, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("command-r", {"logit_scale": 1.0}),
    ],
    ids=str,
)
def test_what_is_special_in_a_family_is_heard_in_these_models(name: str, without: dict, tmp_path: Path) -> None:
    """Else a model that left it out would have the same losses."""
    ids = batch()[0][0][None]
    folder = make_family(name, tmp_path / "model", scale=16.0)
    auto = transformers.AutoModelForCausalLM
    with torch.no_grad():
        as_it_is = auto.from_pretrained(folder)(ids).logits
        left_out = auto.from_pretrained(folder, config=config_of(name, **without))(ids).logits
    assert float((as_it_is - left_out).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "granite", "command-r", "command-r7b"])
def test_logits_are_never_made_otherwise_than_the_model_makes_them(name: str, tmp_path: Path, monkeypatch) -> None:
    """As of a family that comes later: `check` refuses what `Logits` does not know."""
    model = adapted(make_family(name, tmp_path / "model", scale=16.0))
    monkeypatch.setattr(model.head, "logits", Logits())
    with pytest.raises(UserError, match=r"something with its logits .*choose another base model"):
        model.check()


@pytest.mark.parametrize("name", LIVED)
def test_run_of_a_family_is_killed_ends_bit_equal_and_is_exported(name: str, launch: Launch, tmp_path: Path) -> None:
    live_through(name, launch, tmp_path)


@pytest.mark.whole
def test_run_on_a_base_model_in_bf16_is_killed_ends_bit_equal_and_is_exported(launch: Launch, tmp_path: Path) -> None:
    live_through("qwen2.5", launch, tmp_path, "--quantisation.kind", "none", "--precision", "bf16")


@pytest.mark.parametrize("name", LIVED)
def test_estimate_of_a_family_is_what_a_step_takes(name: str, tmp_path: Path) -> None:
    assert abs(estimate_error(name, tmp_path)) < 0.1


def test_an_answer_that_only_the_next_turn_ends_is_learned_with_the_token_that_begins_it() -> None:
    data = open_conversations(chat_model("glm4") / "data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(data.folder / "tokenizer")
    part = data.part("train")
    ids, prompt = part.ids[0], int(part.prompt_lengths[0])
    text = tokenizer.decode(ids)
    assert text.startswith("[gMASK]<sop><|user|>\n") and text.endswith("<|user|>")
    assert tokenizer.decode(ids[:prompt]).endswith("<|assistant|>\n")
    assert np.count_nonzero(ids == tokenizer.convert_tokens_to_ids("<|user|>")) == 2


# --- what is refused ------------------------------------------------------------------------------------------------


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    small = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.Qwen3MoeConfig(**small, **experts, head_dim=16).save_pretrained(tmp_path)
    for kind in ("nf4", "none"):
        with pytest.raises(UserError, match=r"mixture of experts.*Choose a dense model"):
            read_config(tmp_path, QuantisationOptions(kind=kind))


def test_model_that_reads_pictures_is_refused(tmp_path: Path) -> None:
    transformers.Gemma3Config(text_config=config_of("gemma3").to_dict()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"reads more than text.*for text alone"):
        read_config(tmp_path, PLAIN)


def test_model_for_which_peft_has_no_adapters_is_refused_with_its_reason(tmp_path: Path) -> None:
    base = load_base_model(make_model(tmp_path, {"vocab_size": 600, "hidden_size": 64}), PLAIN, torch.float32, CPU)
    base.config.model_type = "falcon_h1"
    base.set_submodule("model.layers.0.mlp.out_proj", nn.Linear(8, 8))
    with pytest.raises(UserError, match=r"no such adapters for a falcon_h1 model: .*out_proj"):
        add_adapters(base, LoraOptions())

"""A frozen language model with LoRA adapters, asked for nothing but the loss of the answers.

The vocabulary makes the logits by far the widest tensor: 151,936 numbers a token, and as many for their gradient. So
they are computed only for supervised tokens, a chunk at a time, and their gradient is taken at once: no logits outlive
their chunk.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.base.console import UserError
from training.base.files import read_json
from training.base.options import Options
from training.models.base_model import read_weights_again

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_ADAPTER_CONFIG = "adapter_config.json"

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value), "names"
]


class LoraOptions(Options):
    """Low-rank adapters (Hu et al. 2022), in fp32 whatever the base model is in."""

    rank: int = Field(16, ge=1, description="rank of the update of each adapted matrix")
    alpha: float = Field(32, gt=0, description="the update is multiplied by alpha / rank (rslora: / square root)")
    dropout: float = Field(0.05, ge=0, lt=1, description="on the input of the adapters")
    targets: Literal["all-linear"] | Names = Field(
        "all-linear", description="layers that get one: all but the head, or names (q_proj,v_proj)"
    )
    rslora: bool = Field(False, description="scale by alpha / square root of rank (Kalajdzievski 2023)")
    dora: bool = Field(False, description="learn each column's magnitude apart (Liu et al. 2024); slower")


def lora_config(options: LoraOptions) -> LoraConfig:
    """The same in peft's words."""
    import peft

    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.rslora,
        use_dora=options.dora,
    )


def add_adapters(base: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """`base` with new adapters, which change nothing yet; their random half follows from torch's seed.

    Raises UserError when a target is no layer of the model, or its head, and where peft adapts no such model.
    """
    import peft

    head = next((name for name, module in base.named_modules() if module is base.get_output_embeddings()), None)
    # A layer in 4 bits is an nn.Linear, too.
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    wanted = () if isinstance(options.targets, str) else options.targets
    unknown = [name for name in wanted if name not in names or name == head]
    if unknown:
        raise UserError(
            f"lora.targets {','.join(unknown)}: this model's layers are {', '.join(sorted(names - {head}))}; or take "
            "all-linear"
        )
    # peft still asks for it under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        return peft.get_peft_model(base, lora_config(options))
    except ValueError as error:
        raise UserError(f"peft has no such adapters for a {base.config.model_type} model: {error}") from None


def read_adapters(folder: Path, model: PeftModel) -> dict[str, Tensor] | None:
    """The adapters of a folder in peft's format, by their names in an `AdaptedModel`; None where there are none.

    model: for which they are meant; what is in them, and in which layers, is not looked at. Raises UserError where they
    would do something else in it.
    """
    if not (folder / _ADAPTER_CONFIG).is_file():
        return None
    own = model.peft_config["default"]
    try:
        found = read_json(folder / _ADAPTER_CONFIG)
        values = {name: found.get(name, False) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
        values |= {name: found.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        initial = str(found.get("init_lora_weights", True))
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{folder / _ADAPTER_CONFIG} cannot be read: name another folder") from None
    differing = [
        f"{name} {value}, not {getattr(own, name)}" for name, value in values.items() if value != getattr(own, name)
    ]
    if initial.partition("_")[0] in ("pissa", "olora", "corda", "loftq"):  # these have changed the base model, too
        differing.append(f"init_lora_weights {initial}")
    if differing:
        raise UserError(
            f"--init_from: the adapters in {folder} have {'; '.join(differing)}: set lora.* to what they have"
        )
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} has no adapter_model.safetensors that can be read ({error})") from None
    # peft leaves out which adapter it is.
    names = {name: f"model.{name.removesuffix('.weight')}.default.weight" for name in tensors}
    return {names[name]: tensor.float() for name, tensor in tensors.items()}


def spread_by_layer(model: PeftModel) -> None:
    """Prepares a model with adapters for ZeRO 3, before it is spread."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    read_weights_again(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # As by DeepSpeed's `set_z3_leaf_module`, a layer's weight is gathered with its adapters. One by one
            # it fails: peft looks at an adapter's weight before its turn. DeepSpeed takes that for a new use, and in a
            # resumed run for another one than in a run that was not interrupted.
            module._z3_leaf = True


class AdaptedModel(nn.Module):
    """The training's view of a language model with adapters."""

    def __init__(self, model: PeftModel, *, logits_tokens: int, checkpoint_layers: bool):
        """logits_tokens: of a chunk. checkpoint_layers: compute every layer a second time in the backward pass instead
        of keeping what it computed, for about a third more time.
        """
        super().__init__()
        self.model = model
        base = model.get_base_model()
        base.config.use_cache = False
        if checkpoint_layers:
            base.activation_checkpointing_enable({"use_reentrant": False})  # the reentrant kind breaks under DDP
        # In a tuple, so that it is not registered a second time: it is part of `model` already.
        self._body: tuple[nn.Module] = (getattr(base, base.base_model_prefix),)
        self.head = Head(base.get_output_embeddings().weight, logits_tokens, Logits.of(base.config))
        self.train()  # the library hands models over in evaluation mode, where no layer is checkpointed

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the head reads at every position, [B, T, width]; inputs [B, T], padded on the right.

        No mask is needed: attention looks back only, and what is computed at padding is never asked for.
        """
        return self._body[0](input_ids=inputs, use_cache=False).last_hidden_state

    def forward(self, inputs: Tensor, scored: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [B, T]; scored [N]: which of the B*T positions predict a supervised token; labels [N]: those tokens.

        Returns the cross-entropy (nats) [N] of each, with gradient, and whether it would have been predicted, bool [N].
        """
        return head_loss(self.hidden(inputs).flatten(0, 1)[scored], self.head, labels)

    @torch.no_grad()
    def check(self) -> None:
        """Raises UserError unless the losses are the model's own: some models do more than multiply by the head."""
        base, training = self.model.get_base_model(), self.training
        self.eval()
        device = base.get_input_embeddings().weight.device
        ids = torch.arange(1, 9, device=device)[None] % base.config.get_text_config().vocab_size
        dtype = self.head.weight.dtype
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):  # as in the training
            logits = base(input_ids=ids[:, :-1], use_cache=False).logits.float()
            found, _ = self(ids[:, :-1], torch.arange(7, device=device), ids[0, 1:])
        expected = nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        self.train(training)
        if not expected.isfinite().all():
            raise UserError(
                f"the base model's own numbers are not finite in {str(dtype).removeprefix('torch.')}: its layers go "
                "beyond what that holds, or its weights are damaged; try --precision fp32, or a card with bf16"
            )
        # 16 bits have three digits. In fp32 the order of sums is all that differs.
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            raise UserError(
                f"a {base.config.model_type} model does something with its logits that is not known here "
                f"(`Logits` in training/models/adapted_model.py): choose another base model"
            )


@dataclass(frozen=True)
class Logits:
    """What a model makes of hidden @ head.weight.T: cap * tanh(scale * that / cap), without a cap scale * that."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Logits:
        """As the config of a model says it, of whatever family. `AdaptedModel.check` compares it with the model."""
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
        return cls(scale, getattr(text, "final_logit_softcapping", None))  # Gemma 2

    def apply_(self, products: Tensor, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        """The logits of products [N, vocabulary], in place; if asked, and not the scale alone, their derivatives by
        scale * products, likewise."""
        if self.scale != 1:
            products.mul_(self.scale)
        if self.cap is None:
            return products, None
        products.div_(self.cap).tanh_()
        slopes = products.square().neg_().add_(1) if with_slopes else None
        return products.mul_(self.cap), slopes


class Head(nn.Module):
    """The frozen head, asked for losses: see `head_loss`.

    A module of its own, though its weight is the model's, because ZeRO 3 gathers weights where a module begins. It also
    finds the gradient, outside of autograd, so that the backward pass needs no weight.
    """

    def __init__(self, weight: nn.Parameter, chunk: int, logits: Logits = Logits()):
        """weight [vocabulary, width]. chunk: rows of logits that exist at a time. logits: what they are made by."""
        super().__init__()
        self.weight, self.chunk, self.logits = weight, chunk, logits

    def forward(self, hidden: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden [N, width]. Returns losses [N], `right` [N], and each loss's gradient by its row of `hidden`, fp32."""
        return _losses_and_gradient(hidden, self.weight, self.logits, labels, self.chunk, with_gradient)


@torch.no_grad()
def _losses_and_gradient(
    hidden: Tensor, weight: Tensor, kind: Logits, labels: Tensor, chunk: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    losses = torch.empty(len(labels), device=hidden.device)
    right = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
    gradient = torch.empty_like(hidden, dtype=torch.float32) if with_gradient else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            own = labels[rows, None]
            products = (hidden[rows].to(weight.dtype) @ weight.T).float()
            logits, slopes = kind.apply_(products, with_gradient)
            largest, best = logits.max(-1, keepdim=True)
            right[rows] = (best == own)[:, 0]
            of_label = logits.gather(-1, own) - largest
            # In place: the logits are not needed again, and there is no room for them twice.
            shares = logits.sub_(largest).exp_()
            total = shares.sum(-1, keepdim=True)
            losses[rows] = (total.log() - of_label)[:, 0]
            if gradient is not None:
                own_row = weight[own[:, 0]].float()
                if slopes is not None:
                    own_row.mul_(slopes.gather(-1, own))
                    shares.mul_(slopes)
                mean_row = (shares.to(weight.dtype) @ weight).float() / total  # divided here, where it is narrow
                gradient[rows] = (mean_row - own_row).mul_(kind.scale)
    return losses, right, gradient


class _WithGradient(torch.autograd.Function):
    """`losses` [N], whose gradient by the rows of `hidden` [N, width] is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.hidden_type = hidden.dtype
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(ctx.hidden_type), None, None


def head_loss(hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) [N] of `labels` [N] under the head's logits for hidden [N, width], and whether each label
    has the largest of them, bool [N].

    At most `head.chunk` rows of logits exist at a time. The gradient is computed with them, since it needs nothing that
    comes later: softmax minus one-hot, through the head.
    """
    losses, right, gradient = head(hidden.detach(), labels, hidden.requires_grad)
    return losses if gradient is None else _WithGradient.apply(hidden, losses, gradient), right

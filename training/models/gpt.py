"""A decoder-only transformer (GPT) that is trained from scratch.

Pre-norm blocks, exact GELU, tied input and output embeddings; learned or rotary positions, LayerNorm or RMSNorm.

A sequence is a prompt, `<sos> source <sep>`, and a target, padded on the right only. Every token sees those before it,
so no real position ever sees padding and training needs no mask. Decoding writes new tokens over a prompt's padding
(see `Cache`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from training.base.options import Options
from training.data.tokenizers import SEP, SOS, SPECIALS, Tokenizer
from training.models.dropout import Dropout
from training.models.stacked_linear import StackedLinear


class GPTOptions(Options):
    """Shape of the model; the vocabulary comes from the prepared data."""

    layers: int = Field(4, ge=1, description="number of transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads per block; must divide width")
    width: int = Field(128, ge=1, description="width of the residual stream")
    context: int = Field(
        128, ge=4, description="longest sequence in tokens; longer training pairs are left out, counted"
    )
    positions: Literal["learned", "rotary"] = Field("rotary", description="how positions enter the model")
    norm: Literal["layer", "rms"] = Field("layer", description="LayerNorm or RMSNorm")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on embeddings and on each block's two outputs")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTOptions:
        if self.width % self.heads:
            raise ValueError(f"model.heads ({self.heads}) must divide model.width ({self.width})")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(f"rotary positions need an even width per head, got {self.width // self.heads}")
        return self


@dataclass(frozen=True)
class Vocabularies:
    """The ids that a GPT reads: the target's keep their numbers, and a source vocabulary of its own follows behind.

    Special tokens are there once. Only the target's are written.
    """

    target: int  # how many
    source: int | None = None  # None: the source has the target's

    @classmethod
    def of(cls, source: Tokenizer, target: Tokenizer) -> Vocabularies:
        """Those of a prepared data set or a run."""
        joint = source.sha256 == target.sha256
        return cls(target.vocabulary_size, None if joint else source.vocabulary_size)

    @property
    def total(self) -> int:
        """Rows of the embedding."""
        return self.target if self.source is None else self.target + self.source - len(SPECIALS)

    def prompt(self, source: Sequence[int] | np.ndarray) -> np.ndarray:
        """`<sos> source <sep>` of the ids of a source [S], as the model reads it: [S + 2]."""
        ids = np.array([SOS, *source, SEP])
        return ids if self.source is None else ids + (self.target - len(SPECIALS)) * (ids >= len(SPECIALS))


@dataclass
class Cache:
    """Keys and values of the positions seen so far, for decoding token by token.

    Rows may differ in length: the next token of a row goes to slot `lengths[row]`, over whatever padding its prompt
    left there, so slot and position are the same number and the slots in front are all real.
    """

    keys: list[Tensor]  # of each layer: [B, heads, capacity, width / heads]
    values: list[Tensor]  # the same
    lengths: Tensor  # real positions of each row, [B]

    def select(self, rows: Tensor) -> Cache:
        """The cache of `rows` (indices [B'] or mask [B]): to drop finished sentences, or to reorder beams."""
        keys, values = ([each[rows] for each in layers] for layers in (self.keys, self.values))
        return Cache(keys, values, self.lengths[rows])


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention, each [B, heads, T, D], through PyTorch's fused kernel.

    bf16 on a CPU is computed in fp32: the kernel's backward pass takes seven times as long in bf16 there, a third of a
    whole step.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, options: GPTOptions):
        super().__init__()
        self.heads = options.heads
        self.query_key_value = StackedLinear(options.width, options.width, 3)
        self.output = nn.Linear(options.width, options.width)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, width] -> query, key, value, each [B, heads, T, width / heads]; query and key are rotated."""
        width = x.shape[-1]
        projected = self.query_key_value(x)
        if rotation is None:
            parts = projected.chunk(3, dim=-1)
        else:
            query_key, value = projected.split([2 * width, width], dim=-1)
            parts = *rotate(query_key, rotation, width // self.heads).chunk(2, dim=-1), value
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = self.project(x, rotation)
        return self.merge(attend(query, key, value))

    def merge(self, per_head: Tensor) -> Tensor:
        """[B, heads, T, width / heads] -> [B, T, width], mixed by the output projection."""
        return self.output(per_head.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a feed-forward layer four times as wide."""

    def __init__(self, options: GPTOptions):
        super().__init__()
        norm = nn.LayerNorm if options.norm == "layer" else nn.RMSNorm
        self.attention_norm = norm(options.width)
        self.attention = SelfAttention(options)
        self.feed_forward_norm = norm(options.width)
        self.expand = nn.Linear(options.width, 4 * options.width)
        self.contract = nn.Linear(4 * options.width, options.width)
        self.dropout = Dropout(options.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        return x + self.dropout(self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))


class GPT(nn.Module):
    """See the module's docstring. `forward` is for training; `prefill` and `extend` decode with a cache."""

    rotations: Tensor  # with rotary positions only: see `rotary_table`

    def __init__(self, options: GPTOptions, vocabularies: Vocabularies):
        super().__init__()
        self.options = options
        self.vocabularies = vocabularies
        self.embedding = nn.Embedding(vocabularies.total, options.width)
        learned = options.positions == "learned"
        self.position_embedding = nn.Embedding(options.context, options.width) if learned else None
        self.dropout = Dropout(options.dropout)
        blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.blocks: Iterable[Block] = blocks  # type: ignore[assignment]  # a ModuleList does not say of what
        self.final_norm = (nn.LayerNorm if options.norm == "layer" else nn.RMSNorm)(options.width)
        if not learned:
            table = rotary_table(options.context, options.width // options.heads)
            per_head = table.tile(2 * options.heads)  # for every head of query and key
            self.register_buffer("rotations", per_head, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: normal 0.02, and the outputs into the residual stream scaled by its depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.attention.output, block.contract):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * self.options.layers))

    def forward(self, tokens: Tensor, scored: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, target vocabulary].

        With `scored` [N], indices into the B*T positions, only those logits are computed: [N, target vocabulary]. The
        output layer is the widest of the model, so positions without a loss are left out of it.
        """
        x, rotation = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, rotation)
        if scored is not None:
            x = x.flatten(0, 1)[scored]
        return self._logits(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embeddings [B, T, width] of the tokens [B, T] at `positions` ([T] or [B, T]), and the rotation of these."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            return self.dropout(x + self.position_embedding(positions)), None
        cosine, sine = self.rotations[:, positions]
        return self.dropout(x), (cosine, sine)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.final_norm(x), self.embedding.weight[: self.vocabularies.target])

    def prefill(self, prompts: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Cache]:
        """Reads prompts [B, S], padded on the right, of `lengths` [B] real tokens.

        Returns the logits behind each prompt's last real token [B, vocabulary], and a cache with room for `capacity`
        positions per row (at most the model's context).
        """
        batch, width = prompts.shape
        x, rotation = self._embed(prompts, torch.arange(width, device=prompts.device))
        keys, values = [], []
        for block in self.blocks:
            query, key, value = block.attention.project(block.attention_norm(x), rotation)
            x = x + block.attention.merge(attend(query, key, value))
            x = x + block.feed_forward(x)
            keys.append(_with_room(key, capacity))
            values.append(_with_room(value, capacity))
        last = x[torch.arange(batch, device=x.device), lengths - 1]
        return self._logits(last), Cache(keys, values, lengths.clone())

    def extend(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Appends one token per row, tokens [B], to the cache in place; returns the logits behind it [B, vocab]."""
        slots = cache.lengths
        rows = torch.arange(len(tokens), device=tokens.device)
        x, rotation = self._embed(tokens[:, None], slots[:, None])
        shortest, longest = (int(length) for length in slots.aminmax())
        filled = longest + 1
        visible = None  # rows of one length see every slot: attention without a mask is quicker
        if shortest < longest:
            visible = (torch.arange(filled, device=tokens.device) <= slots[:, None])[:, None, None]
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            query, key, value = block.attention.project(block.attention_norm(x), rotation)
            keys[rows, :, slots] = key[:, :, 0]
            values[rows, :, slots] = value[:, :, 0]
            attended = F.scaled_dot_product_attention(
                query, keys[:, :, :filled], values[:, :, :filled], attn_mask=visible
            )
            x = x + block.attention.merge(attended)
            x = x + block.feed_forward(x)
        cache.lengths = slots + 1
        return self._logits(x[:, 0])

    def attention_maps(self, tokens: Tensor) -> list[Tensor]:
        """Attention weights of one sequence, tokens [T]: [heads, T, T] per layer. Row t sums to 1 over what it sees."""
        positions = torch.arange(len(tokens), device=tokens.device)
        x, rotation = self._embed(tokens[None], positions)
        hidden = positions > positions[:, None]
        maps = []
        for block in self.blocks:
            query, key, value = block.attention.project(block.attention_norm(x), rotation)
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            maps.append(weights[0])
            x = x + block.attention.merge(weights @ value)
            x = x + block.feed_forward(x)
        return maps

    def flops_per_token(self, length: float, scored: float) -> float:
        """Floating-point operations of a forward and backward pass per real token, padding not counted.

        length: tokens of a sequence, of which so many are `scored`. 6 per weight of the blocks, 6 per weight of
        the output layer on the share of positions that are scored, and the two products of attention over what is seen,
        half of the positions. Look-ups cost none.
        """
        options = self.options
        blocks = 12 * options.layers * options.width**2
        output = self.vocabularies.target * options.width * scored / length
        attention = 2 * options.layers * options.width * length  # a product takes 2, backward twice as many as forward
        return 6 * (blocks + output) + 3 * attention


def rotary_table(context: int, width: int) -> Tensor:
    """What `rotate` multiplies with (Su et al. 2021, RoFormer, eq. 34; base 10,000): [2, context, width]."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Rotates the pairs (i, i + width / 2) in each `width` features of x [B, T, n * width] by their position's angle.

    All heads of query and key at once, over long rows: several times as fast on a CPU as one head after another.
    """
    cosine, sine = (factor.to(x.dtype) for factor in rotation)
    halves_swapped = x.unflatten(-1, (-1, 2, width // 2)).flip(-2).flatten(-3)
    return torch.addcmul(x * cosine, halves_swapped, sine)


def _with_room(x: Tensor, capacity: int) -> Tensor:
    """[B, heads, S, D] -> [B, heads, capacity, D], the new slots zero."""
    room = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
    room[:, :, : x.shape[2]] = x
    return room

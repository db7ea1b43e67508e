"""A GRU encoder-decoder with additive attention (Bahdanau et al. 2015), trained from scratch.

The encoder reads a sentence in one or both directions; padding never enters its state. Each step of the decoder looks
at the encoder's outputs from its state so far, and what it sees is an input of the step, as in the paper. Only the
decoder's lowest layer has to go step by step; the layers above it run over the whole sentence at once (the attention of
GNMT, Wu et al. 2016, section 3.1). With `attention: none`, every step sees the encoder's last state instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from training.base.options import Options
from training.models.dropout import Dropout
from training.models.stacked_linear import StackedLinear


class AttentionGRUOptions(Options):
    """Shape of the model; the vocabularies come from the prepared data."""

    layers: int = Field(1, ge=1, description="GRU layers of the encoder, and of the decoder")
    embedding_width: int = Field(256, ge=1, description="width of word embeddings, and of the output layer's input")
    hidden_width: int = Field(256, ge=1, description="width of the GRU states, of each direction, and of the attention")
    bidirectional: bool = Field(True, description="whether the encoder also reads from the end")
    attention: Literal["additive", "none"] = Field("additive", description="none: the encoder's last state all along")
    tied_output: bool = Field(True, description="the output layer's weights are the target embedding")
    max_length: int = Field(
        80, ge=1, description="longest sentence in tokens, either side; longer training pairs are left out, counted"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on embeddings, between layers and before the output")


def additive_attention(query: Tensor, keys: Tensor, score: Tensor, padding: Tensor | None) -> Tensor:
    """Weights of additive attention (Bahdanau et al. 2015, appendix A.1.2): [B, S], summing to 1 over real positions.

    query [B, A] and keys [B, S, A] are projected already; score [A] weighs the features of their sum; padding [B, S] is
    true where there is none to see, None where there is no padding.
    """
    scores = torch.tanh(query[:, None] + keys) @ score
    if padding is not None:
        scores = scores.masked_fill(padding, -torch.inf)
    return scores.softmax(-1)


@dataclass
class EncodedSource:
    """What the encoder made of B sentences of up to S tokens."""

    values: Tensor  # its outputs [B, S, C]
    keys: Tensor | None  # the same, projected for the attention [B, S, A]; None without attention
    padding: Tensor | None  # [B, S], true where there is no token; None when all are equally long
    summary: Tensor  # the last state of each direction [B, C]

    def select(self, rows: Tensor) -> EncodedSource:
        """The same of `rows`, indices [B'] or mask [B]."""
        keys = None if self.keys is None else self.keys[rows]
        padding = None if self.padding is None else self.padding[rows]
        return EncodedSource(self.values[rows], keys, padding, self.summary[rows])


@dataclass
class State:
    """A decoder between two tokens."""

    hidden: list[Tensor]  # of each layer, lowest first: [B, H]
    encoded: EncodedSource

    def select(self, rows: Tensor) -> State:
        """The state of `rows` (indices [B'] or mask [B]): to drop finished sentences, or to reorder beams."""
        return State([hidden[rows] for hidden in self.hidden], self.encoded.select(rows))


class GRU(nn.GRU):
    """`nn.GRU`, in fp32 where autocast says bf16: on a GPU that would make it fp16, without the loss scaling for it.

    (cuDNN's recurrent layers know no other type under autocast; seen with torch 2.11.)
    """

    weight_ih_l0: Tensor

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        device = self.weight_ih_l0.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            with torch.autocast(device, enabled=False):
                return super().forward(input.float(), hx.float() if hx is not None else None)
        return super().forward(input, hx)


class Encoder(nn.Module):
    """Embeddings and a stack of GRUs over a sentence; see `forward`."""

    def __init__(self, options: AttentionGRUOptions, vocabulary_size: int):
        super().__init__()
        directions = 2 if options.bidirectional else 1
        self.width = directions * options.hidden_width
        self.embedding = nn.Embedding(vocabulary_size, options.embedding_width)
        # One module per layer: on GPUs, dropout between the layers of one nn.GRU has a random state of its own that no
        # seed resets, so a resumed run would differ.
        widths = [options.embedding_width] + (options.layers - 1) * [self.width]
        self.layers = nn.ModuleList(
            GRU(width, options.hidden_width, batch_first=True, bidirectional=options.bidirectional) for width in widths
        )
        self.dropout = Dropout(options.dropout)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """source [B, S], padded on the right; lengths [B], on the CPU.

        Returns the outputs [B, S, C], zero at padding, and the last state of each direction, side by side [B, C].
        """
        x = self.embedding(source)
        padded = int(lengths.min()) < source.shape[1]
        for layer in self.layers:
            x = self.dropout(x)
            if padded:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                packed, last = layer(packed)
                x, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
            else:
                x, last = layer(x)
        return x, last.transpose(0, 1).flatten(1)


class ContextGRU(nn.Module):
    """A GRU cell whose input is a word and what the attention saw from the state before (Cho et al. 2014, eq. 5-8).

    The words' part of the gates needs no state: it is computed for a whole sentence at once, by `from_word`.
    """

    def __init__(self, word_width: int, context_width: int, hidden_width: int):
        super().__init__()
        self.from_word = StackedLinear(word_width, hidden_width, 3)
        self.from_context = StackedLinear(context_width, hidden_width, 3, bias=False)
        self.from_state = StackedLinear(hidden_width, hidden_width, 3)

    def forward(self, word_gates: Tensor, context_gates: Tensor, state: Tensor) -> Tensor:
        """word_gates, context_gates [B, 3H]: `from_word` and `from_context` of the input; state [B, H] -> [B, H]."""
        width = state.shape[1]
        from_input, from_state = word_gates + context_gates, self.from_state(state)
        reset, update = (from_input[:, : 2 * width] + from_state[:, : 2 * width]).sigmoid().chunk(2, dim=1)
        proposal = torch.tanh(torch.addcmul(from_input[:, 2 * width :], reset, from_state[:, 2 * width :]))
        return torch.lerp(proposal, state, update)


class AttentionGRU(nn.Module):
    """See the module's docstring. `forward` is for training; `begin` and `extend` decode token by token."""

    def __init__(self, options: AttentionGRUOptions, source_vocabulary_size: int, target_vocabulary_size: int):
        super().__init__()
        self.options = options
        hidden, words = options.hidden_width, options.embedding_width
        self.encoder = Encoder(options, source_vocabulary_size)
        context = self.encoder.width
        self.embedding = nn.Embedding(target_vocabulary_size, words)
        self.first_state = nn.Linear(context, options.layers * hidden)
        if options.attention == "additive":
            self.query = nn.Linear(hidden, hidden)
            self.key = nn.Linear(context, hidden, bias=False)
            self.score = nn.Parameter(torch.empty(hidden))
        self.lowest = ContextGRU(words, context, hidden)
        self.upper = nn.ModuleList(GRU(hidden + context, hidden, batch_first=True) for _ in range(options.layers - 1))
        self.readout = nn.Linear(hidden + context + words, words)
        self.output_weight = None if options.tied_output else nn.Parameter(torch.empty(target_vocabulary_size, words))
        self.output_bias = nn.Parameter(torch.empty(target_vocabulary_size))
        self.dropout = Dropout(options.dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Glorot's uniform for matrices, orthogonal maps from state to state, small embeddings, zero biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
            elif "embedding" in name or name == "output_weight":
                nn.init.normal_(parameter, std=0.1)
            else:
                gates = 3 if parameter.shape[0] == 3 * self.options.hidden_width else 1
                recurrent = "weight_hh" in name or "from_state" in name
                for gate in parameter.data.chunk(gates):  # each gate is a map of its own
                    (nn.init.orthogonal_ if recurrent else nn.init.xavier_uniform_)(gate)
        if self.options.attention == "additive":
            nn.init.normal_(self.score, std=self.options.hidden_width**-0.5)

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        inputs: Tensor,
        scored: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """source [B, S] and inputs [B, T], padded on the right, source_lengths [B] on the CPU -> logits [B, T, V].

        With `scored` [N], indices into the B*T positions, only those logits are computed: [N, V]. Where `own` [B, T] is
        true, the input is not the given word but what the model itself says there (Bengio et al. 2015, scheduled
        sampling); without, the decoder runs over all words at once as far as it can.
        """
        state = self._first(self.encode(source, source_lengths))
        if own is None:
            features, _ = self._read(inputs, state)
        else:
            columns: list[Tensor] = []
            for step in range(inputs.shape[1]):
                words = inputs[:, step]
                if step and own[:, step].any():
                    rows = own[:, step].nonzero()[:, 0]
                    said = self._logits(columns[-1].detach()[rows]).argmax(-1)
                    words = words.index_put((rows,), said)
                columns.append(self._read(words[:, None], state)[0][:, 0])
            features = torch.stack(columns, dim=1)
        features = features.flatten(0, 1)[scored] if scored is not None else features
        return self._logits(self.dropout(features))

    def encode(self, source: Tensor, lengths: Tensor) -> EncodedSource:
        """source [B, S], padded on the right, of `lengths` [B] tokens (on the CPU)."""
        values, summary = self.encoder(source, lengths)
        padding = None
        if int(lengths.min()) < source.shape[1]:
            padding = torch.arange(source.shape[1], device=source.device) >= lengths.to(source.device)[:, None]
        keys = self.key(values) if self.options.attention == "additive" else None
        return EncodedSource(values, keys, padding, summary)

    def _first(self, encoded: EncodedSource) -> State:
        first = torch.tanh(self.first_state(encoded.summary))
        return State(list(first.chunk(self.options.layers, dim=1)), encoded)

    def _read(self, inputs: Tensor, state: State) -> tuple[Tensor, list[Tensor]]:
        """Reads words [B, T] and moves `state` behind them, in place.

        Returns the features [B, T, words] that the output layer takes, and the attention [B, S] of each step, if any.
        """
        encoded, hidden = state.encoded, state.hidden[0]
        words = self.dropout(self.embedding(inputs))
        word_gates = self.lowest.from_word(words)
        states, contexts, looks = [], [], []
        context = encoded.summary
        context_gates = None if encoded.keys is not None else self.lowest.from_context(context)
        for step in range(inputs.shape[1]):
            if encoded.keys is not None:
                weights = additive_attention(self.query(hidden), encoded.keys, self.score, encoded.padding)
                context = torch.bmm(weights[:, None], encoded.values)[:, 0]
                context_gates = self.lowest.from_context(context)
                looks.append(weights)
            hidden = self.lowest(word_gates[:, step], context_gates, hidden)
            states.append(hidden)
            contexts.append(context)
        state.hidden[0] = hidden
        x, context = torch.stack(states, dim=1), torch.stack(contexts, dim=1)
        for number, layer in enumerate(self.upper, 1):
            x, last = layer(torch.cat([self.dropout(x), context], dim=-1), state.hidden[number][None].contiguous())
            state.hidden[number] = last[0]
        return torch.tanh(self.readout(torch.cat([x, context, words], dim=-1))), looks

    def begin(self, source: Tensor, lengths: Tensor, first_word: int) -> tuple[Tensor, State]:
        """The logits [B, V] of the first token behind `first_word`, and the state that `extend` goes on with."""
        state = self._first(self.encode(source, lengths))
        start = torch.full((len(source),), first_word, device=source.device)
        return self.extend(start, state), state

    def extend(self, tokens: Tensor, state: State) -> Tensor:
        """Appends one token per row, tokens [B], to the state in place; returns the logits behind it [B, V]."""
        features, _ = self._read(tokens[:, None], state)
        return self._logits(self.dropout(features[:, 0]))

    def _logits(self, features: Tensor) -> Tensor:
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return F.linear(features, weight, self.output_bias)

    def attention_map(self, source: Tensor, inputs: Tensor) -> Tensor:
        """For one sentence, source [S] and inputs [T]: what each word's step looked at, [T, S]; rows sum to 1."""
        encoded = self.encode(source[None], torch.tensor([len(source)]))
        _, looks = self._read(inputs[None], self._first(encoded))
        return torch.cat(looks)

    def flops_per_token(self, source_length: float, target_length: float) -> float:
        """Floating-point operations of a forward and backward pass per real token of either side, padding not counted.

        6 per weight and token that passes it: the encoder's by source tokens, the decoder's by target tokens; the
        attention's sum over keys, and over values, by their product. Embedding look-ups cost none.
        """

        def weights(*modules: nn.Module) -> int:
            return sum(p.numel() for module in modules for p in module.parameters() if p.dim() >= 2)

        source = weights(self.encoder.layers)
        target = weights(self.lowest, self.upper, self.readout) + self.output_bias.numel() * self.readout.out_features
        both = 0
        if self.options.attention == "additive":
            source += weights(self.key)
            target += weights(self.query)
            both = self.options.hidden_width + self.encoder.width
        total = source * source_length + target * target_length + both * source_length * target_length
        return 6 * total / (source_length + target_length)

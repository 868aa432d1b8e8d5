"""A decode step that attends to the codes: values are never reconstructed, keys not put into columns.

With a key predictor of limited rank and values predicted from their layer's keys alone (preset ``decode``), a
token needs its latent and its coefficients only. Keys are made out of these and meet the query at once; the
sum of values, weighted by attention, is a few small products of weighted sums of latents and coefficients.
Tokens that are exact (sinks, outliers, the newest) are attended to beside them under one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import Outliers
from aquakv.cache.step import Blocks, CodesStep, reconstruction_dtype
from aquakv.cache.storage import CodedPages, ExactTokens
from aquakv.codec import LayerCodec, LinearTransform, ModelCodec, ScalarQuantizer
from aquakv.codec.latent import require_latents
from aquakv.config import GuardConfig
from aquakv.errors import ConfigError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import rotate

#: With more new tokens than this, reconstructing once for all of them is less work.
MOST_QUERIES = 8


def why_not_fused(codec: ModelCodec) -> str | None:
    """Return why a codec's codes cannot be attended to directly, or None if they can."""
    for layer in codec.layers:
        if not all(isinstance(part.quantizer, ScalarQuantizer) for part in (layer.keys, layer.values)):
            return f"its quantiser is {codec.config.quantizer.kind}, expected scalar"
        if layer.inputs.kind == "linear" and layer.inputs.value_inputs != ("keys",):
            return f"its values are predicted from {', '.join(layer.inputs.value_inputs)}, expected keys only"
    try:
        require_latents(codec.layers)
    except ConfigError as error:
        return str(error)
    return None


class FusedStep(CodesStep):
    """A forward pass of few tokens that attends to the codes.

    Parameters
    ----------
    adapter, layout, guard, columns_before, codec, tail_columns, mask
        As for `CodesStep`; `why_not_fused` must find nothing in the codec.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        layout: TokenLayout,
        guard: GuardConfig,
        columns_before: int,
        codec: ModelCodec,
        tail_columns: int,
        mask: Tensor | None,
    ) -> None:
        super().__init__(adapter, layout, guard, columns_before, codec, tail_columns, mask)
        self._latent: Tensor | None = None
        self._visible: dict[torch.device, Visible] = {}

    def run_layer(
        self,
        layer_idx: int,
        codec: LayerCodec,
        pages: CodedPages,
        exact: ExactTokens,
        key_states: Tensor,
        value_states: Tensor,
    ) -> tuple[CodedView, CodedView]:
        """Add the pass's tokens to one layer; return what attention takes in place of keys and values."""
        device = key_states.device
        keys, values = self._held(exact, key_states, value_states)
        chunk, dtype = pages.all(), reconstruction_dtype(key_states)
        codes = chunk.encoded
        key_coefficients = codec.keys.dequantize(codes.keys, dtype)
        value_coefficients = codec.values.dequantize(codes.values, dtype)
        latent = None if self._latent is None else self._latent.to(device)
        key_hat = _keys(codec, key_coefficients, latent)
        tables = self.coded.tables(self.adapter, layer_idx, key_states)
        view = CodedView(
            codec,
            rotate(key_hat.view(-1, *keys.shape[2:]), tables),
            key_coefficients,
            value_coefficients,
            latent,
            chunk.outliers,
            torch.cat([exact.sink_keys, keys], 1),
            torch.cat([exact.sink_values, values], 1),
            self._visible_on(device),
        )
        if self.next_layer + 1 < len(self._codec.layers):
            step = self._codec.latent_step_on(self.next_layer, device)
            self._latent = step.advance(latent, key_coefficients)
        self._take_in(layer_idx, codec, pages, exact, keys, values)
        return view, view

    def _visible_on(self, device: torch.device) -> Visible:
        if device not in self._visible:
            self._visible[device] = Visible.of(
                self.layout, self.coded, self.columns_before, self.due.first_column, self._mask, device
            )
        return self._visible[device]


@dataclass(frozen=True)
class Visible:
    """Which tokens each query of a pass may attend to; the same at all layers.

    Attributes
    ----------
    grid
        ``[rows, most]`` int64: which compressed tokens, in storage order, are each row's; None for a single
        row that has them in that order.
    coded
        ``[rows, 1, most]`` bool: whether there is such a token, and it may be attended to.
    exact
        ``[rows, queries, sinks + held columns]`` bool.
    some_unseen
        Whether some of ``coded`` are false.
    """

    grid: Tensor | None
    coded: Tensor
    exact: Tensor
    some_unseen: bool = True

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        blocks: Blocks,
        columns_before: int,
        first_column: int,
        mask: Tensor | None,
        device: torch.device,
    ) -> Visible:
        """Work it out for the columns from ``first_column`` on, of which those before the pass are known."""
        window, columns = layout.window, layout.columns
        allowed = torch.ones(layout.rows, columns, dtype=torch.bool)
        if mask is not None:
            allowed = mask[:, :columns].ne(0).cpu().expand(layout.rows, -1)
        column = torch.arange(columns)
        query = torch.arange(columns_before, columns)
        sinks, held = torch.zeros(layout.rows, window.sink_tokens, dtype=torch.bool), []
        for row, (start, coded) in enumerate(zip(layout.starts, layout.coded, strict=True)):
            count = max(0, min(window.sink_tokens, columns_before - start))
            sinks[row, :count] = allowed[row, start : start + count]
            first = start + window.sink_tokens + coded if coded else start + count
            held.append(allowed[row] & (column >= first))
        own = torch.stack(held)[:, None, first_column:] & (column[first_column:] <= query[:, None])
        exact = torch.cat([sinks[:, None].expand(-1, len(query), -1), own], 2)
        index = layout.page_columns(blocks.pages, torch.device("cpu"))
        may = allowed.flatten()[index]
        if layout.rows == 1:
            return cls(None, may[None, None].to(device), exact.to(device), not bool(may.all()))
        by_row = [(index // columns == row).nonzero().squeeze(1) for row in range(layout.rows)]
        grid = torch.nn.utils.rnn.pad_sequence(by_row, batch_first=True, padding_value=-1)
        there = grid >= 0
        grid = grid.clamp(min=0)
        seen = there & may[grid]
        return cls(grid.to(device), seen[:, None].to(device), exact.to(device), not bool(seen.all()))

    def by_row(self, tokens: Tensor, seen_only: bool = False) -> Tensor:
        """Return ``[rows, most, …]`` of ``[tokens, …]`` in storage order.

        With ``seen_only``, of vectors, zeros for tokens that no query sees: whatever those hold, nothing
        times it must be nothing.
        """
        rows = tokens[None] if self.grid is None else tokens[self.grid]
        return rows.masked_fill(~self.coded.transpose(1, 2), 0) if seen_only and self.some_unseen else rows


@dataclass(frozen=True)
class CodedView:
    """One layer's tokens, in place of keys and values, for `attend`.

    Attributes
    ----------
    codec
        The layer's codec.
    keys
        ``[tokens, num_kv_heads, head_dim]`` float32: compressed tokens' keys after rotary embedding.
    key_coefficients, value_coefficients
        ``[tokens, coefficients]``, of the same tokens.
    latent
        ``[tokens, rank]``; None at the first compressed layer.
    outliers
        Compressed tokens that are seen exactly.
    exact_keys, exact_values
        ``[rows, sinks + held columns, num_kv_heads, head_dim]``.
    visible
        Which of all these may be seen.
    """

    codec: LayerCodec
    keys: Tensor
    key_coefficients: Tensor
    value_coefficients: Tensor
    latent: Tensor | None
    outliers: Outliers | None
    exact_keys: Tensor
    exact_values: Tensor
    visible: Visible

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Attend to all tokens.

        Parameters
        ----------
        query
            ``[rows, num_attention_heads, queries, head_dim]`` after rotary embedding.
        scaling
            Factor of the scores.
        softcap
            Scores become ``softcap * tanh(score / softcap)``.
        sink_logits
            ``[num_attention_heads]``: a score that belongs to no token, as some models learn.

        Returns
        -------
        Tensor
            ``[rows, queries, num_attention_heads, head_dim]`` in the query's dtype.
        """
        rows, heads, queries, dim = query.shape
        kv_heads = self.exact_keys.shape[2]
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        grouped = (query.to(precise) * scaling).reshape(rows, kv_heads, -1, dim)
        visible = self.visible
        coded = grouped @ visible.by_row(self.keys).permute(0, 2, 3, 1).to(precise)
        exact_keys, exact_values, seen, hidden = self._with_outliers(queries)
        exact = grouped @ exact_keys.permute(0, 2, 3, 1).to(precise)
        if softcap is not None:
            coded, exact = (softcap * torch.tanh(scores / softcap) for scores in (coded, exact))
        repeats = heads // kv_heads
        seen = seen.repeat(1, repeats, 1)[:, None]  # groups are [query head, query]
        coded = coded.masked_fill(~hidden[:, None], -torch.inf)
        exact = exact.masked_fill(~seen, -torch.inf)
        highest = torch.maximum(coded.amax(-1, keepdim=True), exact.amax(-1, keepdim=True))
        sink = None
        if sink_logits is not None:
            sink = sink_logits.to(precise).view(1, kv_heads, repeats, 1).expand(rows, -1, -1, queries)
            sink = sink.reshape(rows, kv_heads, -1, 1)
            highest = torch.maximum(highest, sink)
        # A query of a row that is nothing but padding sees nothing; it gets zeros and nobody reads it.
        highest = highest.clamp(min=torch.finfo(precise).min)
        coded, exact = (coded - highest).exp_(), (exact - highest).exp_()
        total = coded.sum(-1, keepdim=True) + exact.sum(-1, keepdim=True)
        if sink is not None:
            total = total + (sink - highest).exp()
        total = total.clamp(min=torch.finfo(precise).tiny)
        out = (exact / total) @ exact_values.transpose(1, 2).to(precise) + self._values(coded / total)
        out = out.view(rows, kv_heads, repeats, queries, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(rows, queries, heads, dim).to(query.dtype)

    def _values(self, weights: Tensor) -> Tensor:
        """Return the sums of compressed values with weights ``[rows, kv_heads, n, tokens]``."""
        rows, kv_heads, _, tokens = weights.shape
        flat = weights.reshape(rows, -1, tokens)

        def total(parts: Tensor) -> Tensor:
            """Return the weighted sums of ``[tokens, width]``: ``[rows, kv_heads, n, width]``."""
            sums = flat.to(parts.dtype) @ self.visible.by_row(parts, seen_only=True)
            return sums.to(weights.dtype).view(rows, kv_heads, weights.shape[2], parts.shape[1])

        codec, mass = self.codec, weights.sum(-1, keepdim=True)

        def own_head(matrix: Tensor) -> Tensor:
            """Return the columns of a matrix ``[width, features]`` by head: ``[kv_heads, width, dim]``."""
            return matrix.to(weights.dtype).unflatten(1, (kv_heads, -1)).transpose(0, 1)

        assert isinstance(codec.values.transform, LinearTransform)
        offset = codec.values.mean.to(weights.dtype)
        out = total(self.value_coefficients) @ own_head(codec.values.transform.synthesis)
        if codec.values.predictor is not None:
            latents = None if self.latent is None else total(self.latent)
            keys = _combined_keys(codec, total(self.key_coefficients), latents, mass)
            for factor in codec.values.predictor.factors[:-1]:
                keys = keys @ factor.to(weights.dtype)
            out = out + keys @ own_head(codec.values.predictor.factors[-1])
            offset = offset + codec.values.predictor.bias.to(weights.dtype)
        return out + mass * offset.view(kv_heads, 1, -1)

    def _with_outliers(self, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return exact keys and values, who sees them, and which compressed tokens are seen as codes."""
        keys, values, seen = self.exact_keys, self.exact_values, self.visible.exact
        coded = self.visible.coded
        if self.outliers is None:
            return keys, values, seen, coded
        chosen = self.outliers.index.long()
        place = torch.zeros(len(self.keys), dtype=torch.long, device=chosen.device)
        place[chosen] = torch.arange(1, len(chosen) + 1, device=chosen.device)
        by_row = self.visible.by_row(place) * coded[:, 0]  # 0: not an outlier of this row
        order = by_row.argsort(dim=1, descending=True, stable=True)
        most = min(len(chosen), order.shape[1])
        number = by_row.gather(1, order[:, :most])
        present, number = number > 0, (number - 1).clamp(min=0)
        keys = torch.cat([keys, self.outliers.keys[number]], 1)
        values = torch.cat([values, self.outliers.values[number]], 1)
        seen = torch.cat([seen, present[:, None].expand(-1, queries, -1)], 2)
        return keys, values, seen, coded & (by_row == 0)[:, None]


def _keys(codec: LayerCodec, coefficients: Tensor, latent: Tensor | None) -> Tensor:
    """Return keys before rotary embedding, mean included, ``[tokens, features]``."""
    dtype = coefficients.dtype
    assert isinstance(codec.keys.transform, LinearTransform)
    base, predictor = codec.keys.mean, codec.keys.predictor
    if predictor is None:
        return torch.addmm(base.to(dtype), coefficients, codec.keys.transform.synthesis.to(dtype))
    assert latent is not None
    keys = torch.addmm(base.to(dtype) + predictor.bias.to(dtype), latent, predictor.factors[-1].to(dtype))
    return keys.addmm_(coefficients, codec.keys.transform.synthesis.to(dtype))


def _combined_keys(codec: LayerCodec, coefficients: Tensor, latents: Tensor | None, mass: Tensor) -> Tensor:
    """Return sums of centred keys from sums of coefficients, of latents and of weights."""
    dtype, predictor = coefficients.dtype, codec.keys.predictor
    assert isinstance(codec.keys.transform, LinearTransform)
    keys = coefficients @ codec.keys.transform.synthesis.to(dtype)
    if predictor is None:
        return keys
    assert latents is not None
    return keys + latents @ predictor.factors[-1].to(dtype) + mass * predictor.bias.to(dtype)

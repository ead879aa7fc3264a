"""Rows without padding: the real tokens of a batch one after another, and attention within each row.

A padded batch of short texts is mostly padding: padded to the longest of 8 SMS, 2.3 positions stand for a real token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as functional

from toolkit.models.cpu_kernels import WIDENED, stepped

Tensor = torch.Tensor

FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Packing:
    """The N tokens of a batch of B rows, row after row, rows in order of length, and behind them filler.

    Attributes:
        positions: (N,) int64, place of each token in its row, from 0; 0 for filler.
        runs: (rows, length) of each run of equally long rows: one attention call serves a run.
        bounds: (B + 1,) int32, where rows begin and end.
        pooled: (B,) int64, index into N of the token each row is classified by.
        row_of: (B,) int64, place of each row of the batch in the order of length.
        filler: Tokens at the end that belong to no row; nothing reads what becomes of them.
        pooled_filler: The same of the pooled tokens.
    """

    positions: Tensor
    runs: tuple[tuple[int, int], ...]
    bounds: Tensor
    pooled: Tensor
    row_of: Tensor
    filler: int = 0
    pooled_filler: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.runs[-1][1]


def pack(
    input_ids: Tensor, attention_mask: Tensor | None, *, pooling: str, in_steps: bool = False
) -> tuple[Tensor, Packing]:
    """Return the real tokens of a padded batch, (N,) int64, and how they lie.

    Args:
        input_ids: (B, T) int64, padded anywhere.
        attention_mask: (B, T), 1 for real tokens; None means that all are real.
        pooling: Which token is classified: ``last`` or ``first`` of the real ones.
        in_steps: Whether filler makes N and B of few counts (``models.cpu_kernels``).
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    # A row without tokens is classified by its first padding, as in the padded forward.
    real = torch.cat([real[:, :1] | ~real.any(1, keepdim=True), real[:, 1:]], dim=1)
    packing, order = lay_out(real.sum(1), pooling=pooling, in_steps=in_steps)
    return functional.pad(input_ids[order][real[order]], (0, packing.filler)), packing


def lay_out(lengths: Tensor, *, pooling: str, in_steps: bool = False) -> tuple[Packing, Tensor]:
    """Return how rows of these lengths, (B,) int64, lie, and the order (B,) they have to be put into.

    Args:
        lengths: Tokens of each row, at least 1.
        pooling: Which token is classified: ``last`` or ``first``.
        in_steps: Whether filler makes N and B of few counts.
    """
    lengths, order = torch.sort(lengths, stable=True)
    bounds = functional.pad(lengths.cumsum(0), (1, 0))
    # Attention calls want their shapes on the host: on a GPU this waits for the device once a batch.
    sizes = lengths.tolist()
    starts = torch.repeat_interleave(bounds[:-1], lengths, output_size=sum(sizes))
    filler = stepped(len(starts)) - len(starts) if in_steps else 0
    packing = Packing(
        positions=functional.pad(torch.arange(len(starts), device=starts.device) - starts, (0, filler)),
        runs=tuple((len(list(run)), length) for length, run in groupby(sizes)),
        bounds=bounds.int(),
        pooled=bounds[1:] - 1 if pooling == "last" else bounds[:-1],
        row_of=torch.argsort(order),
        filler=filler,
        pooled_filler=stepped(len(sizes)) - len(sizes) if in_steps else 0,
    )
    return packing, order


def pooled_tokens(part: Tensor, packing: Packing) -> Tensor:
    """Return of ``part`` (N, width) the tokens that rows are classified by, (B, width), with their filler."""
    return fill_pooled(part.index_select(0, packing.pooled), packing)


def fill_pooled(part: Tensor, packing: Packing) -> Tensor:
    """Return ``part`` (B, width) with zeros as filler behind."""
    return functional.pad(part, (0, 0, 0, packing.pooled_filler)) if packing.pooled_filler else part


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packing: Packing,
    heads: int,
    single: bool,
    causal: bool,
    dropout: float,
    scale: float,
) -> Tensor:
    """Return softmax attention within each row.

    Args:
        query: (N, width), or one query a row, that sees the whole row: (B, width) of ``pooled_tokens``.
        key: (N, width).
        value: (N, width).
        packing: Where the rows lie.
        heads: Number of heads; width is a multiple of it.
        single: Whether there is one query a row.
        causal: Whether a token sees only itself and those before it; for one query a row: False.
        dropout: Probability of dropping an attention weight.
        scale: Factor on the products of queries and keys.

    Returns:
        Shaped like ``query``.
    """
    if single:
        query = query[: len(packing.pooled)]
    parts = [part.view(len(part), heads, -1) for part in (query, key, value)]
    kernel: Callable[..., Tensor] = attend_by_run
    if key.is_cuda:
        kernel = _attend_varlen if dropout == 0.0 and _has_varlen(key) else attend_padded
    elif key.dtype != torch.float32 and packing.longest <= WIDENED:
        kernel = attend_widened
    context = kernel(*parts, packing=packing, causal=causal, dropout=dropout, scale=scale).flatten(1)
    return fill_pooled(context, packing) if single else context


def attend_by_run(
    query: Tensor, key: Tensor, value: Tensor, *, packing: Packing, causal: bool, dropout: float, scale: float
) -> Tensor:
    """Attend with one sdpa call for each run of equally long rows; tensors are (N or B, heads, head width).

    The fastest on a CPU: a block mask costs 22 % of a step on short texts, nested tensors have no kernel.
    """
    sizes = [*(rows * length for rows, length in packing.runs), packing.filler]
    single = len(query) != len(key)
    query_sizes = [*(rows for rows, _ in packing.runs), 0] if single else sizes
    split = zip(
        packing.runs,
        torch.split(query, query_sizes)[:-1],
        torch.split(key, sizes)[:-1],
        torch.split(value, sizes)[:-1],
        strict=True,
    )
    contexts = [
        functional.scaled_dot_product_attention(
            _as_heads(run_query, rows),
            _as_heads(run_key, rows),
            _as_heads(run_value, rows),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
        )
        for (rows, _), run_query, run_key, run_value in split
    ]
    joined = [context.transpose(1, 2).flatten(0, 1) for context in contexts]
    if packing.filler and not single:
        joined.append(joined[0].new_zeros(packing.filler, *query.shape[1:]))
    return torch.cat(joined)


def attend_widened(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attend to short rows in float32, and return the dtype of ``query``; arguments are those of ``attend_by_run``.

    Of a CPU's kernels those of bf16 are the slow ones (a row of 22 tokens, forward and backward: 0.40 ms against 0.14
    in float32 with the copies; of 230: 3.9 against 3.5), and they compile code for every length, as linear layers do
    (``models.cpu_kernels``).
    """
    attended: Tensor = _Widened.apply(query, key, value, options)  # type: ignore[no-untyped-call]
    return attended


class _Widened(torch.autograd.Function):
    """Makes its float32 copies again for the backward pass, so that they are not kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options, ctx.random = options, torch.get_rng_state() if options["dropout"] else None
        return _in_float32((query, key, value), options).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: where a block is recomputed, the second time finds nothing.
        saved = ctx.saved_tensors
        parts = [part.detach().float().requires_grad_() for part in saved]
        with torch.enable_grad(), torch.random.fork_rng(devices=[], enabled=ctx.random is not None):
            if ctx.random is not None:
                torch.set_rng_state(ctx.random)
            context = _in_float32(parts, ctx.options)
        found = torch.autograd.grad(context, parts, gradients[0].float())
        return *(one.to(part.dtype) for one, part in zip(found, saved, strict=True)), None


def _in_float32(parts: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        query, key, value = (part.float() for part in parts)
        return attend_by_run(query, key, value, **options)


def _as_heads(part: Tensor, rows: int) -> Tensor:
    """Return (rows, heads, length, head width) of a run's (rows * length, heads, head width)."""
    return part.view(rows, -1, *part.shape[1:]).transpose(1, 2)


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, *, packing: Packing, causal: bool, dropout: float, scale: float
) -> Tensor:
    """Attend with one sdpa call on padded rows, for devices where launching a call costs more than padding.

    Tensors are (N or B, heads, head width). Its arithmetic is tested on a CPU; it has not run on a GPU.
    """
    single, place = len(query) != len(key), padded_places(packing)

    def pad(part: Tensor) -> Tensor:
        return pad_rows(part, place, packing).transpose(1, 2)

    context = functional.scaled_dot_product_attention(
        query.unsqueeze(2) if single else pad(query),
        pad(key),
        pad(value),
        # Padding stands on the right, where a causal query does not look.
        attn_mask=None if causal else real_positions(packing)[:, None, None],
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
    ).transpose(1, 2)
    return context.squeeze(1) if single else context.flatten(0, 1).index_select(0, place)


def padded_places(packing: Packing) -> Tensor:
    """Return, without filler, where each token stands in the rows padded to the longest, laid one after another."""
    positions = packing.positions[: len(packing.positions) - packing.filler]
    row = torch.repeat_interleave(
        torch.arange(len(packing.pooled), device=packing.bounds.device),
        packing.bounds.diff(),
        output_size=len(positions),
    )
    return row * packing.longest + positions


def pad_rows(part: Tensor, place: Tensor, packing: Packing) -> Tensor:
    """Return (B, longest, ...) of a part (N, ...), zero where there is no token."""
    rows = len(packing.pooled)
    padded = part.new_zeros(rows * packing.longest, *part.shape[1:]).index_copy(0, place, part)
    return padded.view(rows, packing.longest, *part.shape[1:])


def real_positions(packing: Packing) -> Tensor:
    """Return (B, longest), True where a padded row has a token."""
    return torch.arange(packing.longest, device=packing.bounds.device) < packing.bounds.diff()[:, None]


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, packing: Packing, causal: bool, dropout: float, scale: float
) -> Tensor:
    """Attend with torch's flash kernel for packed rows; not yet run on a GPU."""
    bounds, single = packing.bounds, len(query) != len(key)
    query_bounds = torch.arange(len(bounds), dtype=torch.int32, device=key.device) if single else bounds
    context: Tensor = _varlen_kernel()(
        query,
        key,
        value,
        query_bounds,
        bounds,
        1 if single else packing.longest,
        packing.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    return context


def _has_varlen(key: Tensor) -> bool:
    half = key.dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(key.device) >= FLASH_CAPABILITY and _varlen_kernel() is not None


@lru_cache(maxsize=1)
def _varlen_kernel() -> Any:
    """Return torch's attention for packed rows, or None where torch has none with a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None

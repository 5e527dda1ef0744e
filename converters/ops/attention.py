"""The fused Attention operator of opset 23, written out so that gradients pass through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from converters.ops.registry import Attributes, Body, operator


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[N, L, heads * D] or [N, heads, L, D] to the latter."""
    if x.dim() == 4:
        return x
    if count is None:
        raise NotImplementedError("Attention on three dimensions needs q_num_heads and kv_num_heads")
    return x.reshape(len(x), x.shape[1], count, -1).transpose(1, 2)


def _mask(mask: Tensor | None, queries: int, keys: int, causal: bool, like: Tensor) -> Tensor | None:
    """What to add to the scores: minus infinity where a key must not be seen."""
    total = None
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=like.dtype)
        total = hidden.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        if total.shape[-1] < keys:  # the standard fills a short mask with minus infinity
            total = torch.nn.functional.pad(total, [0, keys - total.shape[-1]], value=-math.inf)
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril()
        future = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill(~seen, -math.inf)
        total = future if total is None else total + future
    return total


@operator("Attention", 23, 24)
def attention(attributes: Attributes) -> Body:
    """softmax(softcap(scale Q K^T) + mask) V, with grouped queries; the first output only."""
    query_heads, key_heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    softcap, causal = attributes.get("softcap", 0.0), bool(attributes.get("is_causal", 0))

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *cache: Tensor | None) -> Tensor:
        if any(part is not None for part in cache):
            raise NotImplementedError("Attention with a key and value cache, which generators have and classifiers not")
        flat = query.dim() == 3
        q, k, v = _heads(query, query_heads), _heads(key, key_heads), _heads(value, key_heads)
        share = q.shape[1] // k.shape[1]
        if share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scale = math.sqrt(attributes.get("scale", 1 / math.sqrt(q.shape[-1])))
        scores = (q * scale) @ (k * scale).mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        added = _mask(mask, q.shape[2], k.shape[2], causal, q)
        if added is not None:
            scores = scores + added
        blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key gets zeros
        y = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0) @ v
        return y.transpose(1, 2).reshape(len(y), y.shape[2], -1) if flat else y

    return run

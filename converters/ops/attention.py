"""The fused operators of transformers of opset 23, written out so that gradients pass through them."""

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
        raise NotImplementedError("three dimensions need an attribute that says how many heads they hold")
    return x.reshape(len(x), x.shape[1], count, -1).transpose(1, 2)


def _joined(y: Tensor, like: Tensor) -> Tensor:
    """[N, heads, L, D] in the form of an operand."""
    return y if like.dim() == 4 else y.transpose(1, 2).reshape(len(y), y.shape[2], -1)


def _window(queries: int, keys: int, left: int, right: int, like: Tensor) -> Tensor:
    """Minus infinity but where a key is at most `left` before its query and `right` after it; -1 is any distance."""
    ahead = torch.arange(keys, device=like.device) - torch.arange(queries, device=like.device)[:, None]
    unseen = (left >= 0) & (-ahead > left) | (right >= 0) & (ahead > right)
    return torch.zeros_like(ahead, dtype=like.dtype).masked_fill(unseen, -math.inf)


def _mask(mask: Tensor | None, keys: int, like: Tensor) -> Tensor | None:
    """What to add to the scores: minus infinity where a key must not be seen."""
    total = None
    if mask is not None:
        hidden = torch.zeros_like(mask, dtype=like.dtype)
        total = hidden.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        if total.shape[-1] < keys:  # the standard fills a short mask with minus infinity
            total = torch.nn.functional.pad(total, [0, keys - total.shape[-1]], value=-math.inf)
    return total


@operator("Attention")
def attention(attributes: Attributes) -> Body:
    """softmax(softcap(scale Q K^T) + mask) V, with grouped queries; the first output only."""
    query_heads, key_heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    softcap = attributes.get("softcap", 0.0)
    left, right = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    if attributes.get("is_causal", 0):
        right = 0

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *cache: Tensor | None) -> Tensor:
        if any(part is not None for part in cache):
            raise NotImplementedError("Attention with a key and value cache, which generators have and classifiers not")
        q, k, v = _heads(query, query_heads), _heads(key, key_heads), _heads(value, key_heads)
        share = q.shape[1] // k.shape[1]
        if share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scale = math.sqrt(attributes.get("scale", 1 / math.sqrt(q.shape[-1])))
        scores = (q * scale) @ (k * scale).mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        added = _mask(mask, k.shape[2], q)
        if added is not None:
            scores = scores + added
        if left >= 0 or right >= 0:
            scores = scores + _window(q.shape[2], k.shape[2], left, right, q)
        blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key gets zeros
        y = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0) @ v
        return _joined(y, query)

    return run


@operator("RotaryEmbedding")
def rotary_embedding(attributes: Attributes) -> Body:
    """The first numbers of each head turned, in pairs, by angles that depend on the token's place."""
    count, turned = attributes.get("num_heads"), attributes.get("rotary_embedding_dim", 0)
    neighbours = bool(attributes.get("interleaved", 0))

    def run(x: Tensor, cosine: Tensor, sine: Tensor, places: Tensor | None = None) -> Tensor:
        heads = _heads(x, count)
        part, rest = heads[..., : turned or None], heads[..., turned or heads.shape[-1] :]
        cos, sin = (table[:, None] if places is None else table[places][:, None] for table in (cosine, sine))
        a, b = part.unflatten(-1, (-1, 2) if neighbours else (2, -1)).unbind(-1 if neighbours else -2)
        turn = torch.stack([cos * a - sin * b, sin * a + cos * b], -1 if neighbours else -2).flatten(-2)
        return _joined(torch.cat([turn, rest], -1), x)

    return run

"""Exact kernels in place of those of GPUs, so that the paths to them run on a CPU.

Each document is computed alone by a softmax written out here, which shares nothing with what is tested.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from vlcpt.model import attention
from vlcpt.model.attention_kernel import Proof


def attend_apart(query, key, value, bounds, scaling, causal):
    """Attention of each document to itself: (tokens, heads, width), keys with fewer heads."""
    group = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(group, dim=1) for one in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = torch.einsum("qhw,khw->hqk", query[start:stop], key[start:stop]) * scaling
        if causal:
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        found.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), value[start:stop]))
    return torch.cat(found)


def exact_varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Attention by documents finds a kernel on this machine; how often it is called is counted."""
    seen = SimpleNamespace(calls=0)

    def kernel(query, key, value, bounds, longest, scaling, causal):
        seen.calls += 1
        assert longest == bounds.diff().max()
        assert bounds[-1] == len(query)
        return attend_apart(query, key, value, bounds, scaling, causal)

    proof = Proof(kernel, "exact")
    monkeypatch.setattr(attention, "kernel_for", lambda *args, **kwargs: proof)
    return seen


def exact_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of transformers to flash attention, as it is, with exact kernels at its end."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal, **kwargs):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        return attend_apart(q, k, v, cu_seqlens_q, softmax_scale, causal)

    def rows(q, k, v, softmax_scale, causal, **kwargs):
        bounds = torch.arange(len(q) + 1) * q.shape[1]
        flat = (one.flatten(0, 1) for one in (q, k, v))
        return attend_apart(*flat, bounds, softmax_scale, causal).unflatten(0, q.shape[:2])

    def arguments(query_length, key_length, is_causal, softmax_scale=None, max_seqlen_q=None, **kwargs):
        return {"causal": is_causal, "softmax_scale": softmax_scale} | (
            {"max_seqlen_q": max_seqlen_q} if max_seqlen_q is not None else {}
        )

    kernels = ((rows, varlen, None, None, None), (arguments, None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: kernels)

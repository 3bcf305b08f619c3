"""Attention by documents: each document of a batch attends to itself alone, at any number of rows.

The documents are given by their bounds over all rows laid end to end, as ``cu_seq_lens_q`` of the forward
pass, so that no mask is made and nothing is guessed from positions. One function serves the language model
(causal) and the vision tower (its windows and frames), through ``AttentionInterface`` of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlcpt.model.attention_kernel import Proof, by_length, kernel_for

# With "flash" in the name the vision tower hands over the bounds of its windows and calls this once a layer;
# without, it calls attention once a window (transformers 5.24, Qwen2_5_VLVisionAttention.forward).
BY_DOCUMENT = "flash_by_document"


def attend_by_document(model: PreTrainedModel) -> None:
    """Make every tower of a model attend by documents.

    A name given at loading, with "flash" in it, would start a search for kernels on the Hub, so it is set
    afterwards. It is a property of the run and never saved.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> model = load_base(base_path())
        >>> attend_by_document(model)
        >>> "attn" in model.config.to_json_string()
        False
    """
    AttentionInterface.register(BY_DOCUMENT, by_document)
    AttentionMaskInterface.register(BY_DOCUMENT, _mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = BY_DOCUMENT
    model.get_decoder().register_forward_pre_hook(_without_mask, with_kwargs=True)


def attention_for(config: PreTrainedConfig, wanted: str) -> str:
    """The attention that a model is to run: the one wanted, or for ``auto`` attention by documents.

    That cannot keep a token from seeing those far before it, as a layer with a sliding window does. A model
    that has one, as no published Qwen2.5-VL does, gets PyTorch's own with a mask.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import read_config
        >>> attention_for(read_config(base_path()), "auto")
        'flash_by_document'
    """
    if wanted != "auto":
        return wanted
    return "sdpa" if "sliding_attention" in (config.get_text_config().layer_types or ()) else BY_DOCUMENT


def attention_of(model: PreTrainedModel) -> str:
    """The attention that a model runs, by the name of transformers or :data:`BY_DOCUMENT`."""
    return str(model.config._attn_implementation)


def with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A copy of a configuration, for a model with this attention."""
    copied = copy.deepcopy(config)
    copied._attn_implementation = name
    return copied


def by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    document_lengths: Sequence[int] | None = None,
    frame_lengths: Sequence[int] | None = None,
    window_lengths: Sequence[int] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each document to itself, as transformers calls it.

    Args:
        module: The attention layer; ``is_causal`` says whether a token sees those after it.
        query, key, value: (B, heads, T, width); key and value may have fewer heads.
        attention_mask: None, or a mask of the caller's own (as in ``generate``), which then decides alone.
        position_ids: (B, T), from 0 in each document; used where there are no bounds.
        cu_seq_lens_q: int32 (N+1,), where documents begin and end over all rows.
        max_length_q: Tokens of the longest one.
        document_lengths, frame_lengths, window_lengths: Those of the language model, and of the tower's two
            kinds of layers, as plain numbers, so that nothing waits for the device.

    Returns:
        (B, T, heads, width), and None for the weights.
    """
    causal = bool(module.is_causal) if is_causal is None else is_causal
    rows, tokens = query.shape[0], query.shape[2]
    if attention_mask is not None or tokens != key.shape[2]:
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
        return found, None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = _bounds_of(position_ids, rows, tokens, query.device)
    # The vision tower gets the bounds of windows or of frames: the same ones where there are as many of both.
    given = (document_lengths,) if causal else (window_lengths, frame_lengths)
    lengths = next((one for one in given if one and len(one) == len(cu_seq_lens_q) - 1), None)
    dtype = _compute_type(value)
    group = query.shape[1] // key.shape[1]
    kernel = None
    if not dropout:
        proof = kernel_for(query.device, dtype, query.shape[-1], query.shape[1], group, causal)
        are_equal = lengths is not None and lengths.count(lengths[0]) == len(lengths)
        kernel = None if are_equal and proof.faster == "at equal lengths" else proof.kernel
    # (B, heads, T, width) -> (B·T, heads, width)
    query, key, value = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if kernel is not None:
        longest = max_length_q or max(lengths or cu_seq_lens_q.diff().tolist())
        query, key, value = (one.to(dtype) for one in (query, key, value))
        out = kernel(query, key, value, cu_seq_lens_q, longest, scaling, causal)
    else:
        if lengths is None:
            lengths = cu_seq_lens_q.diff().tolist()
        out = by_length(query, key, value, lengths, module, scaling, causal, dropout)
    return out.unflatten(0, (rows, tokens)), None


def _bounds_of(
    position_ids: torch.Tensor | None, rows: int, tokens: int, device: torch.device
) -> torch.Tensor:
    """The bounds of documents, where positions do not grow by one; without positions a row is a document."""
    if position_ids is None or position_ids.shape[-1] != tokens:
        return torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
    positions = position_ids.expand(rows, -1)
    is_start = torch.diff(positions, prepend=positions[:, :1]) != 1  # the first of a row is one
    starts = is_start.flatten().nonzero()[:, 0]
    return nn.functional.pad(starts, (0, 1), value=rows * tokens).to(torch.int32)


def _mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor | None:
    """No mask where documents say what is seen; PyTorch's for padding of the caller's and for caches."""
    if attention_mask is None and q_length == kv_length:
        return None
    given = {"q_length": q_length, "kv_length": kv_length, "attention_mask": attention_mask, **kwargs}
    return sdpa_mask(**given)  # type: ignore[arg-type]


def _without_mask(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Spare a language model its masks where it has the bounds of documents, before it looks for packs.

    It would compare positions on the device, and wait for it (transformers 5.24, ``create_causal_mask``).
    """
    has_mask, has_cache = (kwargs.get(name) is not None for name in ("attention_mask", "cache"))
    if kwargs.get("cu_seq_lens_q") is None or has_mask or has_cache or kwargs.get("use_cache"):
        return args, kwargs
    return args, {**kwargs, "attention_mask": {"full_attention": None}}


def _compute_type(value: torch.Tensor) -> torch.dtype:
    """The type in which attention is computed: autocast's, or that of the values."""
    # Under autocast the rotation of queries and keys makes them float32 again; the values stay narrow.
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def describe_kernels(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """What attention by documents runs on for a model, each tower's kernel proven on the device.

    Empty where a model does not attend by documents, or not on a GPU, where there is nothing to choose.

    Args:
        dtype: In which the run computes.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> describe_kernels(load_base(base_path()), torch.device("cpu"), torch.float32)
        ''
    """
    if attention_of(model) != BY_DOCUMENT or device.type != "cuda":
        return ""
    text, vision = model.config.get_text_config(), model.config.vision_config
    heads, vision_heads = text.num_attention_heads, vision.num_heads
    layers = {
        "language model": (text.hidden_size // heads, heads, heads // text.num_key_value_heads, True),
        "vision tower": (vision.hidden_size // vision_heads, vision_heads, 1, False),
    }
    found = {name: kernel_for(device, dtype, *layer) for name, layer in layers.items()}
    if text.attention_dropout and found["language model"].kernel:
        reason = f"attention_dropout is {text.attention_dropout}, and the kernel has none"
        found["language model"] = Proof(None, reason)
    said: dict[str, list[str]] = {}
    for name, one in found.items():
        is_kernel = one.kernel is not None and one.faster == "nowhere"
        said.setdefault(_runs_on(one), []).append(name if is_kernel else f"{name}: {one.reason}")
    return "attention by documents: " + "; ".join(
        f"{kernels} ({'; '.join(towers)})" for kernels, towers in said.items()
    )


def _runs_on(proof: Proof) -> str:
    """What attention runs on, in words."""
    if proof.faster == "at equal lengths":
        return (
            "torch.nn.attention.varlen, but documents of one length by PyTorch's own, which is faster there"
        )
    if proof.kernel is not None:
        return "torch.nn.attention.varlen, which agrees with PyTorch's attention here"
    return f"PyTorch's own attention, which is {'faster here' if proof.faster == 'everywhere' else 'slower'}"

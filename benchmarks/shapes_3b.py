"""A base model with the 3B's configuration and random weights, written in seconds."""

from __future__ import annotations

from pathlib import Path

TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

# What the 7B has in place of these; its vision tower differs in the width that it gives alone.
TEXT_7B = {
    **TEXT,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
VISION_7B = {**VISION, "out_hidden_size": 3584}


def write_base(folder: Path, *, layers: int = 36, blocks: int = 32) -> int:
    """Write the model in bfloat16, with the demo's processor; gives the bytes of its weights.

    Args:
        layers: Of the language tower; the 3B has 36.
        blocks: Of the vision tower; the 3B has 32.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vlcpt.demo import base_path
    from vlcpt.model.loading import load_processor

    processor = load_processor(base_path())
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": layers},
        vision_config={**VISION, "depth": blocks},
        # The demo's tokens, in the 3B's vocabulary.
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**20 - 3, generator=generator).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
                parameter.fill_(1.0)
                continue
            # One block again and again: drawing three billion numbers takes minutes.
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())

"""How a model is held in 4 bits, by bitsandbytes."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

# Kept out of 4 bits by `qlora`: the small towers, which can then train in full, and the output layer. Each
# pattern is matched from the start of a module's path. Embeddings are no linear layers and stay as well.
UNQUANTISED = ["model.visual", "lm_head"]


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation; stored in the model's own type, so that ZeRO-3 can partition it.

    Example:
        >>> import torch
        >>> four_bits(torch.bfloat16).llm_int8_skip_modules
        ['model.visual', 'lm_head']
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=UNQUANTISED,
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when a model is evaluated on a CPU with AVX512-BF16.

    Version 0.50.2 then rounds the scales to bfloat16, and training after it fails (Linear4bit.forward).
    test_bitsandbytes_still_repacks_weights_for_evaluation fails when this is no longer needed.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.model.loading import load_base
        >>> keep_layout(load_base(str(files("vlcpt") / "demo/base")))  # no 4-bit layer: nothing to do
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def packed_storage(model: nn.Module) -> torch.dtype | None:
    """The type in which a model's 4-bit weights are stored; None if it has none.

    Example:
        >>> packed_storage(nn.Linear(2, 2)) is None
        True
    """
    # By name: bitsandbytes takes a second to import.
    for parameter in model.parameters():
        if type(parameter).__name__ == "Params4bit":
            return parameter.dtype
    return None

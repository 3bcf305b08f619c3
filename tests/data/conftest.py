"""The real vocabulary, and a processor that has it."""

import pytest
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2_5_VLProcessor

from tests.data.real_tokenizer import load_real_tokenizer


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5-VL's own tokenizer: 151,643 tokens and 22 control tokens."""
    return load_real_tokenizer()


@pytest.fixture(scope="session")
def real_processor(
    real_tokenizer: PreTrainedTokenizerFast, tiny_processor: ProcessorMixin
) -> Qwen2_5_VLProcessor:
    """The tiny processor's images and videos with the real vocabulary."""
    return Qwen2_5_VLProcessor(
        image_processor=tiny_processor.image_processor,
        tokenizer=real_tokenizer,
        video_processor=tiny_processor.video_processor,
    )

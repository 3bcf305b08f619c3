"""What all tests share: a tiny random model and the processor it goes with."""

import gc
import os
import signal

# A shell that starts this in the background ignores Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Two libraries that spin while they wait make a 50 ms forward take a second on two cores. The variable is
# read when torch is loaded, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of as many threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.processing_utils import ProcessorMixin

from tests.browser import browser, listener  # noqa: F401  # fixtures
from tests.published import PUBLISHED, Vocabulary, spread_weights, write_published

# How long an example takes says how busy the machine is, and a busy one fails no test.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")

DEMO_BASE = Path(__file__).parents[1] / "vlcpt" / "demo" / "base"
MakeTinyModel = Callable[..., Qwen2_5_VLForConditionalGeneration]


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Take what was imported out of each garbage collection to come.

    Trainer asks for a whole one at each start: half a second for a million objects that stay, more than
    the steps of a tiny model take. ``vlcpt doctor`` ends this, and tests import more, hence once a module.
    """
    if len(gc.get_objects()) > 100_000:  # of those that are not frozen
        gc.collect()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a module's tests of one ``layout`` follow each other, so that what they share is made once.

    pytest brings tests together by the place of a value in its list, and the lists of two tests differ.
    """
    modules = {module: place for place, module in enumerate(dict.fromkeys(item.path for item in items))}

    def group(item: pytest.Item) -> tuple[int, str]:
        callspec = getattr(item, "callspec", None)
        return modules[item.path], str(callspec.params.get("layout", "")) if callspec else ""

    items.sort(key=group)


def pytest_sessionfinish() -> None:
    """Hypothesis, if it is imported for its summary alone, asks who refers to what is frozen."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def layout(request: pytest.FixtureRequest) -> str:
    """How the tiny model lies on disk: ``saved`` by this transformers, or published as one of ``PUBLISHED``.

    A test runs on other layouts by ``@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)``.
    """
    return getattr(request, "param", "saved")


@pytest.fixture(scope="session")
def tiny_processor(layout: str, published_dirs: Callable[..., Path]) -> ProcessorMixin:
    """The processor of the embedded demo: about a thousand tokens, every special string of Qwen2.5-VL."""
    folder = DEMO_BASE if layout == "saved" else published_dirs(*PUBLISHED[layout])
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def make_tiny_model(tiny_processor: ProcessorMixin) -> MakeTinyModel:
    """A function that makes a random Qwen2.5-VL: two layers, two vision blocks, the demo's vocabulary."""
    tokenizer = tiny_processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    patch = tiny_processor.image_processor.patch_size
    merge = tiny_processor.image_processor.merge_size

    def make(
        tie: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Qwen2_5_VLForConditionalGeneration:
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": -(-len(tokenizer) // 16) * 16,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 4096,
                # The halves of a head's 16 dimensions: time, height, width.
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                    "rope_theta": 10000.0,
                },
                "bos_token_id": ids("<|endoftext|>"),
                "eos_token_id": ids("<|im_end|>"),
                "pad_token_id": ids("<|endoftext|>"),
                "tie_word_embeddings": tie,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "tokens_per_second": 2,
                "patch_size": patch,
                "spatial_merge_size": merge,
                # Windows of two by two merged patches in the first block, full attention in the second.
                "window_size": 2 * merge * patch,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
            tie_word_embeddings=tie,
        )
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        spread_weights(model)
        return model.to(dtype)

    return make


@pytest.fixture
def tiny_model(
    layout: str, make_tiny_model: MakeTinyModel, tiny_model_dir: Path
) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh tiny model in float32; its embeddings are not tied, unless published so."""
    if layout == "saved":
        return make_tiny_model()
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_model_dir(
    layout: str,
    make_tiny_model: MakeTinyModel,
    tiny_processor: ProcessorMixin,
    published_dirs: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder that ``from_pretrained`` reads: the tiny model with its processor. Not to be written to.

    What was published is in bfloat16: ``dtype="float32"`` loads every layout alike.
    """
    if layout != "saved":
        return published_dirs(*PUBLISHED[layout])
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a base in the published layout, made once. Not to be written to."""

    @cache
    def made(vocabulary: Vocabulary = "small", tied: bool = True) -> Path:
        return write_published(tmp_path_factory.mktemp("published"), vocabulary=vocabulary, tied=tied)

    return made


@pytest.fixture(scope="session")
def tiny_inputs(tiny_processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """What ``forward`` takes for one sequence of text, an image and text; every token is a label."""
    noise = torch.randint(0, 256, (84, 112, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = tiny_processor(
        text=[f"Before {vision} after the picture."],
        images=[Image.fromarray(noise.numpy())],
        return_tensors="pt",
    )
    return {**inputs, "labels": inputs["input_ids"], "use_cache": False}


@pytest.fixture
def one_thread():
    """Compute as ranks do: several threads cut products elsewhere, which moves the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Continued pre-training of Qwen2.5-VL on interleaved documents of images, video and text."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlcpt.config.schema import DataConfig as DataConfig
    from vlcpt.config.schema import ModelConfig as ModelConfig
    from vlcpt.config.training import CPTConfig as CPTConfig
    from vlcpt.data.collator import CPTDataCollator as CPTDataCollator
    from vlcpt.data.dataset import CPTDataset as CPTDataset
    from vlcpt.data.documents import Document as Document
    from vlcpt.data.documents import DocumentError as DocumentError
    from vlcpt.data.documents import Image as Image
    from vlcpt.data.documents import Source as Source
    from vlcpt.data.documents import Text as Text
    from vlcpt.data.documents import Video as Video
    from vlcpt.data.encode.encoder import encode_document as encode_document
    from vlcpt.data.markup import parse_markup as parse_markup
    from vlcpt.data.sources import read_documents as read_documents
    from vlcpt.hub.push import push_adapter as push_adapter
    from vlcpt.model.loading import load_model as load_model
    from vlcpt.model.loading import load_processor as load_processor
    from vlcpt.model.merge import merge_adapter as merge_adapter
    from vlcpt.runs.evaluate import evaluate as evaluate
    from vlcpt.training.trainer import CPTTrainer as CPTTrainer

# Loaded on first use: importing vlcpt, and its --help, must not wait seconds for torch.
_NAMES = {
    "config.schema": ("DataConfig", "ModelConfig"),
    "config.training": ("CPTConfig",),
    "data.collator": ("CPTDataCollator",),
    "data.dataset": ("CPTDataset",),
    "data.documents": ("Document", "DocumentError", "Image", "Source", "Text", "Video"),
    "data.encode.encoder": ("encode_document",),
    "data.markup": ("parse_markup",),
    "data.sources": ("read_documents",),
    "hub.push": ("push_adapter",),
    "model.loading": ("load_model", "load_processor"),
    "model.merge": ("merge_adapter",),
    "runs.evaluate": ("evaluate",),
    "training.trainer": ("CPTTrainer",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlcpt' has no attribute {name!r}")
    value = getattr(import_module(f"vlcpt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

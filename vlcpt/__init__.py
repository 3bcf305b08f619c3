"""Continued pre-training of Qwen2.5-VL on interleaved documents of images, video and text."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlcpt.config.schema import DataConfig, ModelConfig
    from vlcpt.config.training import CPTConfig
    from vlcpt.data.collator import CPTDataCollator
    from vlcpt.data.dataset import CPTDataset
    from vlcpt.data.documents import Document, DocumentError, Image, Source, Text, Video
    from vlcpt.data.encode.encoder import encode_document
    from vlcpt.data.markup import parse_markup
    from vlcpt.data.sources import read_documents
    from vlcpt.hub.push import push_adapter
    from vlcpt.model.loading import load_model, load_processor
    from vlcpt.model.merge import merge_adapter
    from vlcpt.training.trainer import CPTTrainer

# Loaded on first use: importing vlcpt, and its --help, must not wait seconds for torch.
_HOMES = {
    "CPTConfig": "vlcpt.config.training",
    "CPTDataCollator": "vlcpt.data.collator",
    "CPTDataset": "vlcpt.data.dataset",
    "CPTTrainer": "vlcpt.training.trainer",
    "DataConfig": "vlcpt.config.schema",
    "Document": "vlcpt.data.documents",
    "DocumentError": "vlcpt.data.documents",
    "Image": "vlcpt.data.documents",
    "ModelConfig": "vlcpt.config.schema",
    "Source": "vlcpt.data.documents",
    "Text": "vlcpt.data.documents",
    "Video": "vlcpt.data.documents",
    "encode_document": "vlcpt.data.encode.encoder",
    "load_model": "vlcpt.model.loading",
    "load_processor": "vlcpt.model.loading",
    "merge_adapter": "vlcpt.model.merge",
    "parse_markup": "vlcpt.data.markup",
    "push_adapter": "vlcpt.hub.push",
    "read_documents": "vlcpt.data.sources",
}

__all__ = [
    "CPTConfig",
    "CPTDataCollator",
    "CPTDataset",
    "CPTTrainer",
    "DataConfig",
    "Document",
    "DocumentError",
    "Image",
    "ModelConfig",
    "Source",
    "Text",
    "Video",
    "encode_document",
    "load_model",
    "load_processor",
    "merge_adapter",
    "parse_markup",
    "push_adapter",
    "read_documents",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlcpt' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

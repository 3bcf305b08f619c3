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
    from vlcpt.training.trainer import CPTTrainer as CPTTrainer

# Loaded on first use: importing vlcpt, and its --help, must not wait seconds for torch.
_HOMES = {
    "CPTConfig": "config.training",
    "CPTDataCollator": "data.collator",
    "CPTDataset": "data.dataset",
    "CPTTrainer": "training.trainer",
    "DataConfig": "config.schema",
    "Document": "data.documents",
    "DocumentError": "data.documents",
    "Image": "data.documents",
    "ModelConfig": "config.schema",
    "Source": "data.documents",
    "Text": "data.documents",
    "Video": "data.documents",
    "encode_document": "data.encode.encoder",
    "load_model": "model.loading",
    "load_processor": "model.loading",
    "merge_adapter": "model.merge",
    "parse_markup": "data.markup",
    "push_adapter": "hub.push",
    "read_documents": "data.sources",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlcpt' has no attribute {name!r}")
    value = getattr(import_module(f"vlcpt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

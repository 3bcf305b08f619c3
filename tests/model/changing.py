"""What tests of models do to change one: a step of training, other tensors in a file, another base's name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def one_step(model: nn.Module, inputs: Mapping[str, torch.Tensor], lr: float = 0.05) -> float:
    """One step of plain gradient descent on everything that trains; returns the loss."""
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr).step()
    model.zero_grad()
    return loss.item()


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a model gives, with nothing dropped at random."""
    return model.eval()(**inputs).logits


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a safetensors file."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def name_base(adapter: Path, name: str) -> None:
    """Write another base model's name into an adapter's configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))

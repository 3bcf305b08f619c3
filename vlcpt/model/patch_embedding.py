"""The patch embedding: a convolution whose windows do not overlap, or the linear layer that is equal to it.

The published models embed a patch with ``Conv3d``. Its kernel is as large as the patch, so that it is one
product of matrices; with some releases of cuDNN it runs 10 to 50,000 times slower than that product
(transformers#45750, pytorch#174051). So both are measured on a GPU, and the faster one runs.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv3d, linear

from vlcpt.model.timing import GAIN, median_seconds

Form = Literal["conv", "linear"]

_PATCHES = 2048  # measured at once: an image of a megapixel has 2.5 times as many


class Timing(NamedTuple):
    """Seconds of a call, forward and, where the weight trains, backward."""

    conv: float
    linear: float

    @property
    def faster(self) -> Form:
        """The form that is to run."""
        return "linear" if self.conv > GAIN * self.linear else "conv"


class Choice(NamedTuple):
    """The form that is to run, and what to say of it; empty where there was nothing to choose."""

    form: Form
    reason: str


def choose_form(
    model: nn.Module, wanted: Literal["auto", "conv", "linear"], device: torch.device, dtype: torch.dtype
) -> Choice:
    """The form in which a model is to embed patches: the wanted one, or for ``auto`` the faster on a GPU.

    Args:
        model: With or without adapters, wrapped or not; it is not called.
        wanted: ``auto`` measures nothing on a CPU, and leaves the convolution there.
        device: That of the run.
        dtype: In which the run computes.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> choose_form(load_base(base_path()), "auto", torch.device("cpu"), torch.float32)
        Choice(form='conv', reason='')
    """
    layer = next((one for one in model.modules() if is_patchwise(one)), None)
    if layer is None:
        return Choice("conv", "")
    if wanted != "auto":
        return Choice(wanted, f"patch embedding: {wanted}, as configured")
    if device.type != "cuda":
        return Choice("conv", "")
    assert isinstance(layer, nn.Conv3d)
    # Not its weight, which ZeRO-3 may have partitioned.
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    found = measure(device, dtype, shape, trains=layer.weight.requires_grad)
    return Choice(
        found.faster,
        f"patch embedding: {found.faster}; {_PATCHES:,} patches take {found.conv * 1e3:.3g} ms as Conv3d and "
        f"{found.linear * 1e3:.3g} ms as the equal linear layer here",
    )


def embed_patches(model: nn.Module, form: Form) -> None:
    """Have a model embed patches in a form, for as long as it is in memory. Nothing of it is saved.

    The layer stays what it is, with its weight, its hooks and its name, so that adapters and engines find
    it; only what it computes with them is another product.

    Example:
        >>> from vlcpt.demo import base_path
        >>> from vlcpt.model.loading import load_base
        >>> model = load_base(base_path())
        >>> before = list(model.state_dict())
        >>> embed_patches(model, "linear")
        >>> list(model.state_dict()) == before
        True
    """
    for layer in model.modules():
        if not is_patchwise(layer):
            continue
        if form == "linear":
            # A bound method: a copy of the model then uses its own weight.
            vars(layer)["forward"] = MethodType(_as_linear, layer)
        elif getattr(vars(layer).get("forward"), "__func__", None) is _as_linear:
            del vars(layer)["forward"]


def is_patchwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution that sees each place once, so that it is linear in whole patches.

    Example:
        >>> is_patchwise(nn.Conv3d(3, 8, (2, 14, 14), stride=(2, 14, 14))), is_patchwise(nn.Conv3d(3, 8, 2))
        (True, False)
    """
    # An adapter's wrapper, or a subclass that computes something else, is left alone.
    return (
        type(module) is nn.Conv3d
        and module.stride == module.kernel_size
        and set(module.padding) == {0}
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def _as_linear(layer: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """What the layer makes of patches (P, channels, *kernel): (P, width, 1, 1, 1)."""
    if patches.shape[2:] != layer.kernel_size:  # no patches: a picture, which it would slide over
        return nn.Conv3d.forward(layer, patches)
    found = linear(patches.flatten(1), layer.weight.flatten(1), layer.bias)
    return found.unflatten(1, (-1, 1, 1, 1))


@cache
def measure(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    trains: bool,
    patches: int = _PATCHES,
) -> Timing:
    """The time of both forms on random patches; measured once a process.

    Args:
        dtype: In which the run computes.
        shape: That of the weight: width, channels, frames, height, width of a patch.
        trains: Whether the weight has a gradient.
        patches: How many are embedded at once.
    """
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    weight = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(trains)
    inputs = torch.randn((patches, *shape[1:]), generator=generator).to(device, dtype)
    stride = list(shape[2:])

    def embed(form: Form) -> None:
        if form == "conv":
            out = conv3d(inputs, weight, stride=stride)
        else:
            out = linear(inputs.flatten(1), weight.flatten(1))
        if trains:
            torch.autograd.grad(out.sum(), weight)

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        return Timing(
            linear=median_seconds(lambda: embed("linear"), device),
            conv=median_seconds(lambda: embed("conv"), device),
        )

"""Colour augmentation: brightness, contrast, saturation, hue and channel order as one matrix product an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backbones.compiled import call, library

SOURCE = Path(__file__).with_name("colour.cpp")
GREY = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device="cpu")
"""RGB's share in luma (ITU-R BT.601); on the CPU even if first imported under another default device."""


@dataclass(frozen=True)
class Photometric:
    """SSD's photometric distortion; the default strengths are SSD's.

    Args:
        p: probability of each of the four changes.
        brightness: factor drawn from 1 +- this, in [0, 1].
        contrast: factor about the image's mean grey, drawn from 1 +- this, in [0, 1].
        saturation: factor about each pixel's grey, drawn from 1 +- this, in [0, 1].
        hue: turn of the colour circle, drawn from +- this, in [0, 0.5].
        permute: probability of shuffling the channels.
    Source: SSD's published training code; torchvision.transforms.v2.RandomPhotometricDistort is a port.
    Differs: every change is linear, so all are one 3x3 matrix and one clamp at the end, far cheaper than four passes.
        Hue turns RGB about its grey axis: HSV's turn, but the mean of R, G, B stays rather than the greatest of them.
        Channels keep their order unless asked: in many data sets the colour is the class.
    """

    p: float = 0.5
    brightness: float = 0.125
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.05
    permute: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (
            ("p", 1),
            ("brightness", 1),
            ("contrast", 1),
            ("saturation", 1),
            ("hue", 0.5),
            ("permute", 1),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"augment.photometric.{name} is {getattr(self, name)}; expected 0 to {most}")

    def __call__(self, image: Tensor) -> Tensor:
        """A changed copy of an image [3, H, W] uint8, or the image itself if nothing was drawn."""
        draw = torch.rand(10).tolist()
        on = [chance < self.p for chance in draw[:4]]
        shuffle = draw[4] < self.permute
        if not (any(on) or shuffle):
            return image
        amounts = (self.brightness, self.contrast, self.saturation, self.hue)
        brightness, contrast, saturation, hue = (
            amount * (2 * u - 1) if chosen else 0.0 for amount, u, chosen in zip(amounts, draw[5:9], on, strict=True)
        )
        mean = channel_means(image)
        matrix = torch.eye(3, dtype=torch.float64) * (1 + brightness)
        colour = hue_matrix(hue) @ saturation_matrix(1 + saturation)
        if draw[9] < 0.5:  # contrast before colour or after it: SSD draws the order
            matrix = colour @ matrix
            colour = torch.eye(3, dtype=torch.float64)
        offset = -contrast * (GREY @ matrix @ mean) * torch.ones(3, dtype=torch.float64)
        matrix, offset = colour @ matrix * (1 + contrast), colour @ offset
        if shuffle:
            order = torch.randperm(3)
            matrix, offset = matrix[order], offset[order]
        return mapped(image, torch.cat((matrix, offset[:, None]), dim=1).float())


def channel_means(image: Tensor) -> Tensor:
    """[3] float64, of an image [3, H, W] uint8."""
    if (compiled := library(SOURCE)[0]) is None or not is_flat(image):
        return image.reshape(3, -1).float().mean(1).double()
    pixels = image[0].numel()
    sums = torch.empty(3, dtype=torch.float64)
    call(compiled, "sums", image, pixels, image.stride(0), image.stride(2), sums)
    return sums.div_(pixels)


def mapped(image: Tensor, matrix: Tensor) -> Tensor:
    """Each pixel by an affine map.

    Args:
        image: [3, H, W] uint8.
        matrix: [3, 4] float32, applied to (R, G, B, 1) in 0 ... 255.
    Returns:
        [3, H, W] uint8, rounded and held to 0 ... 255.
    """
    if (compiled := library(SOURCE)[0]) is None or not is_flat(image):
        flat = image.reshape(3, -1).float()
        changed = torch.addmm(matrix[:, 3:] + 0.5, matrix[:, :3], flat)  # + 0.5: the cast below truncates
        return changed.clamp_(0, 255).to(torch.uint8).view(image.shape)
    out = torch.empty(image.shape, dtype=torch.uint8)
    call(compiled, "change", image, image[0].numel(), image.stride(0), image.stride(2), matrix.contiguous(), out)
    return out


def is_flat(image: Tensor) -> bool:
    """Whether one step leads from every pixel to the next, also from row to row."""
    return image.device.type == "cpu" and image.stride(1) == image.shape[2] * image.stride(2)


def saturation_matrix(factor: float) -> Tensor:
    """[3, 3] float64: scales RGB's distance from grey."""
    return factor * torch.eye(3, dtype=torch.float64) + (1 - factor) * GREY.expand(3, 3)


def hue_matrix(turn: float) -> Tensor:
    """[3, 3] float64: turns RGB about the grey axis.

    Args:
        turn: share of a full circle; positive goes from red towards green, as in HSV.
    """
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    across = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)  # cross product with (1, 1, 1)
    return cos * torch.eye(3, dtype=torch.float64) + (1 - cos) / 3 + sin / math.sqrt(3) * across

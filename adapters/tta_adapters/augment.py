"""Random views of a batch of images, as pure functions of recorded uniform numbers.

One draw of colour and geometry serves the whole batch, as in the published transforms. Their random order of colour
changes is fixed here (brightness, contrast, saturation, hue, gamma), because a compiled graph has one order. Padding,
the affine map and the crop are one sampling of the image with its border continued, which is the same picture:
neither reaches beyond the padding.

Source: Wang et al., Continual Test-Time Domain Adaptation, CVPR 2022, section 3.2 and its public transforms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma
PARAMETERS = 11
"""Uniform numbers that one view takes, noise not counted."""
BLUR_TAPS = 5


@dataclass(frozen=True)
class Views:
    """Ranges of a family of views.

    Attributes:
        brightness, contrast, saturation, gamma: factors are uniform over [first, second].
        hue: turns of the colour circle, at most so many to either side.
        degrees: rotation to either side.
        shift: fraction of the padded width (twice the image's) to either side.
        scale: factors are uniform over [first, second].
        blur: standard deviation of a Gaussian of five taps, in pixels, uniform over [first, second]; None for none.
        noise: standard deviation of noise; 0 for none.
        reflect: whether the image is continued by reflection, else by its border.
    """

    brightness: tuple[float, float] = (0.6, 1.4)
    contrast: tuple[float, float] = (0.7, 1.3)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 0.06
    gamma: tuple[float, float] = (0.7, 1.3)
    degrees: float = 15.0
    shift: float = 1 / 16
    scale: tuple[float, float] = (0.9, 1.1)
    blur: tuple[float, float] | None = (0.001, 0.5)
    noise: float = 0.005
    reflect: bool = False


COTTA = Views()
ROID = Views(blur=None, noise=0.0, reflect=True)


def augment(x: Tensor, u: Tensor, views: Views, normal: Tensor | None = None) -> Tensor:
    """One random view of every image.

    Args:
        x: [batch, 1 or 3, height, width] in 0..1; values beyond are clipped.
        u: [PARAMETERS] uniform in [0, 1).
        views: the family.
        normal: [channels, height, width] standard normal, where the family has noise.

    Returns:
        Like x, in 0..1.
    """
    x = x.clamp(0.0, 1.0)
    x = (x * between(u[0], views.brightness)).clamp(0.0, 1.0)
    x = _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), between(u[1], views.contrast))
    if x.shape[1] == 3:
        x = _blend(x, _grey(x), between(u[2], views.saturation))
        x = shift_hue(x, between(u[3], (-views.hue, views.hue)))
    x = x.clamp(1e-8, 1.0) ** between(u[4], views.gamma)
    x = affine(
        x,
        between(u[5], (-views.degrees, views.degrees)) * (math.pi / 180),
        2 * between(u[6], (-views.shift, views.shift)) * x.shape[3],
        2 * between(u[7], (-views.shift, views.shift)) * x.shape[2],
        between(u[8], views.scale),
        margin=0 if views.blur is None else BLUR_TAPS // 2,
        reflect=views.reflect,
    )
    if views.blur is not None:
        x = blur(x, between(u[9], views.blur))
    x = torch.where(u[10] < 0.5, x.flip(3), x)
    if views.noise:
        if normal is None:
            raise ValueError("this family of views has noise: give a normal field")
        x = x + views.noise * normal
    return x.clamp(0.0, 1.0)


def image_shape(who: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one input, [channels, height, width], where views can be made of it.

    Args:
        who: wants them, with the verb: "rotta keeps".
        shape: of one input; None where it is not known.

    Raises:
        ValueError: the input is no image of 1 or 3 channels.
    """
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{who} images of 1 or 3 channels, the input is {shape}")
    return tuple(shape)


def uniforms_for(views: int, image: tuple[int, ...]) -> int:
    """How many uniform numbers :func:`random_views` takes for views of images [channels, height, width]."""
    return views * PARAMETERS + 2 * math.prod(image) if views else 0


def random_views(x: Tensor, u: Tensor, views: int, family: Views = COTTA) -> Iterator[Tensor]:
    """Several random views of a batch; their noise is one field, shifted from view to view.

    Args:
        x: [batch, 1 or 3, height, width] in 0..1.
        u: [:func:`uniforms_for`] uniform in [0, 1).
        views: how many.
        family: of the views.

    Yields:
        Like x, in 0..1.
    """
    draws = views * PARAMETERS
    field = normal_field(u[draws:], tuple(x.shape[1:])) if views else None
    for k in range(views):
        shifted = None if field is None else field.roll((3 * k, 7 * k), dims=(1, 2))
        yield augment(x, u[k * PARAMETERS : (k + 1) * PARAMETERS], family, shifted)


def between(u: Tensor, limits: tuple[float, float]) -> Tensor:
    """A uniform number [0, 1) stretched over an interval."""
    return limits[0] + (limits[1] - limits[0]) * u


def normal_field(u: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers from uniform ones.

    Args:
        u: [2 * product(shape)] uniform in [0, 1).
        shape: of the result.

    Source: Box and Muller, A note on the generation of random normal deviates, 1958.
    """
    first, second = u[: len(u) // 2], u[len(u) // 2 :]
    # 1 - u lies in (0, 1]: its logarithm is finite.
    radius = torch.sqrt(-2 * torch.log(1 - first))
    return (radius * torch.cos(2 * math.pi * second)).reshape(shape)


def _grey(x: Tensor) -> Tensor:
    """[batch, 1, height, width]."""
    if x.shape[1] == 1:
        return x
    return GREY[0] * x[:, 0:1] + GREY[1] * x[:, 1:2] + GREY[2] * x[:, 2:3]


def _blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (share * x + (1 - share) * other).clamp(0.0, 1.0)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Colours turned on the hue circle.

    Args:
        x: [batch, 3, height, width] in 0..1.
        turns: 0-d, from -0.5 to 0.5.

    Source: Smith, Color gamut transform pairs, SIGGRAPH 1978 (the hexcone model).
    """
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    ones = torch.ones_like(value)
    some = torch.where(chroma == 0, ones, chroma)
    saturation = chroma / torch.where(value == 0, ones, value)
    from_red, from_green, from_blue = (value - red) / some, (value - green) / some, (value - blue) / some
    hue = torch.where(
        red == value,
        from_blue - from_green,
        torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red),
    )
    hue = hue / 6 + 1 + turns
    hue = hue - torch.floor(hue)
    # With the sector's triangle wave each channel is value * (1 - saturation * clipped distance).
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = offset + 6 * hue
        k = k - 6 * torch.floor(k / 6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=1)


def affine(
    x: Tensor,
    angle: Tensor,
    right: Tensor,
    down: Tensor,
    scale: Tensor,
    *,
    margin: int = 0,
    reflect: bool = False,
) -> Tensor:
    """The image rotated and scaled about its centre, then moved, sampled bilinearly between pixel centres.

    Args:
        x: [batch, channels, height, width].
        angle: 0-d, radians, clockwise.
        right: 0-d, pixels.
        down: 0-d, pixels.
        scale: 0-d, above 0.
        margin: pixels to give beyond each edge.
        reflect: continue the image by reflection; else by its border.

    Returns:
        [batch, channels, height + 2 margin, width + 2 margin].
    """
    height, width = x.shape[2], x.shape[3]
    columns = torch.arange(-margin, width + margin, dtype=x.dtype) - (width - 1) / 2
    rows = torch.arange(-margin, height + margin, dtype=x.dtype) - (height - 1) / 2
    across = columns[None, :] - right + torch.zeros_like(rows)[:, None]
    along = rows[:, None] - down + torch.zeros_like(columns)[None, :]
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    source_x = (cosine * across + sine * along) * (2 / (width - 1))
    source_y = (cosine * along - sine * across) * (2 / (height - 1))
    grid = torch.stack([source_x, source_y], dim=-1)
    return F.grid_sample(
        x,
        grid.expand(x.shape[0], -1, -1, -1),
        mode="bilinear",
        padding_mode="reflection" if reflect else "border",
        align_corners=True,
    )


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian of five taps along rows and columns.

    Args:
        x: [batch, channels, height + 4, width + 4].
        sigma: 0-d, in pixels, above 0.

    Returns:
        [batch, channels, height, width].
    """
    reach = BLUR_TAPS // 2
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = taps / taps.sum()
    height, width = x.shape[2] - 2 * reach, x.shape[3] - 2 * reach
    x = sum_of([taps[k] * x[:, :, k : k + height] for k in range(BLUR_TAPS)])
    return sum_of([taps[k] * x[..., k : k + width] for k in range(BLUR_TAPS)])


def sum_of(terms: list[Tensor]) -> Tensor:
    """The sum, added from left to right."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

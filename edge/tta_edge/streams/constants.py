"""Strength of each corruption at severities 1 to 5, for three sizes of image.

`cifar` (32x32) and `imagenet` (224x224) are the constants of the published benchmarks CIFAR-10-C and
ImageNet-C (Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019, https://arxiv.org/abs/1903.12261).

`digits` (up to 16x16) is **our own** ladder, and figures on digits are not comparable with figures on
CIFAR-10-C. At 8x8 a stroke is one pixel wide, its contrast is full and there is no texture: some published
constants would do nothing there (JPEG at quality 40), others would leave nothing (motion blur over 19
pixels). The ladder follows the published one where it can, takes the stronger ImageNet end for noise,
brightness and JPEG, and shorter reaches for motion, zoom and snow. Severity 1 is mild, severity 5 hard but
mostly readable by a person. Two exceptions that the size forces: glass_blur moves a pixel by at least one,
which is much even at severity 1, and pixelate has only the sizes 7, 6 and 5 to go through.

The meaning of each tuple stands with the recipe (noise.py, blur.py, weather.py, digital.py).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

ConstantSet = Literal["cifar", "imagenet", "digits"]
Constant: TypeAlias = "float | tuple[float, ...]"
Ladder: TypeAlias = tuple[Constant, Constant, Constant, Constant, Constant]

LARGEST_DIGIT = 16
LARGEST_SMALL_IMAGE = 95
"""Shorter side up to which an image counts as CIFAR-like (CIFAR 32, Tiny ImageNet 64); larger ones are
ImageNet-like.
"""


def constants_for(height: int, width: int) -> ConstantSet:
    """The set that fits an image of this size in pixels."""
    side = min(height, width)
    if side <= LARGEST_DIGIT:
        return "digits"
    return "cifar" if side <= LARGEST_SMALL_IMAGE else "imagenet"


CONSTANTS: dict[str, dict[ConstantSet, Ladder]] = {
    "gaussian_noise": {
        "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
        "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
        "digits": (0.10, 0.15, 0.20, 0.25, 0.30),
    },
    "shot_noise": {
        "cifar": (500, 250, 100, 75, 50),
        "imagenet": (60, 25, 12, 5, 3),
        "digits": (60, 25, 12, 5, 3),
    },
    "impulse_noise": {
        "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
        "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
        "digits": (0.03, 0.06, 0.09, 0.12, 0.15),
    },
    "speckle_noise": {
        "cifar": (0.06, 0.1, 0.12, 0.16, 0.2),
        "imagenet": (0.15, 0.2, 0.35, 0.45, 0.6),
        "digits": (0.15, 0.2, 0.35, 0.45, 0.6),
    },
    "defocus_blur": {
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "digits": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
    "glass_blur": {
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "digits": ((0.3, 1, 1), (0.35, 1, 1), (0.4, 1, 1), (0.5, 1, 1), (0.6, 1, 1)),
    },
    "motion_blur": {
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "digits": ((2, 0.5), (2, 0.75), (2, 1), (3, 1.25), (3, 1.5)),
    },
    "zoom_blur": {
        "cifar": ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
        "imagenet": ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
        "digits": ((0.02, 7), (0.02, 12), (0.02, 16), (0.02, 21), (0.02, 26)),
    },
    "gaussian_blur": {
        "cifar": (0.4, 0.6, 0.7, 0.8, 1),
        "imagenet": (1, 2, 3, 4, 6),
        "digits": (0.4, 0.6, 0.7, 0.8, 1),
    },
    "snow": {
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "digits": (
            (0.1, 0.2, 1, 0.6, 2, 0.75, 0.95),
            (0.1, 0.2, 1, 0.5, 2, 0.75, 0.9),
            (0.15, 0.25, 1, 0.55, 2, 1, 0.9),
            (0.2, 0.3, 1, 0.55, 2, 1, 0.85),
            (0.25, 0.35, 1, 0.6, 3, 1.5, 0.8),
        ),
    },
    "frost": {
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "digits": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    },
    "fog": {
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "digits": ((0.2, 3), (0.5, 3), (0.75, 3), (1, 2.5), (1.5, 2.5)),
    },
    "brightness": {
        "cifar": (0.05, 0.1, 0.15, 0.2, 0.3),
        "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
        "digits": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    "saturate": {
        "cifar": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        "imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        "digits": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
    "contrast": {
        "cifar": (0.75, 0.5, 0.4, 0.3, 0.15),
        "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
        "digits": (0.75, 0.5, 0.4, 0.3, 0.15),
    },
    "elastic_transform": {
        "cifar": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "imagenet": (
            (2, 0.7, 0.1),
            (2, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        ),
        "digits": ((0, 0, 0.03), (0.05, 0.2, 0.05), (0.06, 0.2, 0.06), (0.08, 0.15, 0.07), (0.1, 0.1, 0.08)),
    },
    "pixelate": {
        "cifar": (0.95, 0.9, 0.85, 0.75, 0.65),
        "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
        "digits": (0.875, 0.875, 0.75, 0.75, 0.625),
    },
    "jpeg_compression": {
        "cifar": (80, 65, 58, 50, 40),
        "imagenet": (25, 18, 15, 10, 7),
        "digits": (25, 18, 15, 10, 7),
    },
}
CONSTANTS["frost_procedural"] = CONSTANTS["frost"]

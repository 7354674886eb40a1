"""Flags of what each photo adds to the picture: where it was taken from, its blur and its colors."""

from dataclasses import dataclass

from arguments.flag import arg

BLURS = ("none", "motion", "defocus", "kernel")
PATHS = ("linear", "spline")
SPACES = ("srgb", "linear")
APPEARANCES = ("none", "exposure", "ppisp", "bilateral")


@dataclass
class PhotoParams:
    """Poses, blur and colors of the photos (stored with the model)"""

    poses: bool = arg(False, "refine where the train photos were taken from")
    pose_lr_init: float = arg(
        0.5, "first rate of poses and camera paths: pixels that a visit moves the photo", minimum=0
    )
    pose_lr_final: float = arg(0.005, "the same at the end", minimum=0)
    pose_from_iter: int = arg(500, "poses move after this step", minimum=0)
    blur_from_iter: int = arg(
        2000, "photos are taken as sharp up to this step: blur explains early errors, too", minimum=0
    )
    blur: str = arg(
        "none",
        "what blurs the train photos, so that the model is sharp (docs/deblurring.md)",
        choices=BLURS,
    )
    blur_samples: int = arg(10, "pictures that a blurred one is made of", minimum=2, maximum=1000)
    blur_path: str = arg(
        "linear", "motion: straight between two poses, or a cubic B-spline of four", choices=PATHS
    )
    blur_weights: bool = arg(
        False, "motion: learn how much of the light came from each part of the path, too"
    )
    blur_space: str = arg(
        "srgb", "numbers that are averaged: those of the photos, or of the light", choices=SPACES
    )
    appearance: str = arg(
        "none",
        "colors that each photo has of its own: an affine transform; a camera's exposure, vignetting and "
        "white balance; a grid of transforms over the picture",
        choices=APPEARANCES,
    )

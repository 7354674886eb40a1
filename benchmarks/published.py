"""Data sets of the field, how their scenes are trained, and the scores that were published for them."""

from typing import NamedTuple


class DataSet(NamedTuple):
    title: str
    scenes: dict[str, str]  # folder -> flags of train.py
    views: str  # which views the published scores are of


def alike(names: str, flags: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), flags)


SETS = {
    "mipnerf360": DataSet(
        "Mip-NeRF 360",
        alike("bicycle flowers garden stump treehill", "-i images_4")  # outdoors
        | alike("room counter kitchen bonsai", "-i images_2"),
        "every 8th view, the official smaller JPEG files",
    ),
    "tanksandtemples": DataSet("Tanks and Temples", alike("truck train", ""), "every 8th view"),
    "deepblending": DataSet("Deep Blending", alike("drjohnson playroom", ""), "every 8th view"),
    "nerfsynthetic": DataSet(
        "NeRF-Synthetic",
        alike("chair drums ficus hotdog lego materials mic ship", "-w"),
        "all 200 test views, 800x800",
    ),
    "llff": DataSet(
        "LLFF",
        alike("fern flower fortress horns leaves orchids room trex", "-i images_4"),
        "every 8th view, 1008x756",
    ),
}

Published = tuple[float, float | None, float | None]  # PSNR, SSIM, LPIPS (VGG)

# (data set, scene or "mean", method) -> scores, as nerfbaselines lists them. Gaussians: Kerbl et al. 2023
# after 30,000 iterations. NeRF: Mildenhall et al. 2020.
PUBLISHED: dict[tuple[str, str, str], Published] = {
    ("mipnerf360", "bicycle", "gaussians"): (25.246, 0.771, 0.205),
    ("mipnerf360", "flowers", "gaussians"): (21.520, 0.605, 0.336),
    ("mipnerf360", "garden", "gaussians"): (27.410, 0.868, 0.103),
    ("mipnerf360", "stump", "gaussians"): (26.550, 0.775, 0.210),
    ("mipnerf360", "treehill", "gaussians"): (22.490, 0.638, 0.317),
    ("mipnerf360", "room", "gaussians"): (30.632, 0.914, 0.220),
    ("mipnerf360", "counter", "gaussians"): (28.700, 0.905, 0.204),
    ("mipnerf360", "kitchen", "gaussians"): (30.317, 0.922, 0.129),
    ("mipnerf360", "bonsai", "gaussians"): (31.980, 0.938, 0.205),
    ("mipnerf360", "mean", "gaussians"): (27.21, 0.815, 0.214),
    ("tanksandtemples", "mean", "gaussians"): (23.14, 0.841, 0.183),
    ("deepblending", "mean", "gaussians"): (29.41, 0.903, 0.243),
    ("nerfsynthetic", "mic", "gaussians"): (35.36, None, None),
    ("nerfsynthetic", "chair", "gaussians"): (35.83, None, None),
    ("nerfsynthetic", "ship", "gaussians"): (30.80, None, None),
    ("nerfsynthetic", "materials", "gaussians"): (30.00, None, None),
    ("nerfsynthetic", "lego", "gaussians"): (35.78, None, None),
    ("nerfsynthetic", "drums", "gaussians"): (26.15, None, None),
    ("nerfsynthetic", "ficus", "gaussians"): (34.87, None, None),
    ("nerfsynthetic", "hotdog", "gaussians"): (37.72, None, None),
    ("nerfsynthetic", "mean", "gaussians"): (33.32, None, None),
    ("nerfsynthetic", "lego", "nerf"): (32.54, 0.961, 0.050),
    ("nerfsynthetic", "mean", "nerf"): (31.00, None, None),
}

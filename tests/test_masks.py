"""Masks: which picture belongs to which photo, and that what does not count has no effect at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diff_gaussian_rasterization import ssim
from PIL import Image

import metrics
import render
import train
from arguments import ModelParams
from scene import Scene
from scene.images import Mask, load_counts, load_image
from scene.lens import undistort
from tests import tiny_scenes
from tests.test_scene import load, ring
from tests.test_undistortion import LENS, make_scene
from training.report import score
from utils.files import DataError
from utils.image import psnr, ssim_where

CPU = torch.device("cpu")
LEFT = np.uint8(np.arange(8) < 4) * np.full((6, 1), 255, np.uint8)  # white on the left half


def add_masks(folder: Path, names, values=LEFT) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / name)
    return folder


# Which mask


@pytest.mark.parametrize("name", ["v{}.png", "v{}.jpg", "v{}.png.png", "images/v{}.png", "images/v{}.jpeg"])
def test_names_of_masks(tmp_path, name):
    folder = ring(tmp_path / "data", count=2)
    add_masks(folder / "masks", [name.format(0), name.format(1)], np.full((6, 8), 255, np.uint8))
    camera = load(folder, masks="masks").train_cameras[0]
    assert (camera.mask() == 1).all()
    assert (load(folder, masks=str(folder / "masks"), invert_masks=True).train_cameras[0].mask() == 0).all()
    assert load(folder).train_cameras[0].mask() is None


def test_mistakes_are_named(tmp_path, capsys):
    folder = ring(tmp_path / "data", count=4)
    with pytest.raises(DataError, match="masks: the folder of masks is not there"):
        load(folder, masks="masks")
    (folder / "masks").mkdir()
    with pytest.raises(
        DataError, match=r"masks: has no mask for any photo; for the first, looked for .*v0.png"
    ):
        load(folder, masks="masks")
    add_masks(folder / "masks", ["v1.png"])
    Scene(ModelParams(source_path=str(folder), model_path="m", masks="masks"), CPU, for_training=False)
    said = capsys.readouterr().out
    assert "Warning: 3 of 4 photos have no mask and count in full: v0.png, v2.png, v3.png" in said
    add_masks(folder / "masks", ["v2.png"], np.zeros_like(LEFT))
    Scene(ModelParams(source_path=str(folder), model_path="m", masks="masks"), CPU)
    assert "Warning: masks leave nothing of 1 train photos: v2.png" in capsys.readouterr().out
    add_masks(folder / "masks", [f"v{i}.png" for i in range(4)], np.zeros_like(LEFT))
    with pytest.raises(DataError, match="nothing of any train photo counts; --invert_masks"):
        load(folder, training=True, masks="masks")
    load(folder, training=True, masks="masks", invert_masks=True)
    add_masks(folder / "masks", ["v0.png"], LEFT.T)
    with pytest.raises(DataError, match=r"v0.png: is 6x8, which is not the shape of its photo .8x6."):
        load(folder, masks="masks")
    (folder / "masks" / "v0.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"v0.png: cannot be read as an image"):
        load(folder, masks="masks")


# What a mask does to pixels


def test_ignore_keep_and_invert(tmp_path):
    folder = ring(tmp_path / "data", count=2)
    add_masks(folder / "masks", ["v0.png", "v1.png"])
    left = torch.tensor([[1.0] * 4 + [0.0] * 4] * 6)
    ignoring = load(folder, masks="masks").train_cameras[1]
    assert (ignoring.image() == 10).all() and (ignoring.mask() == left).all()
    inverted = load(folder, masks="masks", invert_masks=True).train_cameras[1]
    assert (inverted.mask() == 1 - left).all()
    keeping = load(folder, masks="masks", mask_mode="keep", white_background=True).train_cameras[1]
    assert keeping.mask() is None and (keeping.image() == torch.where(left > 0, 10, 255)).all()
    black = load(folder, masks="masks", mask_mode="keep", invert_masks=True).train_cameras[1]
    assert (black.image() == torch.where(left > 0, 0, 10)).all()


def test_masks_of_zeros_and_ones_and_of_other_sizes(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.png")
    Image.fromarray(LEFT // 255).save(tmp_path / "ones.png")
    Image.fromarray(LEFT.repeat(4, 0).repeat(4, 1)).save(tmp_path / "large.png")
    for name in ("ones.png", "large.png"):
        counts = load_counts(tmp_path / "photo.png", (4, 3), None, Mask(tmp_path / name), False)
        assert counts.tolist() == [[1, 1, 0, 0]] * 3


def test_alpha_as_transparency_or_as_mask(tmp_path):
    rgba = np.full((6, 8, 4), 100, np.uint8)
    rgba[..., 3] = LEFT
    folder = ring(tmp_path / "data", count=2)
    Image.fromarray(rgba).save(folder / "images" / "v0.png")
    left = torch.tensor(LEFT) > 0
    shown = load(folder).train_cameras[0]
    assert shown.mask() is None and (shown.image() == torch.where(left, 100, 0)).all()
    masked, opaque = load(folder, alpha="mask").train_cameras
    assert (masked.image() == 100).all() and (masked.mask() == left.float()).all()
    assert (opaque.mask() == 1).all()
    add_masks(folder / "masks", ["v0.png"], 255 - LEFT)  # both: nothing is left
    assert (load(folder, alpha="mask", masks="masks").train_cameras[0].mask() == 0).all()
    keep = Mask(folder / "masks" / "v0.png", inverted=True)
    assert (load_image(folder / "images" / "v0.png", (8, 6), True, cutout=keep)[:, ~left] == 255).all()


def test_masks_are_undistorted_like_their_photo(tmp_path):
    folder = make_scene(tmp_path / "data")
    white = np.uint8(np.arange(160) < 90) * np.full((120, 1), 255, np.uint8)
    add_masks(folder / "masks", ["left/a.png"], white)
    model = ModelParams(source_path=str(folder), model_path=str(tmp_path / "model"), masks="masks")
    [camera] = [c for c in Scene(model, CPU, quiet=True).train_cameras if c.name == "left/a.png"]
    expected = undistort(white[..., None].astype(np.float32), LENS)[..., 0] > 127.5
    np.testing.assert_array_equal(camera.mask(), expected)
    frame = LENS.pinhole()  # the edge, at 90 pixels, is the principal point, which is not distorted
    at_the_axis = camera.mask()[int(frame.cy)].sum()
    assert at_the_axis == pytest.approx(frame.cx, abs=1)


def test_halves_and_masks_together(tmp_path):
    folder = ring(tmp_path / "data")
    add_masks(folder / "masks", [f"v{i}.png" for i in range(9)], LEFT.T[:6, :1].repeat(8, 1))
    scene = load(folder, masks="masks", eval=True, train_test_exp=True)
    held_out = scene.train_cameras[0]
    upper, left = torch.arange(6)[:, None] < 4, torch.arange(8)[None] < 4
    assert held_out.is_test and (held_out.mask() == (upper & left)).all()
    assert (held_out.counts() == (upper & left.logical_or(~left))).all()


# Training


def masked_scene(folder: Path, hidden: str) -> Path:
    """A ring of photos whose middle is hidden by masks, and shows something else in each data set."""
    tiny_scenes.colmap_scene(folder)
    random = np.random.default_rng(0)
    middle = np.zeros((tiny_scenes.HEIGHT, tiny_scenes.WIDTH), bool)
    middle[12:28, 18:40] = True
    (folder / "masks").mkdir()
    for path in sorted((folder / "images").iterdir()):
        photo = np.array(Image.open(path))
        photo[middle] = random.integers(0, 256, (middle.sum(), 3)) if hidden == "noise" else 0
        Image.fromarray(photo).save(path)
        Image.fromarray(np.uint8(~middle) * 255).save(folder / "masks" / path.name)
    tiny_scenes.add_depth_maps(folder)
    for path in (folder / "depths").iterdir():
        depth = np.array(Image.open(path))
        depth[middle] = random.integers(0, 60_000, middle.sum()) if hidden == "noise" else 0
        Image.fromarray(depth).save(path)
    params = {path.stem: {"scale": 0.5, "offset": 0.1} for path in (folder / "depths").iterdir()}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("masked")
    return {hidden: masked_scene(folder / hidden, hidden) for hidden in ("noise", "black")}


def run(folder: Path, model: Path, *options) -> tuple[bytes, dict]:
    """Train; returns the saved model and the summary."""
    command = ["-s", folder, "-m", model, "--eval", "--iterations", 80, "--densify_from_iter", 20]
    command += ["--densify_until_iter", 70, "--densification_interval", 20, "--densify_grad_threshold", 2e-3]
    command += ["--device", "cpu", "--quiet", "--disable_viewer", *options]
    assert train.main(list(map(str, command))) == 0
    cloud = model / "point_cloud" / "iteration_80" / "point_cloud.ply"
    return cloud.read_bytes(), json.loads((model / "summary.json").read_text())


@pytest.mark.parametrize("options", [[], ["--no-fused"], ["-d", "depths"]])
def test_what_is_masked_has_no_effect(scenes, tmp_path, options):
    """Not on L1, SSIM and depth, nor on where Gaussians are added, nor on the scores: the same model, bit by
    bit, and the same numbers."""
    results = {}
    for hidden, folder in scenes.items():
        results[hidden] = run(folder, tmp_path / hidden, "--masks", "masks", *options)
    assert results["noise"][0] == results["black"][0]
    assert results["noise"][1]["gaussians"] > tiny_scenes.BLOBS, "there was something to densify"
    assert results["noise"][1]["scores"] == results["black"][1]["scores"]


def test_without_masks_it_has(scenes, tmp_path):
    counts = {}
    for hidden, folder in scenes.items():
        cloud, summary = run(folder, tmp_path / hidden)
        counts[hidden] = summary["gaussians"]
    assert counts["noise"] != counts["black"]


# Scores


def test_scores_are_of_what_counts():
    truth = torch.full((3, 4, 6), 0.5)
    image, mask = truth.clone(), torch.zeros(4, 6)
    image[:, :, :3], image[0, :, 3:], mask[:, :3] = 0.6, 1.0, 1
    assert psnr(image, truth, mask).item() == pytest.approx(20, abs=1e-4)
    assert score([(image, truth, mask)]).psnr == pytest.approx(20, abs=1e-4)
    assert score([(image, truth, mask)]).l1 == pytest.approx(0.1)
    assert score([(image, truth, mask), (image, truth, mask * 0)]).views == 1, (
        "the second has nothing to score"
    )
    assert score([(image, truth, 1 - mask)]).l1 == pytest.approx(0.5 / 3)


def test_similarity_of_what_counts():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 40, 50, generator=generator)
    image = (truth + 0.2 * torch.randn(3, 40, 50, generator=generator)).clamp(0, 1)
    everything = torch.ones(40, 50)
    assert 0.3 < ssim(image, truth).item() < 0.9
    assert ssim_where(image, truth, everything).item() == pytest.approx(ssim(image, truth).item(), abs=1e-5)
    # Hidden columns are zeros, as those around a picture are: the same as the two parts apart.
    mask = everything.clone()
    mask[:, 20:32] = 0
    parts = [ssim(image[..., part], truth[..., part]).item() for part in (slice(20), slice(32, None))]
    expected = (20 * parts[0] + 18 * parts[1]) / 38
    assert ssim_where(image, truth, mask).item() == pytest.approx(expected, abs=1e-5)


def test_render_and_metrics(scenes, tmp_path):
    """Both data sets score the same, though their photos differ where they are masked."""
    results = []
    for hidden, folder in scenes.items():
        model = tmp_path / hidden
        run(folder, model, "--masks", "masks")
        assert render.main(["-m", str(model), "--device", "cpu", "--quiet"]) == 0
        mask = np.array(Image.open(model / "test" / "ours_80" / "masks" / "00000.png"))
        assert mask[20, 20].tolist() == [0] * 3 and mask[5, 5].tolist() == [255] * 3
        assert metrics.main(["-m", str(model), "--device", "cpu", "--lpips", "none"]) == 0
        results.append(json.loads((model / "per_view.json").read_text())["ours_80"])
    assert results[0] == results[1]
    trained = json.loads((tmp_path / "noise" / "summary.json").read_text())["scores"]["test"]["80"]["psnr"]
    assert np.mean(list(results[0]["PSNR"].values())) == pytest.approx(trained, abs=0.1)
    # Rendered again without masks, none is left behind.
    assert render.main(["-m", str(model), "--device", "cpu", "--quiet", "--masks", ""]) == 0
    assert not list((model / "test" / "ours_80" / "masks").glob("*.png"))

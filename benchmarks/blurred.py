"""Renders of a trained model as data sets: sharp, and with a motion blur whose truth is known.

    python benchmarks/blurred.py -m output/fox --to data/fox_renders --pixels 3
    python train.py -s data/fox_renders/blurred -m output/fox_blurred --eval --blur motion

FOLDER/sharp has a render for each photo of the model's data set, with the same test views. In FOLDER/blurred,
each train view is the mean of --samples renders along a straight path: from minus to plus a random shift and
turn, of which each axis moves the picture by up to --pixels. true_poses.json says where the camera was.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import ModelParams, PipelineParams, build, number, pick_device, saved_options  # noqa: E402
from arguments.flag import LAST_SEED  # noqa: E402
from per_view import Shown  # noqa: E402
from per_view.motion import pixels  # noqa: E402
from per_view.per_photo import seen  # noqa: E402
from per_view.poses import places  # noqa: E402
from sample_scene.dataset import Points, View, write_colmap  # noqa: E402
from sample_scene.tracer import Camera as Pinhole  # noqa: E402
from scene import Camera, Scene  # noqa: E402
from training import method  # noqa: E402
from utils.image import to_uint8  # noqa: E402
from utils.rigid import se3_exp  # noqa: E402


def load(model_path: str, device: torch.device) -> tuple[Shown, Scene]:
    groups = (ModelParams, PipelineParams)
    model, pipe = build(groups, saved_options(model_path, groups))
    model.model_path = model_path
    scene = Scene(model, device, for_training=False, quiet=True)
    shown, _ = method.load(model, pipe, -1, scene.background)
    shown.sharp = True
    return shown, scene


def paths(scene: Scene, farthest: float, samples: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Motions [samples, 4, 4] for each train photo, by name; and how long they are in pixels, on average."""
    known, random = seen(scene), torch.Generator().manual_seed(seed)
    ends = farthest * (2 * torch.rand(len(known.K), 6, generator=random) - 1).to(known.K.device) * known.units
    steps = torch.linspace(-1, 1, samples, device=ends.device)
    motions = se3_exp(steps[:, None] * ends[:, None])
    lengths = pixels(motions, known.K, known.inverse_depths)
    return dict(zip(dict.fromkeys(scene.exposure_names), motions)), lengths.mean().item()


@torch.no_grad()
def view(number: int, camera: Camera, shown: Shown, motions: Tensor | None) -> View:
    """Sharp without motions."""
    seen_from = [camera] if motions is None else places(camera, motions)
    image = torch.stack([shown.picture(place).image.clamp(0, 1) for place in seen_from]).mean(0)
    K, matrix = (part.double().cpu().numpy() for part in (camera.K, camera.world_to_camera))
    pinhole = Pinhole(f"{number:04d}", camera.width, camera.height, K, matrix)
    blank = np.zeros((camera.height, camera.width), np.float32)
    truth = {} if motions is None else {"exposed_from": (motions @ camera.world_to_camera).tolist()}
    picture = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return View(pinhole, picture, blank, blank == 0, np.eye(3, 4), camera.is_test, truth)


def write(folder: Path, scene: Scene, shown: Shown, motions: dict[str, Tensor]) -> None:
    cameras = [*scene.train_cameras, *scene.test_cameras]
    views = [
        view(k, camera, shown, None if camera.is_test else motions.get(camera.name))
        for k, camera in enumerate(cameras)
    ]
    xyz, rgb = scene.points.xyz, np.uint8(255 * np.clip(scene.points.rgb, 0, 1))
    nothing = np.zeros(0, int), np.zeros((0, 2))
    write_colmap(folder, views, Points(np.asarray(xyz, float), rgb, [nothing] * len(views)))
    test = [f"{view.camera.name}.png" for view in views if view.is_test]
    (folder / "sparse" / "0" / "test.txt").write_text("".join(f"{name}\n" for name in test))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model_path", required=True)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pixels", type=number(float, 0, 100), default=3.0)
    parser.add_argument("--samples", type=number(int, 2, 1000), default=7)
    parser.add_argument("--seed", type=number(int, 0, LAST_SEED), default=0)
    parser.add_argument("--device", default="", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    shown, scene = load(args.model_path, pick_device(args.device))
    motions, length = paths(scene, args.pixels, args.samples, args.seed)
    write(args.to / "sharp", scene, shown, {})
    write(args.to / "blurred", scene, shown, motions)
    print(f"{args.to}: paths of {length:.2f} pixels on average")


if __name__ == "__main__":
    main()

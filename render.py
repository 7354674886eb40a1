"""Render the train and test views of a trained model as PNG files.

    python render.py -m output/x
    python render.py --ply model.ply -s dataset

Writes <model>/{train,test}/ours_<iteration>/{renders,gt}/00000.png and so on, in the order of the image
names, and beside them names.json: which photo each file shows, and seconds.json: the median of the times that
views took. Where photos do not count everywhere there are masks/, too. --outputs depth normals alpha adds
folders of that name; depth/levels.json says which distance a level of those 16-bit pictures stands for. The
options of the run are read from the model folder.

With --refine_test_poses or --align_test_poses, test views go to ours_<iteration>_refined or _aligned, with
--fit_test_colors to ours_<iteration>_colors (both: _refined_colors), and train views of --views sharp to
ours_<iteration>_sharp; metrics.py scores each of them under that name.

Pictures of another data set (-s) go to <model>/on_<data set>/{train,test}/..., those of a file (--ply) to
<model>/<file>_on_<data set>/{train,test}/<file>, or to output/<file>_on_<data set>/... without -m. Such a
folder has a config.json that says what was rendered, and metrics.py -m takes it as it takes a model.

    python render.py -m output/x --path orbit --to orbit.mp4 --outputs rgb depth

is a film of the model along a path, for which no photos are needed.
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from arguments import (
    ModelParams,
    PipelineParams,
    RenderParams,
    parse_render,
    pick_device,
    saved_options,
)
from gaussian_renderer import Splats, outputs
from per_view import Pair, Shown, held_out
from scene import Camera, Scene
from scene.folder import ModelFolder
from scene.frame import Similarity
from scene.readers import read_dataset
from training import method, trainer
from utils import commands
from utils.files import write_json
from utils.image import PngWriter, write_png
from utils.terminal import progress, say
from viewer import film

SAME_PLACE = 1e-4  # cameras closer than this, relative to their coordinates, are the same one


def render_sets(model: ModelParams, pipe: PipelineParams, options: RenderParams) -> None:
    device = pick_device(options.device)
    background = torch.full((3,), 1.0 if model.white_background else 0.0, device=device)
    shown, title = _load(model, pipe, options, background)
    place = _place(model, options.ply)
    if place.path != Path(model.model_path):
        _describe(place, model, pipe, options.ply, shown)
    scene = Scene(replace(model, model_path=str(place)), device, for_training=False, quiet=options.quiet)
    test, how = _test_cameras(shown, scene, options)
    shown.sharp, shown.fits_colors = options.views == "sharp", options.fit_test_colors
    how += "_colors" * shown.fits_colors
    for name, cameras, skip, fitted in [
        ("train", scene.train_cameras, options.skip_train, "_sharp" if shown.sharp else ""),
        ("test", test, options.skip_test, how),
    ]:
        if not cameras and not skip and not options.quiet:
            say(f"There are no {name} views" + (" (--eval holds some out)" if name == "test" else ""))
        if cameras and not skip:
            _render_set(place.path / name / f"{title}{fitted}", name, cameras, shown, options)
    is_scored = scene.test_cameras and not options.skip_test
    if place.path != Path(model.model_path) and is_scored and not options.quiet:
        say(f"To score the test views: python metrics.py -m {shlex.quote(str(place))}")


def render_film(model: ModelParams, pipe: PipelineParams, options: RenderParams) -> None:
    background = torch.full((3,), 1.0 if model.white_background else 0.0, device=pick_device(options.device))

    def load(iteration: int) -> Shown:
        return _load(model, pipe, replace(options, iteration=iteration), background)[0]

    film.make(model, options, load, background)


def _test_cameras(shown: Shown, scene: Scene, options: RenderParams) -> tuple[list[Camera], str]:
    """From where the test views are shown, and what that adds to the name of their folder."""
    cameras, move = scene.test_cameras, options.align_test_poses or options.refine_test_poses
    if options.skip_test or not move:
        return cameras, ""
    cameras = held_out.aligned(shown, scene.train_cameras, cameras)
    if not options.refine_test_poses:
        return cameras, "_aligned"
    bar = progress(cameras, desc="Refining test poses", disable=options.quiet)
    return [held_out.refined(shown, camera) for camera in bar], "_refined"


def _load(
    model: ModelParams, pipe: PipelineParams, options: RenderParams, background: Tensor
) -> tuple[Shown, str]:
    """The model, and the name of its folder of pictures."""
    if not options.ply:
        shown, iteration = method.load(model, pipe, options.iteration, background)
        return shown, f"ours_{iteration}"
    ply = Path(options.ply)
    shown = trainer.load_file(ply, model, pipe, background)
    trained_so = isinstance(shown.scene, Splats) and shown.scene.gaussians.antialiased
    if trained_so and not pipe.antialiasing and not options.quiet:
        say(f"Warning: {ply} was trained with --antialiasing: render it with that flag, too")
    return shown, ply.stem


def _describe(place: ModelFolder, model: ModelParams, pipe: PipelineParams, ply: str, shown: Shown) -> None:
    """What is shown there: the options, and the frame that the model is in."""
    about = asdict(model) | asdict(pipe) | {"model_path": str(place), "ply": ply}
    if isinstance(shown.scene, Splats):
        about["sh_degree"] = shown.scene.gaussians.sh_degree
    write_json(place.config, about, indent=2)
    if model.model_path:
        Similarity.stored(ModelFolder(model.model_path).normalization).write(place.normalization)


def _place(model: ModelParams, ply: str) -> ModelFolder:
    """The folder for the pictures: the model's, or one that nothing else was rendered into."""
    if not ply and _is_own_data(model):
        return ModelFolder(model.model_path)
    shown = {"source_path": model.source_path, "ply": ply}
    name = f"on_{Path(model.source_path).name}"
    name = f"{Path(ply).stem}_{name}" if ply else name
    numbers = count(1)
    while True:
        number = next(numbers)
        place = ModelFolder(
            Path(model.model_path or "output") / (name if number == 1 else f"{name}_{number}")
        )
        if not place.path.exists() or set(place.path.iterdir()) <= {place.undistorted}:
            return place
        if place.config.is_file():
            options = saved_options(place.path, (ModelParams, RenderParams))
            if {key: options.get(key) for key in shown} == shown:
                return place


def _is_own_data(model: ModelParams) -> bool:
    """Was the model trained on this data set? One that was moved still has its name and its cameras."""
    trained_on = saved_options(model.model_path, (ModelParams,)).get("source_path", "")
    if os.path.realpath(model.source_path) == os.path.realpath(trained_on):
        return True
    if Path(model.source_path).name != Path(trained_on).name:
        return False
    try:
        cameras = json.loads(ModelFolder(model.model_path).cameras.read_text(encoding="utf-8"))
        known = np.array([camera["position"] for camera in cameras], float).reshape(-1, 3)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False
    data = read_dataset(Path(model.source_path), model.images, "", None, model.skip_missing, model.masks)
    near = SAME_PLACE * np.abs(known).max(initial=1e-9)
    return all(np.abs(known - view.center).max(axis=1).min(initial=np.inf) < near for view in data.views)


def _render_set(folder: Path, name: str, cameras: list[Camera], shown: Shown, options: RenderParams) -> None:
    """One view after the other; files are written on other threads meanwhile."""
    for part in ("renders", "gt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    more = [kind for kind in options.outputs if kind != "rgb"]
    names, masked, levels, seconds = {}, set(), {}, []
    with PngWriter() as files:
        views = progress(cameras, desc=f"Rendering {name} views", disable=options.quiet)
        for index, camera in enumerate(views):
            (image, truth, mask), took = _timed_pair(shown, camera)
            seconds.append(took)
            file = f"{index:05d}.png"
            files.write(image, folder / "renders" / file)
            files.write(truth, folder / "gt" / file)
            if mask is not None:
                (folder / "masks").mkdir(exist_ok=True)
                files.write(mask.expand(3, -1, -1), folder / "masks" / file)
                masked.add(file)
            if more:
                levels[file] = _write_outputs(more, folder, file, shown, camera, files, image.shape[-1])
            names[file] = camera.name
    write_json(folder / "names.json", names, indent=1)
    write_json(folder / "seconds.json", {"a view": median(seconds)})
    if "depth" in more:
        write_json(folder / "depth" / "levels.json", levels, indent=1)
    if not options.quiet:
        say(f"{len(names)} {name} views: {folder}")
    _remove_leftovers(folder, {"renders": set(names), "gt": set(names), "masks": masked}, more, set(names))


def _timed_pair(shown: Shown, camera: Camera) -> tuple[Pair, float]:
    """And the seconds that it took."""
    start = time.perf_counter()
    pair = shown.pair(camera)
    pair.image.sum().item()  # waits for the device
    return pair, time.perf_counter() - start


@torch.no_grad()
def _write_outputs(
    kinds: list[str], folder: Path, file: str, shown: Shown, camera: Camera, files: PngWriter, columns: int
) -> float:
    """Returns the distance that a level of the depth stands for. columns: of the picture, counted from the
    right, as --train_test_exp has them."""
    rendered, black, level = shown.picture(camera), torch.zeros(3, device=camera.device), 1.0
    for kind in kinds:
        (folder / kind).mkdir(exist_ok=True)
        if kind == "depth":
            levels, level = outputs.depth_levels(rendered)
            write_png(levels[:, -columns:], folder / kind / file)
        else:
            picture = outputs.picture(rendered, camera, kind, black)
            files.write(picture[..., -columns:], folder / kind / file)
    return level


def _remove_leftovers(folder: Path, parts: dict[str, set[str]], more: list[str], written: set[str]) -> None:
    """What an earlier rendering, perhaps of more views, left behind would be scored along, or misread."""
    parts |= {kind: written if kind in more else set() for kind in ("depth", "normals", "alpha")}
    for part, names in parts.items():
        for leftover in {path.name for path in (folder / part).glob("*.png")} - names:
            (folder / part / leftover).unlink()


def main(argv: list[str] | None = None) -> int:
    model, pipe, options = parse_render(argv)
    work = render_film if options.path else render_sets
    return commands.run("render.py", lambda: work(model, pipe, options))


if __name__ == "__main__":
    sys.exit(main())

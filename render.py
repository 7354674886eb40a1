"""Render the train and test views of a trained model as PNG files.

    python render.py -m output/x

Writes <model>/{train,test}/ours_<iteration>/{renders,gt}/00000.png and so on, in the order of the image
names, and beside them names.json: which photo each file shows. Where photos do not count everywhere there are
masks/, too. The options of the run are read from the model folder.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import ModelParams, PipelineParams, RenderParams, parse_render, pick_device
from per_view import Shown
from scene import Camera, Scene
from scene.folder import ModelFolder
from training import method
from utils import commands
from utils.files import write_json
from utils.image import PngWriter


def render_sets(model: ModelParams, pipe: PipelineParams, options: RenderParams) -> None:
    device = pick_device(options.device)
    background = torch.full((3,), 1.0 if model.white_background else 0.0, device=device)
    shown, iteration = method.load(model, pipe, options.iteration, background)
    scene = Scene(model, device, for_training=False, quiet=options.quiet)
    for name, cameras, skip in [
        ("train", scene.train_cameras, options.skip_train),
        ("test", scene.test_cameras, options.skip_test),
    ]:
        if not cameras and not skip and not options.quiet:
            print(f"There are no {name} views" + (" (--eval holds some out)" if name == "test" else ""))
        if cameras and not skip:
            folder = ModelFolder(model.model_path).pictures(name, iteration)
            _render_set(folder, name, cameras, shown, options.quiet)


def _render_set(folder: Path, name: str, cameras: list[Camera], shown: Shown, quiet: bool) -> None:
    """One view after the other; files are written on other threads meanwhile."""
    for part in ("renders", "gt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names, masked = {}, set()
    with PngWriter() as files:
        for index, camera in enumerate(tqdm(cameras, desc=f"Rendering {name} views", disable=quiet)):
            image, truth, mask = shown.pair(camera)
            file = f"{index:05d}.png"
            files.write(image, folder / "renders" / file)
            files.write(truth, folder / "gt" / file)
            if mask is not None:
                (folder / "masks").mkdir(exist_ok=True)
                files.write(mask.expand(3, -1, -1), folder / "masks" / file)
                masked.add(file)
            names[file] = camera.name
    write_json(folder / "names.json", names, indent=1)
    if not quiet:
        print(f"{len(names)} {name} views: {folder}")
    # What an earlier rendering, perhaps of more views, left behind would be scored along.
    for part, written in (("renders", names.keys()), ("gt", names.keys()), ("masks", masked)):
        for leftover in {path.name for path in (folder / part).glob("*.png")} - written:
            (folder / part / leftover).unlink()


def main(argv: list[str] | None = None) -> int:
    model, pipe, options = parse_render(argv)
    return commands.run("render.py", lambda: render_sets(model, pipe, options))


if __name__ == "__main__":
    sys.exit(main())

"""Write a trained model to files of other formats.

    python export.py -m output/x --to x.spz x.sog
    python export.py model.ply --to x.glb --up +z

The ending chooses the format: .ply, .compressed.ply, .spz, .sog, .splat or .glb. The model stays as it is.
"""

import json
import sys
from pathlib import Path

import torch

from arguments import ExportParams, parse_export, share
from scene import edit, formats
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from utils import commands
from utils.files import DataError


def export(options: ExportParams) -> None:
    for name in options.to:  # before any work
        formats.check_writable(Path(name))
    source = _source(options)
    gaussians = formats.read(source)
    print(f"{source}: {len(gaussians):,} splats, {_size(source)}")
    gaussians = _less(gaussians, options)
    if options.up != "none":
        gaussians = edit.turn(gaussians, edit.to_up(_up(options)))
    for name in options.to:
        path = Path(name)
        formats.write(gaussians, path, quality=options.quality, version=options.spz_version)
        each = path.stat().st_size / max(len(gaussians), 1)
        print(f"{path}: {len(gaussians):,} splats, {_size(path)}, {each:.1f} bytes each")
        if lost := formats.loses(path):
            print(f"{path}: this format cannot hold {lost}")


def _source(options: ExportParams) -> Path:
    if options.file:
        return Path(options.file)
    folder = ModelFolder(options.model_path)
    return folder.ply(folder.saved(options.iteration))


def _less(gaussians: GaussianModel, options: ExportParams) -> GaussianModel:
    wanted = gaussians.opacities[:, 0] >= options.min_opacity
    if options.crop:
        wanted &= edit.inside(gaussians, options.crop)
    gaussians = edit.limit_sh(edit.rows(gaussians, wanted), options.sh)
    return edit.rows(gaussians, edit.most_visible(gaussians, share(options.keep)))


def _up(options: ExportParams) -> torch.Tensor:
    if options.up != "auto":
        axis = torch.eye(3)["xyz".index(options.up[1])]
        return -axis if options.up[0] == "-" else axis
    path = ModelFolder(options.model_path).cameras
    try:
        cameras = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    return edit.mean_up(cameras, path)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.2f} MB"


def main(argv: list[str] | None = None) -> int:
    options = parse_export(argv)
    return commands.run("export.py", lambda: export(options))


if __name__ == "__main__":
    sys.exit(main())

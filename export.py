"""Write a trained model to files of other formats.

    python export.py -m output/x --to x.spz x.sog
    python export.py model.ply --to x.glb --up +z

The ending chooses the format: .ply, .compressed.ply, .spz, .sog, .splat, .glb, or .html for a page that shows
the model in a browser, without a server. The model stays as it is.
"""

import sys
from pathlib import Path

import torch

from arguments import ExportParams, parse_export, share
from scene import edit, formats
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from utils import commands
from utils.files import read_json
from utils.terminal import say
from viewer.embed import write_page
from viewer.page import scene_view
from viewer.views import folder_view


def export(options: ExportParams) -> None:
    for path in map(Path, options.to):  # before any work
        if not _is_page(path):
            formats.check_writable(path)
    source = _source(options)
    gaussians = formats.read(source)
    say(f"{source}: {len(gaussians):,} splats, {_size(source)}")
    gaussians = _less(gaussians, options)
    turn = None if options.up == "none" else edit.to_up(_up(options))
    if turn is not None:
        gaussians = edit.turn(gaussians, turn)
    for path in map(Path, options.to):
        count, lost = _write(gaussians, path, options, turn)
        each = path.stat().st_size / max(count, 1)
        say(f"{path}: {count:,} splats, {_size(path)}, {each:.1f} bytes each")
        if lost:
            say(f"{path}: {lost}")


def _write(
    gaussians: GaussianModel, path: Path, options: ExportParams, turn: torch.Tensor | None
) -> tuple[int, str]:
    """Returns how many splats the file has, and what it does not hold, in words."""
    if _is_page(path):
        view = scene_view()
        if options.model_path:
            folder = ModelFolder(options.model_path)
            view = folder_view(folder, folder.saved(options.iteration), turn)
        count, lost = write_page(gaussians, path, view, options.quality, options.max_mb)
        return count, lost and f"to stay below {options.max_mb:g} MB (--max_mb) it has {lost}"
    formats.write(gaussians, path, quality=options.quality, version=options.spz_version)
    lost = formats.loses(path)
    return len(gaussians), lost and f"this format cannot hold {lost}"


def _is_page(path: Path) -> bool:
    return path.suffix.lower() == ".html"


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
    return edit.mean_up(read_json(path, list), path)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.2f} MB"


def main(argv: list[str] | None = None) -> int:
    options = parse_export(argv)
    return commands.run("export.py", lambda: export(options))


if __name__ == "__main__":
    sys.exit(main())

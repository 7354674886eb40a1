"""Write a trained model to files of other formats.

    python export.py -m output/x --to x.spz x.sog
    python export.py model.ply --to x.glb --up +z

The ending chooses the format: .ply, .compressed.ply, .spz, .sog, .splat, .glb, .usdc, or .html for a page
that shows the model in a browser, without a server; points.ply for the centers as colored points, and
mesh.ply for a rough surface. The model stays as it is.
"""

import sys
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch

from arguments import ConfigError, ExportParams, parse_export, pick_device, share
from scene import edit, formats, paths
from scene.folder import ModelFolder
from scene.gaussian_model import GaussianModel
from utils import commands
from utils.files import DataError, read_json
from utils.geometry import rotation_matrices
from utils.terminal import say
from viewer.cameras import Views, views_of
from viewer.clean import floaters, shown
from viewer.embed import ENOUGH, inside, write_page
from viewer.kept import Judge
from viewer.mesh import write_centers, write_mesh
from viewer.page import scene_view
from viewer.views import folder_view


class Export:
    """What is exported, and what is known about it."""

    def __init__(self, options: ExportParams):
        self.options, self.device = options, pick_device(options.device)
        self.folder = ModelFolder(options.model_path) if options.model_path else None
        self.iteration = self.folder.saved(options.iteration) if self.folder else -1
        self.source = self.folder.splats(self.iteration) if self.folder else Path(options.file)

    @cached_property
    def views(self) -> Views:
        if not self.folder:
            raise DataError("a mesh needs the train views of a model folder: use -m")
        return views_of(self.folder, self.device)

    @cached_property
    def judge(self) -> Judge | None:
        """None, and a line, where there are no views to judge by."""
        if not self.folder:
            return None
        try:
            return Judge(self.folder, self.iteration, self.views, self.device)
        except (ConfigError, DataError) as error:
            say(f"The test views are not compared: {error}")
            return None

    def shown(self, gaussians: GaussianModel, most: int = 0) -> torch.Tensor | None:
        """How much of the train views each splat is; None where nobody knows where those are."""
        try:
            return shown(gaussians, self.views, most) if self.folder else None
        except DataError as error:
            say(f"What the train views show does not count: {error}")
            return None

    def write(self, gaussians: GaussianModel, path: Path, turn: torch.Tensor | None) -> tuple[str, str]:
        """Returns what it is made of and what it lacks, in words. gaussians: already turned by the quaternion
        `turn`."""
        name, count, lost = path.name.lower(), len(gaussians), ""
        if name.endswith("points.ply"):
            return f"{write_centers(gaussians, path):,} points", ""
        if name.endswith("mesh.ply"):
            vertices, faces = self._write_mesh(gaussians, path, turn)
            return f"{vertices:,} vertices, {faces:,} triangles; a mesh of splats is rough", ""
        if _is_page(path):
            view = folder_view(self.folder, self.iteration, turn) if self.folder else scene_view()
            size = self.options.quality, self.options.max_mb
            count, lost = write_page(
                gaussians, path, view, *size, lambda: self._shown_turned(gaussians, turn)
            )
            lost = lost and f"to stay below {self.options.max_mb:g} MB (--max_mb) it has {lost}"
        else:
            formats.write(gaussians, path, quality=self.options.quality, version=self.options.spz_version)
            lost = formats.loses(path) and f"this format cannot hold {formats.loses(path)}"
        each = path.stat().st_size / max(count, 1)
        return f"{count:,} splats, {each:.1f} bytes each", lost

    def _shown_turned(self, gaussians: GaussianModel, turn: torch.Tensor | None) -> torch.Tensor | None:
        back = gaussians if turn is None else edit.turn(gaussians, edit.turn_back(turn))
        return self.shown(back, ENOUGH)

    def _write_mesh(self, gaussians: GaussianModel, path: Path, turn: torch.Tensor | None) -> tuple[int, int]:
        matrix = None if turn is None else rotation_matrices(turn[None])[0].numpy()
        if turn is not None:
            gaussians = edit.turn(gaussians, edit.turn_back(turn))
        gaussians = edit.into(gaussians, self.views.frame)
        return write_mesh(gaussians, self.views.train, self.views.pipe, path, self.views.frame, matrix)

    def kept(self, path: Path, turn: torch.Tensor | None) -> str:
        """How near the test views of the file are, in words; nothing of what has none."""
        is_splats = not path.name.lower().endswith(("points.ply", "mesh.ply"))
        if not (self.options.psnr and is_splats and self.judge):
            return ""
        with inside(path) if _is_page(path) else nullcontext(path) as splats:
            return f"; {self.judge.kept(splats, turn)}"


def export(options: ExportParams) -> None:
    for path in map(Path, options.to):  # before any work
        if not _is_page(path):
            formats.check_writable(path)
    this = Export(options)
    gaussians = formats.read(this.source, this.device)
    say(f"{this.source}: {len(gaussians):,} splats, {_size(this.source)}")
    gaussians = _less(gaussians, this)
    turn = None if options.up == "none" else edit.to_up(_up(options))
    if turn is not None:
        gaussians = edit.turn(gaussians, turn)
    for path in map(Path, options.to):
        what, lost = this.write(gaussians, path, turn)
        say(f"{path}: {_size(path)}, {what}{this.kept(path, turn)}")
        if lost:
            say(f"{path}: {lost}")


def _is_page(path: Path) -> bool:
    return path.suffix.lower() == ".html"


def _less(gaussians: GaussianModel, this: Export) -> GaussianModel:
    options = this.options
    wanted = gaussians.opacities[:, 0] >= options.min_opacity
    if options.crop:
        wanted &= _cropped(gaussians, options)
    if options.clean != "none":
        wanted &= _cleaned(gaussians, this)
    gaussians = edit.limit_sh(edit.rows(gaussians, wanted), options.sh)
    kept = share(options.keep)
    score = this.shown(gaussians) if kept < 1 else None
    return edit.rows(gaussians, edit.most_visible(gaussians, kept, score))


def _cropped(gaussians: GaussianModel, options: ExportParams) -> torch.Tensor:
    if options.crop == ["cameras"]:
        poses, size = paths.of_cameras(ModelFolder(options.model_path).cameras)
        return edit.in_hull(gaussians, torch.from_numpy(paths.surroundings(poses, size)))
    if len(options.crop) == 1:
        return edit.Box.read(Path(options.crop[0])).holds(gaussians)
    return edit.Box.of([float(word) for word in options.crop]).holds(gaussians)


def _cleaned(gaussians: GaussianModel, this: Export) -> torch.Tensor:
    """Mask of what stays; says why the others go."""
    framed = edit.into(gaussians, this.views.frame)
    drop = torch.zeros(len(gaussians), dtype=torch.bool, device=this.device)
    for reason, which in floaters(framed, this.views.train, this.views.pipe, this.options.clean).items():
        say(f"  {int((which & ~drop).sum()):,} splats {reason}")
        drop |= which
    return ~drop


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

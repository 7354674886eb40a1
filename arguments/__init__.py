"""Every flag of TileSplat: typed, with its default and its help in one place.

A group of flags is a dataclass; a field is a flag, a key of config.json and an attribute of the code, all
under one name. Values come from, each overruling the one before: the default, the model folder's config.json
(render.py), the file given by --config, the command line. `cfg_args` is the original release's record of a
run: written because its viewers look for it, and read (never evaluated) so that model folders of the original
open.
"""

import argparse
import ast
import dataclasses
import difflib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from arguments.baselines import FieldParams
from arguments.flag import LAST_PORT, LAST_SEED, MOST_FRAMES, MOST_POINTS, WIDEST, arg
from arguments.photos import PhotoParams

CONFIG_FILE = "config.json"
LEGACY_FILE = "cfg_args"
LONGEST = 300  # characters of a message about a file
LONGEST_VALUE = 80  # of a value in a message
MAX_FILE_BYTES = 1 << 20  # a configuration is a few kilobytes; anything larger is some other file


class ConfigError(ValueError):
    """A flag or a configuration file is wrong."""

    for_the_user = True  # the message says it all


OPTIMIZERS = ("default", "sparse_adam")
MASK_MODES = ("ignore", "keep")
ALPHA_MODES = ("transparency", "mask")
OUTPUTS = ("rgb", "depth", "normals", "alpha")
PATHS = ("orbit", "interpolate", "spiral", "still")
CODECS = ("auto", "av1", "h264")
CLEANINGS = ("none", "conservative", "balanced", "aggressive")
GROWTHS = ("edges", "error", "gradient", "disagreement")
UPS = ("none", "auto", "+x", "-x", "+y", "-y", "+z", "-z")
VIEWS = ("as_photographed", "sharp")
MATCHERS = ("auto", "exhaustive", "sequential", "vocab_tree")
CAMERAS = (  # those of COLMAP that a photo can be undistorted from
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "FULL_OPENCV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "OPENCV_FISHEYE",
    "THIN_PRISM_FISHEYE",
    "FOV",
)


_IMPROVED = {
    "strategy": "improved",
    "iterations": 30_000,
    "position_lr_max_steps": 30_000,
    "densify_until_iter": 25_000,
    "densify_grad_threshold": 2e-4,
    "average_last": 1_000,
    "visits": 200,
    "antialiasing": True,
}
PRESETS: dict[str, dict[str, Any]] = {  # docs/methods.md has what each brings
    "published": {},
    "fast": _IMPROVED
    | {
        "budget": 100.0,
        "iterations": 8_000,
        "visits": 120,
        "densify_until_iter": 4_000,
        "position_lr_init": 8e-5,
        "position_lr_max_steps": 8_000,
        "feature_lr": 0.005,
        "feature_rest_div": 10.0,
        "coarse_until": 2_000,
    },
    "best": _IMPROVED | {"budget": 150.0},
    "small": _IMPROVED | {"budget": 46.0},
}
RULES = {"cap_max": "budget", "iterations": "visits"}  # what is given, and what would set it by the scene
STAGES = (  # of a preset, as long as its run
    "densify_until_iter",
    "position_lr_max_steps",
    "coarse_until",
    "average_last",
)


@dataclass
class ModelParams:
    """What is trained, from which data (stored with the model)"""

    method: str = arg("gaussians", "what is trained: gaussians, nerf, dvgo, or a module that has a Trainer")
    sh_degree: int = arg(3, "highest degree of the view-dependent color", choices=(0, 1, 2, 3))
    source_path: str = arg("", "data set folder (COLMAP, transforms.json, Blender or LLFF)", short="-s")
    model_path: str = arg("", "output folder; a fresh one under output/ if empty", short="-m")
    images: str = arg("images", "image folder inside the data set, such as images_4", short="-i")
    skip_missing: bool = arg(False, "leave out views whose image is not there")
    allow_outside_paths: bool = arg(False, "read what the data set's files name outside its folder, too")
    masks: str = arg("", "folder of masks, in the data set or elsewhere: as the photos, white and black")
    mask_mode: str = arg(
        "ignore",
        "where masks are black: the photo does not count, or shows the background",
        choices=MASK_MODES,
    )
    invert_masks: bool = arg(False, "black and white of the masks change places")
    alpha: str = arg(
        "transparency", "the photos' alpha: the background shows, or they do not count", choices=ALPHA_MODES
    )
    depths: str = arg(
        "",
        "folder of inverse depth maps, in the data set or elsewhere; turns the depth loss on; "
        "COLMAP data also need depth_params.json: in the model folder, there, or in sparse/0",
        short="-d",
    )
    resolution: int = arg(
        -1,
        "1, 2, 4, 8: divide by it; -1: at most 1600 wide; else: the width",
        short="-r",
        minimum=-1,
        maximum=WIDEST,
    )
    white_background: bool = arg(False, "train against white instead of black", short="-w")
    train_test_exp: bool = arg(False, "optimize an exposure per image; test views train on their left half")
    data_device: str = arg("cuda", "where the images live: cuda (if they fit), cpu (pinned memory) or disk")
    eval: bool = arg(False, "hold out test views")
    llffhold: int = arg(8, "with --eval: every n-th view by name is a test view, 0 for none", minimum=0)
    normalize: bool = arg(False, "train around the origin, at a size that suits the near plane")
    random_init: int = arg(
        0, "start from this many random points instead", minimum=0, const=100_000, maximum=MOST_POINTS
    )


@dataclass
class PipelineParams:
    """How Gaussians become pixels (stored with the model)"""

    convert_SHs_python: bool = arg(False, "evaluate spherical harmonics in PyTorch")
    compute_cov3D_python: bool = arg(False, "compute 3D covariances in PyTorch")
    debug: bool = arg(False, "keep the inputs of a failing rasterizer call in a file")
    antialiasing: bool = arg(False, "compensate opacity for the pixel filter (as Mip-Splatting's 2D filter)")
    filter_3d: bool = arg(
        False, "no Gaussian is finer than what the photos can tell (Mip-Splatting's 3D filter)"
    )


@dataclass
class OptimizationParams:
    """The optimization"""

    iterations: int = arg(30_000, "number of training steps", minimum=1)
    visits: int = arg(
        0, "iterations are at most this times the train photos, but not below 5000 (0: as given)", minimum=0
    )
    position_lr_init: float = arg(1.6e-4, "first rate of positions / extent; improved: 4e-5", minimum=0)
    position_lr_final: float = arg(1.6e-6, "the same at the end; improved: 2e-6", minimum=0)
    position_lr_delay_mult: float = arg(
        0.01, "no effect (kept for old scripts): positions do not ease in", minimum=0, maximum=1
    )
    position_lr_max_steps: int = arg(30_000, "step at which positions are at the final rate", minimum=1)
    feature_lr: float = arg(0.0025, "learning rate of colors", minimum=0)
    feature_rest_div: float = arg(20.0, "feature_lr / this is the rate of the view-dependent part", minimum=1)
    opacity_lr: float = arg(0.025, "learning rate of opacity logits; mcmc: 0.05", minimum=0)
    scaling_lr: float = arg(0.005, "learning rate of log scales", minimum=0)
    rotation_lr: float = arg(0.001, "learning rate of quaternions", minimum=0)
    exposure_lr_init: float = arg(0.01, "learning rate of exposures at the start", minimum=0)
    exposure_lr_final: float = arg(0.001, "learning rate of exposures at the end", minimum=0)
    exposure_lr_delay_steps: int = arg(0, "steps over which exposures ease in", minimum=0)
    exposure_lr_delay_mult: float = arg(
        0.0, "fraction of the rate that they start from", minimum=0, maximum=1
    )
    percent_dense: float = arg(0.01, "above this size / extent Gaussians are split, not cloned", minimum=0)
    lambda_dssim: float = arg(0.2, "weight of 1 - SSIM in the loss; the rest is L1", minimum=0, maximum=1)
    densification_interval: int = arg(100, "steps between densifications", minimum=1)
    opacity_reset_interval: int = arg(3000, "steps between opacity resets", minimum=1)
    densify_from_iter: int = arg(500, "densify after this step", minimum=0)
    densify_until_iter: int = arg(15_000, "densify before this step; mcmc: 25000", minimum=0)
    densify_grad_threshold: float = arg(
        2e-4, "screen-space gradient (NDC) that asks for more; absgrad: 8e-4; improved: 3e-4", minimum=0
    )
    absgrad: bool = arg(False, "adc: pulls of a Gaussian's pixels add up by their absolute values (AbsGS)")
    cap_max: int = arg(
        0,
        "the most Gaussians there may be; the hardest pulled win (0: any number); mcmc, improved: 1000000",
        minimum=0,
    )
    budget: float = arg(
        0.0,
        "makes cap_max this times points^(1/2) x pixels of the train photos^(1/6); made-up points: 15000",
        minimum=0,
    )
    final_count: int = arg(
        0, "improved: after densification the least visible go until so many are left (0: all)", minimum=0
    )
    noise_lr: float = arg(5e5, "mcmc: noise on positions, relative to their learning rate", minimum=0)
    opacity_reg: float = arg(0.0, "weight of the mean opacity in the loss; mcmc: 0.01", minimum=0)
    scale_reg: float = arg(0.0, "weight of the mean scale in the loss; mcmc: 0.01", minimum=0)
    opacity_decay: float = arg(
        0.0,
        "improved: in place of resets, what each densification takes from opacities",
        minimum=0,
        maximum=1,
    )
    grow_by: str = arg("edges", "improved: what a Gaussian must show to be split first", choices=GROWTHS)
    update_every: list[int] = arg(
        [1], "views that make one step: up to densify_until_iter, in half of the rest, then", minimum=1
    )
    views_per_step: int = arg(
        1,
        "views that make one step, at rates times the root of their number; intervals count views",
        minimum=1,
    )
    rates_final: float = arg(
        1.0,
        "what is left at the end of all rates but the positions', down from half of the run",
        minimum=1e-6,
        maximum=1,
    )
    average_last: int = arg(
        0, "the model at the end is the mean over so many last steps (0: what the last step left)", minimum=0
    )
    coarse_until: int = arg(
        0, "photos have half their width until this step, and a quarter in the first third of it", minimum=0
    )
    depth_l1_weight_init: float = arg(1.0, "weight of the depth loss at the start", minimum=0)
    depth_l1_weight_final: float = arg(0.01, "weight of the depth loss at the end", minimum=0)
    random_background: bool = arg(False, "a random background color at each step")
    preset: str = arg(
        "published",
        "a set of other flags, which you can still give; its stages scale with --iterations",
        choices=tuple(PRESETS),
    )
    strategy: str = arg("adc", "how Gaussians come and go: adc (as published), mcmc, improved, or your file")
    optimizer_type: str = arg("default", "sparse_adam moves only what is seen", choices=OPTIMIZERS)


@dataclass
class RunParams:
    """This run"""

    device: str = arg("", "where to compute, as PyTorch names it; the GPU if there is one, else the CPU")
    seed: int = arg(0, "seed of everything random", minimum=0, maximum=LAST_SEED)
    test_iterations: list[int] = arg(
        [7_000, 30_000], "steps at which to measure train and test views", minimum=-1
    )
    save_iterations: list[int] = arg([7_000, 30_000], "steps at which to save, besides the last", minimum=-1)
    checkpoint_iterations: list[int] = arg([], "steps at which to write a checkpoint that stays", minimum=-1)
    checkpoint_every: int = arg(
        0, "steps between checkpoints, of which 2 stay; 0: one every 5 minutes, -1: none", minimum=-1
    )
    start_checkpoint: str = arg("", "checkpoint (ours, the original's) or PLY to continue from")
    resume: bool = arg(False, "go on with the run in the output folder, with its options")
    overwrite: bool = arg(False, "start over in an output folder that was used")
    ip: str = arg("127.0.0.1", "address the live viewer connects to; it takes at most half of the time")
    port: int = arg(
        6009, "port of the live viewer; the next free one if it is taken", minimum=0, maximum=LAST_PORT
    )
    disable_viewer: bool = arg(False, "no live viewer")
    view: bool = arg(False, "open view.py's page of this run in the default browser")
    quiet: bool = arg(False, "print errors only")
    fused: bool = arg(True, "take each iteration in one native call where the options allow it")
    offload: bool = arg(
        False, "colors and their moments stay in the host's memory; the GPU fetches what it shows"
    )
    deterministic: bool = arg(False, "the same bits from run to run: always so on a CPU, slower on a GPU")
    debug_from: int = arg(-1, "turn --debug on at this step", minimum=-1)
    detect_anomaly: bool = arg(False, "let PyTorch look for the source of NaNs (slow)")


@dataclass
class RenderParams:
    """This rendering"""

    iteration: int = arg(-1, "which saved model; -1 for the latest", minimum=-1)
    ply: str = arg("", "a file of Gaussians to render instead: an edited model (with -m), or any (with -s)")
    views: str = arg(
        "as_photographed", "train views: with the blur of their photos, or without", choices=VIEWS
    )
    align_test_poses: bool = arg(
        False, "move the test views as training moved the train views together (--poses, --blur motion)"
    )
    refine_test_poses: bool = arg(
        False, "fit the pose of each test view to its photo first, the scene as it is; say so with scores"
    )
    fit_test_colors: bool = arg(
        False, "fit the colors of each test view to its photo by an affine transform; say so with scores"
    )
    skip_train: bool = arg(False, "leave out the train views")
    skip_test: bool = arg(False, "leave out the test views")
    outputs: list[str] = arg(["rgb"], "what to write of each view: rgb, depth, normals, alpha")
    path: str = arg(
        "", "a film instead of the views: orbit, interpolate, spiral, still, or a camera_path.json"
    )
    to: str = arg("", "of a film: .mp4, .webp, .gif, a folder of PNGs, or camera_path.json itself")
    seconds: float = arg(0.0, "length of a film; 0: that of the camera_path.json, else 10", minimum=0.0)
    fps: float = arg(0.0, "frames per second; 0: those of the camera_path.json, else 24", minimum=0.0)
    size: list[int] = arg([], "width and height of a film; else as the cameras, up to 1280 wide", minimum=1)
    codec: str = arg("auto", "of an MP4: h264 needs ffmpeg; auto takes it if it is there", choices=CODECS)
    timelapse: bool = arg(False, "a film of training: through the saved iterations, one after the other")
    device: str = arg("", "where to compute, as PyTorch names it; the GPU if there is one, else the CPU")
    quiet: bool = arg(False, "print errors only")


@dataclass
class ExportParams:
    """This export"""

    model_path: str = arg("", "output folder of a training run", short="-m")
    file: str = arg("", "a file of splats instead; may be given as the first word")
    iteration: int = arg(-1, "which saved model of the folder; -1 for the latest")
    to: list[str] = arg([], "files to write; their endings choose the formats")
    quality: str = arg(
        "best", "size against precision of SH in SPZ and HTML", choices=("small", "good", "best")
    )
    max_mb: float = arg(
        24.0, "most megabytes of an HTML page; the splats that show least stay away", minimum=1.0
    )
    spz_version: int = arg(3, "version of SPZ; 4 needs the package zstandard", choices=(2, 3, 4))
    sh: int = arg(3, "highest degree of the view-dependent color to keep", choices=(0, 1, 2, 3))
    crop: list[str] = arg(
        [],
        "keep a box, in the model's axes before --up: two corners x y z X Y Z; center, size and degrees "
        "about x, y, z; that of a camera_path.json; or cameras: what is in the hull of their views",
    )
    clean: str = arg("none", "drop floaters, by how little train views show of them", choices=CLEANINGS)
    min_opacity: float = arg(0.0, "drop splats that are fainter", minimum=0.0)
    keep: str = arg(
        "100%", "this share of the splats: what the train views show most of; of a file, the largest"
    )
    psnr: bool = arg(True, "with -m: say what the test views lose in each file")
    device: str = arg("", "where to compute, as PyTorch names it; the GPU if there is one, else the CPU")
    up: str = arg("none", "what becomes up: the cameras' (auto) or an axis, as in --up=-z", choices=UPS)


@dataclass
class ViewParams:
    """This look"""

    model_path: str = arg("", "output folder of a training run, finished or not", short="-m")
    file: str = arg("", "a file of splats instead; may be given as the first word")
    host: str = arg("127.0.0.1", "address to listen on; the default lets nobody else in")
    port: int = arg(6080, "port to listen on; 0 for any that is free", minimum=0)
    open: bool = arg(False, "open the page in the default browser")
    device: str = arg("", "where to compute, as PyTorch names it; the GPU if there is one, else the CPU")


@dataclass
class ConvertParams:
    """This capture"""

    source_path: str = arg("", "folder of photos, in it or in its folder input; or a video file", short="-s")
    camera: str = arg("OPENCV", "camera model of COLMAP", choices=CAMERAS)
    no_gpu: bool = arg(False, "use the CPU even where COLMAP could use a GPU")
    skip_matching: bool = arg(False, "only undistort: the reconstruction is in distorted/ already")
    resize: bool = arg(False, "also make images_2, images_4 and images_8")
    colmap_executable: str = arg("", "a COLMAP of your own, 3.8 or newer; else pycolmap does the work")
    magick_executable: str = arg("", "no effect (kept for old scripts): pictures are resized without it")
    matcher: str = arg("auto", "pairs of photos: by their number, or in order for a video", choices=MATCHERS)
    vocab_tree: str = arg("", "file with COLMAP's vocabulary tree: finds the pairs of many photos")
    mapper: str = arg("incremental", "global is faster for many photos", choices=("incremental", "global"))
    frames: int = arg(150, "number of frames taken from a video", minimum=2, maximum=MOST_FRAMES)


@dataclass
class MetricsParams:
    """This scoring"""

    model_paths: list[str] = arg([], "model folders to score", short="-m")
    lpips: str = arg("vgg", "network of the perceptual distance", choices=("vgg", "alex", "none"))
    lpips_weights: str = arg("", "file or folder with the network's weights, if not in the torch cache")
    table: list[str] = arg([], "files to write the table of all models to, each .csv or .md")
    device: str = arg("", "where to compute, as PyTorch names it; the GPU if there is one, else the CPU")


OWN_DEFAULTS = {  # flag and its value -> defaults of other flags, which their help names, too
    ("absgrad", True): {"densify_grad_threshold": 8e-4},
    ("strategy", "mcmc"): {
        "opacity_lr": 0.05,
        "densify_until_iter": 25_000,
        "cap_max": 1_000_000,
        "opacity_reg": 0.01,
        "scale_reg": 0.01,
    },
    ("strategy", "improved"): {
        "position_lr_init": 4e-5,
        "position_lr_final": 2e-6,
        "densify_grad_threshold": 3e-4,
        "cap_max": 1_000_000,
    },
}


@dataclass
class ReportParams:
    """This report"""

    model_paths: list[str] = arg([], "model folders; several are compared", short="-m")
    to: str = arg("", "the page to write; report.html in the first model folder if empty")
    max_mb: float = arg(8.0, "most megabytes of the page: fewer pictures and splats above it", minimum=1.0)
    splats: bool = arg(True, "put the splats into the page, to be looked at from any side")


class Options(NamedTuple):
    """All of a training run."""

    model: ModelParams
    opt: OptimizationParams
    pipe: PipelineParams
    run: RunParams
    field: FieldParams = FieldParams()
    views: PhotoParams = PhotoParams()


# The command lines


def parse_train(argv: list[str] | None = None) -> Options:
    groups = (ModelParams, OptimizationParams, PipelineParams, RunParams, FieldParams, PhotoParams)
    parser = _parser("Optimize 3D Gaussians to photos.", groups)
    parser.add_argument(
        "--config",
        metavar="FILE.json",
        default=argparse.SUPPRESS,
        help="options from a file, such as a model's config.json",
    )
    try:
        given = _given(parser, argv)
        values = _options_to_resume(given, groups)
        values |= read_config(given.pop("config"), groups) if "config" in given else {}
        if "preset" in given:  # it overrules the file, which has every flag
            values |= _own_defaults(given)
        values |= {rule: 0 for flag, rule in RULES.items() if flag in given}
        values |= given
        model, opt, pipe, run, field, views = build(groups, _own_defaults(values) | values)
        if not model.source_path:
            raise ConfigError("source_path is empty: name the data set folder with -s")
        if "model_path" not in given and model.model_path and Path(model.model_path, "point_cloud").is_dir():
            raise ConfigError(
                f"model_path {model.model_path}, from the --config file, has a trained model: name "
                "the folder to write to with -m"
            )
        _check_schedules(opt, views)
        if model.train_test_exp and views.appearance not in ("none", "exposure"):
            raise ConfigError(
                f"train_test_exp must go with --appearance exposure or none, got {views.appearance}"
            )
        if run.offload and model.method != "gaussians":
            raise ConfigError(f"offload must go with --method gaussians, got {model.method}")
        if run.offload and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ConfigError(f"offload is for one process and its GPU, got {processes} (WORLD_SIZE)")
        if views.blur == "kernel" and views.blur_samples < 3:
            raise ConfigError(f"blur_samples must be at least 3 with --blur kernel, got {views.blur_samples}")
        if run.view and run.disable_viewer:
            raise ConfigError("view and disable_viewer exclude each other")
        _make_absolute(model)
        model.model_path = model.model_path or os.path.join("output", _short_id())
        run.save_iterations = sorted({*run.save_iterations, opt.iterations})
    except ConfigError as error:
        parser.error(str(error))
    return Options(model, opt, pipe, run, field, views)


def _make_absolute(model: ModelParams) -> None:
    """The data set, and folders that are not in it, so that the model's options hold in any folder."""
    source = model.source_path = os.path.abspath(model.source_path) if model.source_path else ""
    for name in ("depths", "masks"):
        folder = getattr(model, name)
        if folder and not os.path.isdir(os.path.join(source, folder)) and os.path.isdir(folder):
            setattr(model, name, os.path.abspath(folder))


def _own_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that other flags have because of these: of the strategy, and before it of the preset."""
    preset = dict(PRESETS.get(values.get("preset", "published"), {}))
    for name in [name for name in STAGES if name in preset and type(values.get("iterations")) is int]:
        preset[name] = max(preset[name] * values["iterations"] // preset["iterations"], 1)
    own: dict[str, Any] = {}
    for (name, value), defaults in OWN_DEFAULTS.items():
        own |= defaults if (preset | values).get(name) == value else {}
    return own | preset


def defaults_with(values: dict[str, Any], groups: tuple) -> dict[str, Any]:
    """Every default of these groups, as it is beside such values of other flags."""
    defaults = {name: value for group in build(groups, {}) for name, value in vars(group).items()}
    return defaults | _own_defaults(values)


def _options_to_resume(given: dict[str, Any], groups: tuple) -> dict[str, Any]:
    """The options of the run that --resume goes on with, if it came so far as to store them."""
    if not given.get("resume"):
        return {}
    if given.get("overwrite"):
        raise ConfigError("resume and overwrite exclude each other")
    if not given.get("model_path"):
        raise ConfigError("model_path is empty: name the folder of the run to resume with -m")
    folder = Path(given["model_path"])
    if not given.get("source_path") and not folder.is_dir():
        raise ConfigError(f"{folder}: there is no run to resume")
    stored = any((folder / name).is_file() for name in (CONFIG_FILE, LEGACY_FILE))
    return saved_options(folder, groups) if stored else {}


def parse_render(argv: list[str] | None = None) -> tuple[ModelParams, PipelineParams, RenderParams]:
    """The options the model was trained with, overlaid with what the command line gives."""
    groups = (ModelParams, PipelineParams, RenderParams)
    parser = _parser("Render the train and test views of a trained model.", groups)
    try:
        given = _given(parser, argv)
        if not given.get("model_path") and not given.get("ply"):
            raise ConfigError("model_path is empty: name the model folder with -m, or a file with --ply")
        stored = {}
        if given.get("model_path"):
            stored = saved_options(given["model_path"], (ModelParams, PipelineParams))
        model, pipe, render = build(groups, stored | given)
        if render.ply and render.iteration != -1:
            raise ConfigError("ply and iteration exclude each other")
        if render.ply and not model.source_path and not render.path:
            raise ConfigError("source_path is empty: name the data set folder with -s")
        _check_film(render)
        _make_absolute(model)
        render.ply = os.path.abspath(render.ply) if render.ply else ""
    except ConfigError as error:
        parser.error(str(error))
    return model, pipe, render


def _check_film(render: RenderParams) -> None:
    wrong = [name for name in render.outputs if name not in OUTPUTS]
    if wrong or not render.outputs:
        raise ConfigError(f"outputs must be some of {', '.join(OUTPUTS)}, got {_brief(render.outputs)}")
    if bool(render.path) != bool(render.to):
        raise ConfigError("path and to belong together: where the camera goes, and the film to write")
    if render.path and render.path not in PATHS and not render.path.endswith(".json"):
        raise ConfigError(
            f"path must be one of {', '.join(PATHS)}, or a .json file, got {_brief(render.path)}"
        )
    if len(render.size) not in (0, 2):
        raise ConfigError(f"size must be a width and a height, got {len(render.size)} numbers")
    if render.timelapse and (render.ply or not render.path or render.iteration != -1):
        raise ConfigError("timelapse goes through all iterations of a model folder: it needs -m and --path")


def parse_export(argv: list[str] | None = None) -> ExportParams:
    parser = _parser("Write a model to files of other formats.", (ExportParams,))
    try:
        (export,) = build((ExportParams,), _given(parser, _file_first(argv)))
        _check_one_model(export)
        if not export.to:
            raise ConfigError("to is empty: name the files to write with --to")
        _check_crop(export)
        if export.up == "auto" and not export.model_path:
            raise ConfigError(
                "up is auto, which needs the cameras of a model folder: use -m, or name an axis"
            )
        share(export.keep)
    except ConfigError as error:
        parser.error(str(error))
    return export


def parse_view(argv: list[str] | None = None) -> ViewParams:
    parser = _parser("Look at a model in a browser.", (ViewParams,))
    try:
        (view,) = build((ViewParams,), _given(parser, _file_first(argv)))
        _check_one_model(view)
    except ConfigError as error:
        parser.error(str(error))
    return view


def _file_first(argv: list[str] | None) -> list[str]:
    """The first word may be the file."""
    words = list(sys.argv[1:] if argv is None else argv)
    return ["--file", *words] if words and not words[0].startswith("-") else words


def _check_one_model(options: ExportParams | ViewParams) -> None:
    if bool(options.model_path) == bool(options.file):
        raise ConfigError("name a model folder with -m, or a file of splats, one of them")


def _check_crop(export: ExportParams) -> None:
    words, one = export.crop, len(export.crop) == 1
    if one and words[0] != "cameras" and not words[0].endswith(".json"):
        raise ConfigError(f"crop must be numbers, cameras, or a .json file, got {_brief(words[0])}")
    if not one and (len(words) not in (0, 6, 9) or not all(map(_is_number, words))):
        raise ConfigError(f"crop must be 6 numbers, x y z X Y Z, or 9 of a turned box, got {_brief(words)}")
    if words == ["cameras"] and not export.model_path:
        raise ConfigError("crop is cameras, which needs those of a model folder: use -m")
    if export.clean != "none" and not export.model_path:
        raise ConfigError("clean needs the train views of a model folder: use -m")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def share(text: str) -> float:
    """50% as 0.5."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not (text.endswith("%") and 0 < value <= 1):
        raise ConfigError(f"keep must be a share such as 50%, up to 100%, got {text}")
    return value


def parse_convert(argv: list[str] | None = None) -> ConvertParams:
    parser = _parser("Make a data set from photos or a video.", (ConvertParams,))
    try:
        (convert,) = build((ConvertParams,), _given(parser, argv))
        if not convert.source_path:
            raise ConfigError("source_path is empty: name the folder of photos or the video with -s")
    except ConfigError as error:
        parser.error(str(error))
    return convert


def parse_metrics(argv: list[str] | None = None) -> MetricsParams:
    parser = _parser("Score rendered test views against the photos.", (MetricsParams,))
    try:
        (metrics,) = build((MetricsParams,), _given(parser, argv))
        if not metrics.model_paths:
            raise ConfigError("model_paths is empty: name one or more model folders with -m")
        for path in metrics.table:
            if Path(path).suffix not in (".csv", ".md"):
                raise ConfigError(f"table must be a file that ends in .csv or .md, got {path}")
    except ConfigError as error:
        parser.error(str(error))
    return metrics


def parse_report(argv: list[str] | None = None) -> ReportParams:
    parser = _parser("Write one page about a model, or several.", (ReportParams,))
    try:
        (report,) = build((ReportParams,), _given(parser, argv))
        if not report.model_paths:
            raise ConfigError("model_paths is empty: name one or more model folders with -m")
        if report.to and not report.to.endswith(".html"):
            raise ConfigError(f"to must be a file that ends in .html, got {_brief(report.to)}")
    except ConfigError as error:
        parser.error(str(error))
    return report


def pick_device(name: str = ""):
    """The torch device to compute on: the one named, else the GPU if there is one, else the CPU.

    Of several GPUs it becomes the current one: streams and events that name no device are then on it.
    """
    import torch  # here, not above: --help must not wait for it

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or one of several GPUs, such as cuda:1, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, but PyTorch sees no GPU; use --device cpu")
    if device.type == "cpu":
        return torch.device("cpu")  # cpu:1 is no other one
    if device.index is not None:
        last = torch.cuda.device_count() - 1
        if not 0 <= device.index <= last:
            raise ConfigError(f"device is {name}, but the GPUs that PyTorch sees are cuda:0 to cuda:{last}")
        torch.cuda.set_device(device)
    return device


# Files


def config_files(groups) -> dict[str, str]:
    """What to write of these options: config.json (all of them) and cfg_args (the model's, for viewers)."""
    options = {type(group).__name__: dataclasses.asdict(group) for group in groups}
    model = next(group for group in groups if isinstance(group, ModelParams))
    return {CONFIG_FILE: json.dumps(options, indent=2) + "\n", LEGACY_FILE: format_cfg_args(model)}


def read_config(path: str | os.PathLike, groups: tuple) -> dict[str, Any]:
    """Options from a JSON file, by name: flat, or in sections as save_config writes them."""
    values = _read_json(Path(path))
    known = {f.name for group in groups for f in fields(group)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: unknown option {name}" + _did_you_mean(name, known))
    return _validated(values, groups, path)


def saved_options(model_path: str | os.PathLike, groups: tuple) -> dict[str, Any]:
    """What the run that made this model folder was told, as far as `groups` know it."""
    folder = Path(model_path)
    if (path := folder / CONFIG_FILE).is_file():
        values = _read_json(path)
    elif (path := folder / LEGACY_FILE).is_file():
        values = parse_cfg_args(_read_text(path), path)
    else:
        there = "holds neither config.json nor cfg_args" if folder.is_dir() else "is not there"
        raise ConfigError(f"model_path must be the output folder of a training run, but {folder} {there}")
    known = {f.name for group in groups for f in fields(group)}
    values = {name: value for name, value in values.items() if name in known and value is not None}
    return _validated(values, groups, path)


def format_cfg_args(model: ModelParams) -> str:
    """The text that the original's viewers search for source_path='...', sh_degree= and white_background=."""
    options = ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(model).items())
    return f"Namespace({options})"


def parse_cfg_args(text: str, origin: str | os.PathLike = LEGACY_FILE) -> dict[str, Any]:
    """The keyword arguments in the text `Namespace(a=1, b='x')`. Only literals; nothing is evaluated."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "Namespace":
            raise ValueError
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ConfigError(f"{origin} must be Namespace(name=value, ...) with plain values") from None


# From names and values to dataclasses


KINDS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", ""),
}


def build(groups: tuple, values: dict[str, Any]) -> tuple:
    """One instance of each group, every value checked. Names that no group has are ignored."""
    return tuple(
        group(**{f.name: _checked(f, values[f.name]) for f in fields(group) if f.name in values})
        for group in groups
    )


def _validated(values: dict[str, Any], groups: tuple, origin: str | os.PathLike) -> dict[str, Any]:
    """The values, if they can be; an error names the file they are from."""
    try:
        build(groups, values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {str(error)[:LONGEST]}") from None
    return values


def _checked(f: dataclasses.Field, value: Any) -> Any:
    if f.type is float and type(value) is int:
        value = _as_float(value)
    choices = f.metadata["choices"]
    if get_origin(f.type) is list:
        item = get_args(f.type)[0]
        if not (isinstance(value, list) and all(type(v) is item for v in value)):
            raise ConfigError(f"{f.name} must be a list of {KINDS[item][1]}, got {_brief(value)}")
    elif type(value) is not f.type:
        raise ConfigError(f"{f.name} must be {KINDS[f.type][0]}, got {_brief(value)}")
    elif choices and value not in choices:
        raise ConfigError(f"{f.name} must be one of {', '.join(map(str, choices))}, got {_brief(value, str)}")
    for number in value if isinstance(value, list) else [value]:
        if wrong := out_of_range(number, f.metadata["minimum"], f.metadata["maximum"]):
            raise ConfigError(f"{f.name} {wrong}")
    return value


def out_of_range(value: float, minimum: float | None, maximum: float | None) -> str:
    """What is wrong with a number, as in "must be at least 1, got 0"; nothing: an empty text."""
    if minimum is not None and not value >= minimum:
        return f"must be at least {minimum:,}, got {_brief(value)}"
    if maximum is not None and not value <= maximum:
        return f"must be at most {maximum:,}, got {_brief(value)}"
    return ""


def number(kind: type, minimum: float, maximum: float) -> Callable[[str], float]:
    """How argparse reads a number of this range, for the commands whose flags are not in a dataclass."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {KINDS[kind][0]}, got {_brief(text)}") from None
        if wrong := out_of_range(value, minimum, maximum):
            raise argparse.ArgumentTypeError(wrong)
        return value

    return parse


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _brief(value: Any, write: Callable[[Any], str] = repr) -> str:
    """For a message: a number can have thousands of digits."""
    text = write(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _check_schedules(opt: OptimizationParams, views: PhotoParams) -> None:
    """What goes down evenly in the logarithm can be off altogether, but cannot reach zero."""
    rates = dataclasses.asdict(opt) | dataclasses.asdict(views)
    for name in ("position_lr", "exposure_lr", "depth_l1_weight", "pose_lr"):
        first, last = rates[f"{name}_init"], rates[f"{name}_final"]
        if (first == 0) != (last == 0):
            raise ConfigError(
                f"{name}_init and {name}_final must both be 0 or neither, got {first} and {last}"
            )
    if not 1 <= len(opt.update_every) <= 3:
        raise ConfigError(f"update_every must be 1 to 3 numbers, got {len(opt.update_every)}")
    for name, most in {"update_every": max(opt.update_every), "views_per_step": opt.views_per_step}.items():
        if opt.optimizer_type != "default" and most > 1:
            raise ConfigError(f"{name} must be 1 with --optimizer_type {opt.optimizer_type}, got {most}")


def _parser(description: str, groups: tuple) -> argparse.ArgumentParser:
    parser = _Parser(description=description, usage="%(prog)s [flags]")
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for f in fields(group):
            names = [f"--{f.name}"] + ([f.metadata["short"]] if f.metadata["short"] else [])
            section.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=_help(f), **_kind(f))
    return parser


def _kind(f: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads one flag."""
    if f.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(f.type) is list:
        return {"type": get_args(f.type)[0], "nargs": "*", "metavar": _metavar(get_args(f.type)[0])}
    kind = {"type": f.type, "metavar": "|".join(map(str, f.metadata["choices"])) or _metavar(f.type)}
    if f.metadata["const"] is not None:
        kind |= {"nargs": "?", "const": f.metadata["const"]}
    return kind


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _help(f: dataclasses.Field) -> str:
    default = f.default_factory() if callable(f.default_factory) else f.default
    if isinstance(default, list):
        default = " ".join(map(str, default))
    text = f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        return text + (" (default: on)" if default else "")
    return text + (f" (default: {default})" if default != "" else "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)  # it moves no cursor
        self.exit(2, f"{self.prog}: error: {shown}\n(--help lists every flag)\n")


def _given(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """Only what the command line says; a flag that it does not name is not in the result."""
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        flags = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(f"unknown argument {unknown}" + _did_you_mean(unknown.split("=")[0], flags))
    return vars(namespace)


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(data).__name__}")
    flat = {name: value for name, value in data.items() if not isinstance(value, dict)}
    for section in data.values():
        flat |= section if isinstance(section, dict) else {}
    return flat


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: too large to be a configuration")
        data = path.read_bytes()
        return data.decode(json.detect_encoding(data))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _short_id() -> str:
    return (os.environ.get("OAR_JOB_ID") or str(uuid.uuid4()))[:10]

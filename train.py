"""Optimize 3D Gaussians to photos (Kerbl et al. 2023).

    python train.py -s dataset [-m output/x] [--eval]

The loop in train() is the method: show a view, compare, step, now and then clone, split and prune. What each
named step does is found under that name; FAITHFULNESS.md says which equation of the paper lives where.
"""

import os
import random
import sys
import time
from collections import deque
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from diff_gaussian_rasterization import Rendered, photometric_loss
from torch import Tensor

from arguments import (
    ModelParams,
    OptimizationParams,
    PipelineParams,
    RunParams,
    parse_train,
    pick_device,
    save_config,
)
from gaussian_renderer import Pair, render, render_pair
from gaussian_renderer.fused import FusedIteration, can_fuse
from gaussian_renderer.network_gui import Request, Viewer
from scene import Scene
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.points import numpy_seed
from strategies.adc import AdaptiveDensityControl
from training import resume
from training.health import CHECK_EVERY, heal
from training.memory import step_that_fits
from training.queue import ViewQueue, spread
from training.report import READ_EVERY, Report, Stopwatch, Summary, Told, failures_in_log, peak_memory
from training.resume import Checkpoints
from utils import commands
from utils.losses import apply_exposure, inverse_depth_loss
from utils.memory import grow_in_place, out_of_memory
from utils.schedules import log_linear
from utils.terminal import say


def train(
    model: ModelParams, opt: OptimizationParams, pipe: PipelineParams, run: RunParams
) -> Summary | None:
    started = time.perf_counter()
    grow_in_place()
    device = pick_device(run.device)
    seed_everything(run.seed)
    if run.deterministic and device.type == "cuda":
        fix_the_order_of_sums()
    folder = Path(model.model_path)
    resume.check_folder(folder, run, opt.iterations)
    if run.resume and resume.finished(folder) >= opt.iterations:
        say(f"{folder} is finished; with more --iterations it goes on")
        return None
    scene = Scene(model, device, run.seed, quiet=run.quiet)

    points = scene.points.at_most(opt.cap_max, run.seed)
    gaussians = GaussianModel.from_points(points, model.sh_degree, scene.extent, device, scene.exposure_names)
    gaussians.setup_optimizer(opt)
    density = AdaptiveDensityControl.from_params(opt)
    queue, told = ViewQueue(len(scene.train_cameras), run.seed), Told()
    checkpoints = Checkpoints(folder, run, gaussians, density, queue, told, scene.fingerprint)
    done, notes = checkpoints.load(opt.iterations)
    if gaussians.sh_degree != model.sh_degree:
        notes.append(f"SH degree {gaussians.sh_degree}, as in the checkpoint, not {model.sh_degree}")
        model = replace(model, sh_degree=gaussians.sh_degree)
    started -= told.seconds + told.left_out  # of the processes before this one
    resume.clear(folder, run.overwrite)
    save_config(folder, model, opt, pipe, replace(run, resume=False, overwrite=False))
    scene.write_inputs()

    def show(request: Request) -> Tensor:
        if request.camera is not None:
            scene.enter(request.camera)
        return viewed(request, gaussians, pipe, scene.background)

    report = Report(folder, done + 1, opt.iterations, device, run.quiet, told)
    density.say = report.log
    for note in [*scene.warnings, *notes]:
        report.log(note)
    fused = None
    if can_fuse(gaussians, model, opt, pipe, run):
        fused = FusedIteration(len(scene.train_cameras), opt, pipe, device)
    report.log(
        f"Training from iteration {done + 1} on {device}: {len(scene.train_cameras)} train and "
        f"{len(scene.test_cameras)} test views, extent {scene.extent:.4g}, {len(gaussians):,} Gaussians; "
        f"a step is {'one native call (--no-fused takes it apart)' if fused else 'render, compare, backward'}"
    )
    viewer = None if run.disable_viewer else Viewer(run.ip, run.port, model.source_path, report.log, device)
    watch = Stopwatch(device, told)

    def learn(iteration: int, view: int, background: Tensor) -> Losses:
        """Render, compare, backward and step; nothing has moved if it fails."""
        camera = scene.train_cameras[view]
        scene.train_cameras[queue.peek()].prefetch()
        stats = density.stats_for(gaussians, iteration)
        if fused:  # all of it in one native call; to change what is below, --no-fused
            loss, l1 = fused(view, camera, gaussians, background, stats)[:2]
            return Losses(loss, l1, None)
        out = render(camera, gaussians, pipe, background, stats=stats)
        losses = compare(out, camera, gaussians, model, opt, iteration)
        losses.total.backward()
        gaussians.step(visible=out.radii > 0)
        return losses

    shown = deque(maxlen=3 * READ_EVERY)  # (iteration, view): losses arrive late

    with closing(report), checkpoints.advice(), commands.Patience() as signals:
        for iteration in range(done + 1, opt.iterations + 1):
            if viewer:
                with suppress(commands.Stopped), signals.at_once():
                    viewer.serve(show)
            if signals.asked:
                stop_early(
                    iteration - 1, signals.asked, report, watch, checkpoints, scene, gaussians, density, pipe
                )
            pipe.debug |= iteration - 1 == run.debug_from

            gaussians.schedule(iteration)  # learning rates, SH degree
            view = queue.next()
            background = torch.rand(3, device=device) if opt.random_background else scene.background

            losses = step_that_fits(
                partial(learn, iteration, view, background), iteration, gaussians, density
            )
            shown.append((iteration, scene.train_cameras[view].name))
            bad = report.step(iteration, losses.total, losses.l1, losses.depth, len(gaussians))
            if bad or iteration % CHECK_EVERY == 0:
                when = f"iteration {iteration}"
                if bad:
                    when = f"iteration {bad[0]}, view {dict(shown).get(bad[0], '?')}, loss {bad[1]}"
                heal(gaussians, density, when, known=bad is not None)

            last = iteration == opt.iterations
            if iteration in run.test_iterations or last:
                with watch.leave_out():
                    evaluate(report, iteration, scene, gaussians, pipe, model)
            count = len(gaussians)  # of the model that is saved, before it is densified
            if iteration in run.save_iterations or last:
                with watch.leave_out(), nullcontext() if last else report.spare_the_run():
                    heal(gaussians, density, f"iteration {iteration}")
                    scene.save(gaussians, iteration, pipe.antialiasing)

            density.step(gaussians, iteration, scene.extent, model.white_background)
            if checkpoints.due(iteration):
                with watch.leave_out(), report.spare_the_run():
                    heal(gaussians, density, f"iteration {iteration}")
                    report.flush()
                    checkpoints.write(iteration)

        if fused and fused.skipped:
            report.log(f"{fused.skipped:,} steps were not taken: their views had begun to show much more")
        summary = summarize(report, watch, started, count, opt.iterations, device, folder)
        report.finish(summary, folder)
        if viewer:
            with signals.at_once():
                viewer.serve(show, training_ended=True)  # for as long as the viewer wants to stay
            viewer.close()
    return summary


def stop_early(
    iteration: int,
    signal: int,
    report: Report,
    watch: Stopwatch,
    checkpoints: Checkpoints,
    scene: Scene,
    gaussians: GaussianModel,
    density: AdaptiveDensityControl,
    pipe: PipelineParams,
) -> NoReturn:
    """Somebody asked the run to end after this iteration: leave what it takes to go on."""
    heal(gaussians, density, f"iteration {iteration}")
    report.flush()
    with watch.leave_out():
        path = checkpoints.write(iteration)
    scene.save(gaussians, iteration, pipe.antialiasing)
    report.log(
        f"Stopped after iteration {iteration}; the model and {path} are saved. To go on:",
        f"  {resume.how_to_resume(path.parent)}",
    )
    raise commands.Stopped(signal)


class Losses(NamedTuple):
    """Scalars on the device."""

    total: Tensor  # what backward starts from
    l1: Tensor
    depth: Tensor | None  # weighted; None where this view has no depth map to trust


def compare(
    out: Rendered,
    camera: Camera,
    gaussians: GaussianModel,
    model: ModelParams,
    opt: OptimizationParams,
    iteration: int,
) -> Losses:
    """Rendered view against photo: (1 - lambda) L1 + lambda (1 - SSIM), and against its depth map if it has
    one. Where a step is one native call this is not asked: a term of your own needs --no-fused.

    photometric_loss clamps the picture to [0, 1], as whoever looks at it will.
    """
    image = apply_exposure(out.image, gaussians.exposure(camera.name)) if model.train_test_exp else out.image
    total, l1 = photometric_loss(image, camera.image(), opt.lambda_dssim, camera.mask())

    depth, known = None, camera.inv_depth()
    weight = log_linear(iteration, opt.depth_l1_weight_init, opt.depth_l1_weight_final, opt.iterations)
    if known is not None and weight > 0:
        depth = weight * inverse_depth_loss(out.inv_depth, *known)
        total = total + depth
    return Losses(total, l1, depth)


def evaluate(
    report: Report,
    iteration: int,
    scene: Scene,
    gaussians: GaussianModel,
    pipe: PipelineParams,
    model: ModelParams,
) -> None:
    """All test views, and five train views."""

    def pair(camera: Camera) -> Pair:
        return render_pair(camera, gaussians, pipe, scene.background, model.train_test_exp)

    sets = {"test": scene.test_cameras, "train": spread(scene.train_cameras)}
    try:
        report.evaluate(iteration, sets, pair, gaussians.opacities.detach(), len(gaussians))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        report.log(f"out of memory: iteration {iteration} is not evaluated in full")


@torch.no_grad()
def viewed(request: Request, gaussians: GaussianModel, pipe: PipelineParams, background: Tensor) -> Tensor:
    """The picture a live viewer asks for. Its switches are for its pictures, not for training."""
    pipe = PipelineParams(
        convert_SHs_python=request.shs_python,
        compute_cov3D_python=request.rot_scale_python,
        antialiasing=pipe.antialiasing,
    )
    return render(request.camera, gaussians, pipe, background, request.scaling_modifier).image


def summarize(
    report: Report,
    watch: Stopwatch,
    started: float,
    count: int,
    iterations: int,
    device: torch.device,
    folder: Path,
) -> Summary:
    return Summary(
        iterations=iterations,
        gaussians=count,
        scores=report.told.scores,
        optimization_seconds=watch.seconds(),
        evaluation_and_saving_seconds=watch.left_out,
        total_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(device),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        model_path=str(folder),
        point_cloud=str(folder / "point_cloud" / f"iteration_{iterations}" / "point_cloud.ply"),
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(numpy_seed(seed))
    torch.manual_seed(seed)


def fix_the_order_of_sums() -> None:
    """The same bits from run to run on a GPU as well, in PyTorch's operators and in ours."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True)


def main(argv: list[str] | None = None) -> int:
    model, opt, pipe, run = parse_train(argv)
    torch.autograd.set_detect_anomaly(run.detect_anomaly)

    def work() -> None:
        folder = Path(model.model_path)
        with resume.alone_in(folder), failures_in_log(folder):
            train(model, opt, pipe, run)

    return commands.run("train.py", work)


if __name__ == "__main__":
    sys.exit(main())

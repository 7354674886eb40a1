"""One training iteration of a frozen model on a GPU: time by stage beside what the hardware allows.

    python benchmarks/gpu.py                      the synthetic scene gpu1m of rasterizer.py
    python benchmarks/gpu.py --scene point_cloud.ply --width 1297 --height 840

An iteration is what train.py runs by default: render, L1 + SSIM, backward, Adam over all rows, statistics.
The learning rates are zero, so that the model stays what it is; that saves no work. Views are cycled.

The limit of a stage is the larger of two times: the bytes it cannot avoid moving, at the measured speed of a
device copy, and the instructions it cannot avoid issuing, at one per lane and clock. The counters V, K, E
and F (see rasterizer.py) say how many of both there are.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diff_gaussian_rasterization import ScreenStats, TrainStep, rasterize
from rasterizer import SYNTHETIC, Scene, counters, from_ply, stage_times, synthetic
from torch import Tensor

from arguments import number
from arguments.flag import WIDEST

VIEWS = 20


def shifted(scene: Scene, view: int) -> Tensor:
    """The scene's camera, moved a little: another view of the same statistics."""
    camera = scene.world_to_camera.clone()
    camera[0, 3] += 0.02 * (view % 5 - 2)
    camera[1, 3] += 0.02 * (view // 5 - 2)
    return camera


class Iteration:
    """Training iterations, over and over, of a model that does not move."""

    def __init__(self, scene: Scene):
        self.scene = scene
        device = scene.means.device
        s = scene
        self.params = [s.means, s.sh_dc, s.sh_rest, s.opacities, s.scales, s.quats]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.cameras = [shifted(scene, i) for i in range(VIEWS)]
        self.background = torch.zeros(3, device=device)
        with torch.no_grad():
            pictures = [rasterize(**scene.arguments() | {"world_to_camera": c}).image for c in self.cameras]
        self.targets = [(p.clamp(0, 1) * 255).to(torch.uint8).flip(1).contiguous() for p in pictures]
        count = len(scene.means)
        self.stats = ScreenStats(torch.zeros(count, device=device), torch.zeros(count, device=device))
        self.step = TrainStep(VIEWS, device)
        self.done = 0

    def __call__(self) -> Tensor:
        view = self.done % VIEWS
        self.done += 1
        return self.step(
            self.params, *self.moments, [0.0] * 6, (0.9, 0.999), 1e-15, self.done,
            view=view, world_to_camera=self.cameras[view], K=self.scene.K, background=self.background,
            target=self.targets[view], mask=None, sh_degree=3, antialiasing=False, lambda_dssim=0.2,
            stats=self.stats,
        )  # fmt: skip

    def render(self) -> Tensor:
        self.done += 1
        camera = self.cameras[self.done % VIEWS]
        with torch.no_grad():
            return rasterize(**self.scene.arguments() | {"world_to_camera": camera}).image


def milliseconds(function, runs: int = 100, repeats: int = 10) -> float:
    """Median time of a call on the GPU."""
    durations = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            function()
        end.record()
        end.synchronize()
        durations.append(start.elapsed_time(end) / runs)
    return statistics.median(durations)


def host_milliseconds(function, runs: int = 20, repeats: int = 10) -> float:
    """The host's time to start a call while the GPU still has work enough to keep its queue short of full."""
    durations = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(runs):
            function()
        durations.append(1e3 * (time.perf_counter() - begin) / runs)
    return statistics.median(durations)


def waits_for_the_gpu(iteration: Iteration, runs: int = 99) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(runs):
            iteration()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


# ---- what the hardware allows -----------------------------------------------------------------------


@dataclass
class Hardware:
    bytes_per_s: float  # of a device copy, read and written
    lanes_per_s: float  # instructions of a lane

    @staticmethod
    def measured() -> "Hardware":
        a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        copy = milliseconds(lambda: b.copy_(a), runs=10, repeats=5)
        p = torch.cuda.get_device_properties(0)
        clock = getattr(p, "clock_rate", 1_755_000) * 1e3  # kHz
        return Hardware(2 * a.numel() / copy * 1e3, p.multi_processor_count * 128 * clock)


# Kernels by stage, as substrings of their names.
STAGES = {
    "preprocess": ["preprocess_kernel"],
    "sort, lists": ["DeviceRadixSort", "emit_", "ranges_kernel"],
    "blend forward": ["blend_forward"],
    "loss": ["ssim_"],
    "blend backward": ["blend_backward"],
    "backward + Adam": ["preprocess_backward_adam"],
}


def limits(count: dict[str, float], pixels: int, hardware: Hardware) -> dict[str, float]:
    """Milliseconds by stage."""
    N, V, K, E, F = (count[k] for k in "NVKEF")
    data = {
        "preprocess": 12 * N + V * (224 + 56),
        "sort, lists": V * 68 + K * 38,
        "loss": 100 * pixels,
        "backward + Adam": V * 72 + N * 1416,
    }
    lanes = {
        "blend forward": pixels * ((E - F) * 12 + F * 20 + E * 4.5),
        "blend backward": pixels * ((E - F) * 14 + F * 45 + E * 4.5),
        "loss": 530 * pixels * 3,
    }
    return {
        stage: 1e3
        * max(data.get(stage, 0) / hardware.bytes_per_s, lanes.get(stage, 0) / hardware.lanes_per_s)
        for stage in STAGES
    }


def by_stage(kernels: dict[str, float]) -> dict[str, float]:
    times = dict.fromkeys([*STAGES, "clearing"], 0.0)
    for name, ms in kernels.items():
        stage = next((s for s, parts in STAGES.items() if any(p in name for p in parts)), "clearing")
        times[stage] += ms
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scene", default="gpu1m", help=f"{', '.join(SYNTHETIC)}, or a .ply")
    parser.add_argument("--width", type=number(int, 1, WIDEST), default=1297, help="of the image, for a .ply")
    parser.add_argument("--height", type=number(int, 1, WIDEST), default=840)
    parser.add_argument("--kernels", action="store_true", help="list every kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; benchmarks/cpu.py is for CPUs")
    if args.scene in SYNTHETIC:
        scene = synthetic(SYNTHETIC[args.scene], "cuda")
    else:
        scene = from_ply(Path(args.scene), args.width, args.height, "cuda")

    hardware, count = Hardware.measured(), counters(scene)
    iteration = Iteration(scene)
    for _ in range(3 * VIEWS):
        iteration()
    torch.cuda.reset_peak_memory_stats()
    gpu = milliseconds(iteration)
    host = host_milliseconds(iteration)
    peak = torch.cuda.max_memory_allocated() / 1e6
    waits = waits_for_the_gpu(iteration)
    kernels = stage_times(iteration, "cuda", 2 * VIEWS)
    forward = milliseconds(iteration.render)
    forward_kernels = sum(stage_times(iteration.render, "cuda", 2 * VIEWS).values())

    print(f"{torch.cuda.get_device_name()}, {hardware.bytes_per_s / 1e12:.2f} TB/s copy")
    print(f"{args.scene} at {scene.width}x{scene.height}: N {count['N']:,}, V {count['V']:,}, ", end="")
    print(f"K {count['K']:,.0f}, E {count['E']:.0f}, F {count['F']:.0f}\n")
    limit = limits(count, scene.width * scene.height, hardware)
    print(f"| {'stage':<16} | ms    | limit | share |\n|---|---|---|---|")
    for stage, ms in by_stage(kernels).items():
        if stage in limit:
            print(f"| {stage:<16} | {ms:.3f} | {limit[stage]:.3f} | {limit[stage] / max(ms, 1e-9):>4.0%}  |")
        else:
            print(f"| {stage:<16} | {ms:.3f} |       |       |")
    total, whole = sum(kernels.values()), sum(limit.values())
    print(f"| {'kernels':<16} | {total:.3f} | {whole:.3f} | {whole / total:>4.0%}  |")
    waiting = "waits" if waits else "never waits"
    print(f"\niteration        {gpu:.3f} ms; host {host:.3f} ms, {waiting} for the GPU")
    print(f"forward only     {forward:.3f} ms, {1e3 / forward:,.0f} per second", end="")
    print(f"; kernels {forward_kernels:.3f} ms")
    print(f"peak memory      {peak:,.0f} MB")
    if args.kernels:
        for name, ms in sorted(kernels.items(), key=lambda item: -item[1]):
            print(f"    {1e3 * ms:8.1f} us  {name}")


if __name__ == "__main__":
    main()

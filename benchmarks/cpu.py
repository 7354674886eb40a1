"""A training iteration on a CPU: by instruction set and threads, by stage, and beside a plain scalar loop.

    python benchmarks/cpu.py

The scene is cpu50k of rasterizer.py: 50,000 splats of degree 3, 400x300. An iteration is what train.py runs
by default: render, L1 + SSIM, backward, Adam over all rows, statistics; learning rates are zero, which saves
no work. The baseline is plain.cpp, compiled here: the same maths, one splat and one pixel after the other, on
one thread. It has to give the same image and the same gradients before it is timed.

Machines are shared and their speed wanders: all variants take turns, so that the ratios hold where the times
may not. Times are medians, the least beside them.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diff_gaussian_rasterization import FusedAdam, photometric_loss, rasterize
from gpu import Iteration
from rasterizer import SYNTHETIC, Scene, counters, synthetic
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "submodules/diff-gaussian-rasterization/csrc"
ROUNDS, RUNS = 6, 8  # turns, and runs per turn


def compile_plain(folder: Path) -> ctypes.CDLL:
    """plain.cpp with the flags that the package is compiled with, for any x86-64 or ARM."""
    library = folder / "plain.so"
    flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run(
        [os.environ.get("CXX", "g++"), *flags, str(HERE / "plain.cpp"), "-o", str(library)], check=True
    )
    plain = ctypes.CDLL(str(library))
    plain.plain_step.restype = ctypes.c_float
    return plain


class Plain:
    """The baseline on the data of an Iteration."""

    def __init__(self, library: ctypes.CDLL, iteration: Iteration):
        self.library, self.it = library, iteration
        s = iteration.scene
        self.image = torch.empty(3, s.height, s.width)

    def __call__(self, target: Tensor | None) -> None:
        """One step from view 0; without a target only the picture."""
        it, s = self.it, self.it.scene
        lists = [(ctypes.c_void_p * 6)(*(t.data_ptr() for t in ts)) for ts in (it.params, *it.moments)]

        def p(t: Tensor | None):
            return ctypes.c_void_p(None if t is None else t.data_ptr())

        self.library.plain_step(
            ctypes.c_int64(len(s.means)), s.width, s.height, *lists, (ctypes.c_float * 6)(), 1,
            p(it.cameras[0]), p(s.K), p(it.background), p(target), p(it.stats.grad_norm_sum),
            p(it.stats.visits), p(self.image),
        )  # fmt: skip

    def check(self) -> None:
        """The same image and, seen through the first moments, the same gradients as ours."""
        it, args = self.it, self.it.scene.arguments()
        self(it.targets[0])
        leaves = [t.clone().requires_grad_() for t in it.params]
        names = ("means", "sh_dc", "sh_rest", "opacities", "scales", "quats")
        image = rasterize(**args | dict(zip(names, leaves)) | {"world_to_camera": it.cameras[0]}).image
        photometric_loss(image, it.targets[0])[0].backward()
        error = (image.detach() - self.image).norm() / image.detach().norm()
        assert error < 1e-4 and image.std() > 0.05, f"image: {error:.1e}"
        for name, leaf, moment in zip(names, leaves, it.moments[0]):
            error = (10 * moment - leaf.grad).norm() / leaf.grad.norm()
            assert error < 1e-3, f"gradient of {name}: {error:.1e}"


def forward(scene: Scene) -> None:
    with torch.no_grad():
        rasterize(**scene.arguments())


def milliseconds(function: Callable, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def take_turns(variants: list[tuple[str, int]], iteration: Iteration, plain: Plain) -> dict:
    """(instruction set, threads) -> (times of rendering, times of iterations); "plain" is one of them."""
    times = {variant: ([], []) for variant in variants + [("plain", 1)]}
    for _ in range(ROUNDS):
        for isa, threads in variants:
            torch.ops.tilesplat.set_cpu_isa(isa)
            torch.set_num_threads(threads)
            runs = RUNS if isa != "scalar" else 1
            milliseconds(iteration, 1)
            times[isa, threads][0].extend(milliseconds(lambda: forward(iteration.scene), runs))
            times[isa, threads][1].extend(milliseconds(iteration, runs))
        times["plain", 1][0].extend(milliseconds(lambda: plain(None), 1))
        times["plain", 1][1].extend(milliseconds(lambda: plain(iteration.targets[0]), 1))
    torch.ops.tilesplat.set_cpu_isa("")
    return times


def stage_times(function: Callable, runs: int) -> dict[str, float]:
    """Median milliseconds of each stage, and of the whole call."""
    rows = []
    for _ in range(runs):
        torch.ops.tilesplat.cpu_stage_times()  # starts from zero
        total = milliseconds(function, 1)[0]
        names, elapsed, _ = torch.ops.tilesplat.cpu_stage_times()
        rows.append({n: ms for n, ms in zip(names, elapsed) if ms > 0} | {"all": total})
    return {name: statistics.median(row[name] for row in rows) for name in rows[-1]}


def separate_step(iteration: Iteration) -> Callable:
    """The same iteration from its parts, whose backward pass and Adam have clocks of their own."""
    scene = iteration.scene
    names = ("means", "sh_dc", "sh_rest", "opacities", "scales", "quats")
    leaves = {name: p.clone().requires_grad_() for name, p in zip(names, iteration.params)}
    optimizer = FusedAdam(list(leaves.values()), lr=0.0)

    def step():
        optimizer.zero_grad(set_to_none=True)
        image = rasterize(**scene.arguments() | leaves, stats=iteration.stats).image
        photometric_loss(image, iteration.targets[0])[0].backward()
        optimizer.step()

    return step


def machine() -> str:
    """What the machine gives: float32 matrix products on one core, and copies of what no cache holds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    a = torch.randn(1024, 1024)
    torch.set_num_threads(1)
    flops = 2 * 1024**3 / min(milliseconds(lambda: a @ a, 10)) / 1e6
    torch.set_num_threads(threads)
    source, sink = torch.zeros(2, 1 << 26)
    bandwidth = 2 * source.nbytes / min(milliseconds(lambda: sink.copy_(source), 5)) / 1e6
    speed = f"{flops:.0f} GFLOP/s a core in matrix products, copies at {bandwidth:.0f} GB/s"
    return f"{name}, {threads} threads; {speed}"


def show(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({min(times):.1f})"


def print_variants(times: dict, best: str, threads: int) -> None:
    medians = {variant: [statistics.median(t) for t in pair] for variant, pair in times.items()}
    fastest, plain = medians[best, threads], medians["plain", 1]
    print("| instruction set | threads | forward ms | iteration ms | to the best | plain loop takes |")
    print("|---|---|---|---|---|---|")
    for (isa, count), pair in times.items():
        mine = medians[isa, count]
        print(
            f"| {isa} | {count} | {show(pair[0])} | {show(pair[1])} | {mine[1] / fastest[1]:.2f} times "
            f"| forward {plain[0] / mine[0]:.0f}, iteration {plain[1] / mine[1]:.0f} times |"
        )


def print_stages(fused: dict[str, float], separate: dict[str, float]) -> None:
    print("| stage | ms | share |\n|---|---|---|")
    inside = 0.0
    for name, ms in fused.items():
        if name == "all":
            continue
        inside += ms
        parts = ""
        if name == "project_backward":
            name += " and adam"
            parts = f" (apart: {separate['project_backward']:.2f} and {separate['adam']:.2f})"
        print(f"| {name} | {ms:.2f}{parts} | {ms / fused['all']:.0%} |")
    print(f"| outside | {fused['all'] - inside:.2f} | {1 - inside / fused['all']:.0%} |")
    print(f"| iteration | {fused['all']:.2f} | |")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    threads = torch.get_num_threads()
    scene = synthetic(SYNTHETIC["cpu50k"], "cpu")
    count = counters(scene)
    print(f"{machine()}; cpu50k, {scene.width}x{scene.height}")
    print(
        f"N {count['N']:,}, V {count['V']:,}, K {count['K']:,.0f}, E {count['E']:.0f}, F {count['F']:.0f}\n"
    )
    iteration = Iteration(scene)
    isas = torch.ops.tilesplat.cpu_isas()
    variants = (
        [(isas[0], threads)] + ([(isas[0], 1)] if threads > 1 else []) + [(isa, threads) for isa in isas[1:]]
    )
    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(compile_plain(Path(folder)), iteration)
        plain.check()
        times = take_turns(variants, iteration, plain)
    print_variants(times, isas[0], threads)
    print()
    torch.set_num_threads(threads)
    print_stages(stage_times(iteration, 40), stage_times(separate_step(iteration), 20))


if __name__ == "__main__":
    main()

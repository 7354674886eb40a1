"""How fast is the rasterizer, where does the time go, and how much work was there?

    python benchmarks/rasterizer.py                                     cpu50k on the CPU, gpu1m on a GPU
    python benchmarks/rasterizer.py --device cuda --scene gpu1m
    python benchmarks/rasterizer.py --scene point_cloud.ply --width 1297 --height 840

Medians of repeated runs. The counters describe the scene, independently of any implementation:
    N   Gaussians                            V   those with radius > 0
    K   pairs of splat and 16x16 tile in which some pixel reaches alpha 1/255
    E   pairs of pixel and splat in 8x4 blocks of pixels where some pixel reaches alpha 1/255, per pixel
    F   pairs that contribute color, per pixel
K, E and F are counted on sampled tiles by the reference, in plain PyTorch.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diff_gaussian_rasterization import FusedAdam, photometric_loss, rasterize, reference
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import number  # noqa: E402
from arguments.flag import WIDEST  # noqa: E402
from utils.geometry import morton_codes  # noqa: E402

SH_DEGREE = 3


@dataclass
class Scene:
    """Raw parameters, as a trainer holds them, and one camera."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3] logarithms
    opacities: Tensor  # [N, 1] logits
    sh_dc: Tensor  # [N, 1, 3]
    sh_rest: Tensor  # [N, 15, 3]
    world_to_camera: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    width: int
    height: int

    def parameters(self) -> list[Tensor]:
        return [self.means, self.quats, self.scales, self.opacities, self.sh_dc, self.sh_rest]

    def arguments(self) -> dict:
        return {
            "means": self.means, "quats": self.quats, "scales": self.scales, "opacities": self.opacities,
            "sh_dc": self.sh_dc, "sh_rest": self.sh_rest, "world_to_camera": self.world_to_camera,
            "K": self.K, "width": self.width, "height": self.height, "sh_degree": SH_DEGREE, "raw": True,
            "background": torch.zeros(3, device=self.means.device),
        }  # fmt: skip


# ---- scenes -----------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """What a synthetic scene is made to: splats fill the view between two depths, some lie outside it."""

    count: int
    width: int
    height: int
    pixels: float  # median standard deviation on the screen
    visible: float  # share of splats inside the image
    spread: float = 0.5  # of the logarithm of the sizes
    opacity: float = 0.0  # mean logit
    opacity_spread: float = 1.5


SYNTHETIC = {
    # 50,000 splats at 400x300, about 57 contributions per pixel
    "cpu50k": Statistics(50_000, 400, 300, pixels=2.13, visible=1.0, opacity=-2.2, opacity_spread=1.0),
    # what a trained outdoor scene of a million looks like: V 0.6 M, K 2.5 M, E about 120, F about 50
    "gpu1m": Statistics(
        1_000_000, 1297, 840, pixels=2.0, visible=0.6, spread=0.75, opacity=1.0, opacity_spread=2.0
    ),
}


def synthetic(s: Statistics, device: str) -> Scene:
    """Splats of random shape, uniform over the image and in depth; the invisible are behind the camera."""
    g = torch.Generator().manual_seed(0)
    focal = 0.9 * s.width
    z = 2 + 8 * torch.rand(s.count, 1, generator=g)
    place = torch.rand(s.count, 2, generator=g) - 0.5
    x, y = (place[:, i : i + 1] * size / focal * z for i, size in ((0, s.width), (1, s.height)))
    size = math.log(s.pixels / focal) + z.log() + s.spread * torch.randn(s.count, 3, generator=g)
    hidden = torch.rand(s.count, 1, generator=g) >= s.visible
    view = torch.eye(4)
    K = torch.tensor([[focal, 0, s.width / 2], [0, focal, s.height / 2], [0, 0, 1]])
    tensors = [
        torch.cat([x, y, torch.where(hidden, -z, z)], 1),
        torch.randn(s.count, 4, generator=g),
        size,
        s.opacity + s.opacity_spread * torch.randn(s.count, 1, generator=g),
        torch.randn(s.count, 1, 3, generator=g),
        0.1 * torch.randn(s.count, (SH_DEGREE + 1) ** 2 - 1, 3, generator=g),
        view,
        K,
    ]
    order = morton_codes(tensors[0]).argsort(stable=True)  # as training leaves them
    tensors[:6] = (t[order] for t in tensors[:6])
    return Scene(*(t.to(device).contiguous() for t in tensors), s.width, s.height)


def from_ply(path: Path, width: int, height: int, device: str) -> Scene:
    """A trained model, seen from outside its middle: half of its Gaussians lie within 60 degrees."""
    import numpy as np
    from plyfile import PlyData

    v = PlyData.read(str(path))["vertex"]

    def columns(*names):
        return torch.from_numpy(np.stack([np.asarray(v[n], dtype=np.float32) for n in names], 1))

    rest = sorted((n for n in v.data.dtype.names if n.startswith("f_rest_")), key=lambda n: int(n[7:]))
    if len(rest) != 45:
        raise SystemExit(f"{path} must have 45 f_rest properties (degree 3), got {len(rest)}")
    means = columns("x", "y", "z")
    middle = means.median(0).values
    radius = (means - middle).norm(dim=1).median().item()
    view = torch.eye(4)
    view[:3, 3] = -middle + torch.tensor([0, 0, 1.7 * radius])
    focal = 0.9 * width
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    tensors = [
        means, columns(*(f"rot_{i}" for i in range(4))), columns(*(f"scale_{i}" for i in range(3))),
        columns("opacity"), columns(*(f"f_dc_{i}" for i in range(3)))[:, None],
        columns(*rest).reshape(-1, 3, 15).transpose(1, 2), view, K,
    ]  # fmt: skip
    return Scene(*(t.to(device).contiguous() for t in tensors), width, height)


# ---- counters ---------------------------------------------------------------------------------------


@torch.no_grad()
def counters(scene: Scene, sampled_tiles: int = 48) -> dict[str, float]:
    """N, V, K, E, F. The last three from tiles sampled evenly; exact where there are no more tiles."""
    s = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in scene.arguments().items()}
    quats, scales = torch.nn.functional.normalize(s["quats"], dim=1), s["scales"].exp()
    # In pieces, to keep memory small.
    pieces = [
        reference.project(m, reference.covariance(q, c), o.sigmoid().flatten(), s["world_to_camera"], s["K"],
                          scene.width, scene.height, False)
        for m, q, c, o in zip(*(t.split(100_000) for t in (s["means"], quats, scales, s["opacities"])))
    ]  # fmt: skip
    columns = (None if c[0] is None else torch.cat(c) for c in zip(*pieces))
    splats = reference.Splats(*columns)
    order = splats.depths.argsort(stable=True)
    order = order[splats.radii[order] > 0]
    x0, y0, x1, y1 = splats.tiles[order].unbind(1)
    tiles_x, tiles_y = -(-scene.width // 16), -(-scene.height // 16)
    step = max(1, tiles_x * tiles_y // sampled_tiles)
    chosen = range(step // 2, tiles_x * tiles_y, step)
    entries = evaluated = contributing = pixels = 0
    for tile in chosen:
        tx, ty = tile % tiles_x, tile // tiles_x
        ids = order[(x0 <= tx) & (tx < x1) & (y0 <= ty) & (ty < y1)]
        alpha, done_at = _tile_alphas(splats, ids, tx, ty, scene.width, scene.height)  # [h, w, M]
        reaches = alpha >= reference.ALPHA_MIN
        entries += reaches.flatten(0, 1).any(0).sum().item()
        for top in range(0, alpha.shape[0], 4):
            for left in range(0, alpha.shape[1], 8):
                block = reaches[top : top + 4, left : left + 8].flatten(0, 1)
                last = done_at[top : top + 4, left : left + 8].max()  # the block goes on until all are done
                evaluated += block.any(0)[: int(last)].sum().item() * len(block)
        contributing += (reaches & (torch.arange(len(ids)) < done_at[..., None])).sum().item()
        pixels += alpha[..., 0].numel() if len(ids) else done_at.numel()
    return {
        "N": len(s["means"]),
        "V": len(order),
        "K": entries * tiles_x * tiles_y / len(chosen),
        "E": evaluated / pixels,
        "F": contributing / pixels,
    }


def _tile_alphas(splats, ids: Tensor, tx: int, ty: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Alpha of each splat at each pixel of a tile [h, w, M]; how many splats each pixel looks at [h, w]."""
    w, h = min(16, width - 16 * tx), min(16, height - 16 * ty)
    x = torch.arange(w) + 16 * tx + 0.5
    y = torch.arange(h) + 16 * ty + 0.5
    dx = x[None, :, None] - splats.means2d[ids, 0]
    dy = y[:, None, None] - splats.means2d[ids, 1]
    xx, xy, yy = splats.conics[ids].unbind(1)
    alpha = splats.opacities[ids] * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
    alpha = alpha.clamp_max(reference.ALPHA_MAX)
    passing = torch.cumprod(1 - torch.where(alpha >= reference.ALPHA_MIN, alpha, 0), dim=2)
    return alpha, (passing >= reference.STOP_AT).sum(2)


# ---- time and memory --------------------------------------------------------------------------------


def median_ms(function, device: str, seconds: float) -> float:
    """Median duration over as many runs as fit, at least five; the first two are not counted."""
    durations = []
    end = None
    while len(durations) < 7 or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        durations.append(1e3 * (time.perf_counter() - start))
        end = end or time.perf_counter() + seconds
    return statistics.median(durations[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def stage_times(function, device: str, runs: int = 10) -> dict[str, float]:
    """Mean milliseconds by stage: CUDA kernels from the profiler, the CPU by its own clock."""
    if device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(runs):
                function()
            _wait(device)
        times: dict[str, float] = {}
        for event in profiler.key_averages():
            if event.self_device_time_total > 0:
                name = _short(event.key)
                times[name] = times.get(name, 0) + event.self_device_time_total / 1e3 / runs
        return times
    if not hasattr(torch.ops.tilesplat, "cpu_stage_times"):
        return {}
    torch.ops.tilesplat.cpu_stage_times()  # starts from zero
    for _ in range(runs):
        function()
    names, elapsed, _ = torch.ops.tilesplat.cpu_stage_times()
    return {name: ms / runs for name, ms in zip(names, elapsed) if ms > 0}


def _short(kernel: str) -> str:
    """`void gs::cuda::(anonymous namespace)::blend_forward_kernel<...>(...)` -> `blend_forward_kernel`"""
    name = kernel.replace("(anonymous namespace)::", "").split("<")[0].split("(")[0].removeprefix("void ")
    return name.rsplit("::", 1)[-1]


def peak_memory_mb(function, device: str) -> float:
    """CUDA: most that was allocated during one call. CPU: the process's largest resident size so far."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated() / 2**20
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---- the table --------------------------------------------------------------------------------------


def measure(scene: Scene, device: str, seconds: float) -> list[tuple[str, str]]:
    """Rows of the table."""
    rows = []
    with torch.no_grad():
        image = rasterize(**scene.arguments()).image
        forward = median_ms(lambda: rasterize(**scene.arguments()), device, seconds)
    target = (image.clamp(0, 1) * 255).to(torch.uint8).flip(1).contiguous()
    for parameter in scene.parameters():
        parameter.requires_grad_()
    cotangent = torch.randn_like(image)

    def forward_backward():
        for parameter in scene.parameters():
            parameter.grad = None
        rasterize(**scene.arguments()).image.backward(cotangent)

    both = median_ms(forward_backward, device, seconds)
    leaf = image.clone().requires_grad_()
    loss = median_ms(lambda: photometric_loss(leaf, target)[0].backward(), device, seconds / 4)
    optimizer = FusedAdam(scene.parameters(), lr=0.0)
    adam = median_ms(optimizer.step, device, seconds / 4)
    rows += [
        ("forward, no gradient", f"{forward:.3f} ms"),
        ("forward + backward", f"{both:.3f} ms"),
        ("L1 + SSIM, both ways", f"{loss:.3f} ms"),
        ("Adam, all parameters", f"{adam:.3f} ms"),
        ("sum: one iteration", f"{both + loss + adam:.3f} ms"),
    ]
    rows += [(f"  {name}", f"{ms:.3f} ms") for name, ms in stage_times(forward_backward, device).items()]
    rows.append(("peak memory", f"{peak_memory_mb(forward_backward, device):,.0f} MB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=best)
    parser.add_argument("--scene", help=f"{', '.join(SYNTHETIC)}, or a .ply (default: cpu50k or gpu1m)")
    parser.add_argument("--width", type=number(int, 1, WIDEST), default=1297, help="of the image, for a .ply")
    parser.add_argument("--height", type=number(int, 1, WIDEST), default=840)
    parser.add_argument(
        "--seconds", type=number(float, 0, 3600), default=2.0, help="to spend on each measurement"
    )
    parser.add_argument("--threads", type=number(int, 1, 1024), help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.scene or ("gpu1m" if args.device == "cuda" else "cpu50k")
    if name in SYNTHETIC:
        scene = synthetic(SYNTHETIC[name], args.device)
    elif name.endswith(".ply") and Path(name).exists():
        scene = from_ply(Path(name), args.width, args.height, args.device)
    else:
        raise SystemExit(f"--scene must be {', '.join(SYNTHETIC)} or an existing .ply, got {name}")

    count = counters(scene)
    where = torch.cuda.get_device_name() if args.device == "cuda" else (
        f"{torch.ops.tilesplat.cpu_isa()}, {torch.get_num_threads()} threads"
    )  # fmt: skip
    rows = [
        ("scene", f"{name}, {scene.width}x{scene.height}"),
        ("device", f"{args.device}: {where}"),
        ("N, V, K", f"{count['N']:,}, {count['V']:,}, {count['K']:,.0f}"),
        ("E, F per pixel", f"{count['E']:.0f}, {count['F']:.0f}"),
        *measure(scene, args.device, args.seconds),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"| {label:<{width}} | {value:>28} |")


if __name__ == "__main__":
    main()

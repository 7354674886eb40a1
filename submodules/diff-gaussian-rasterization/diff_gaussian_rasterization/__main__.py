"""`python -m diff_gaussian_rasterization`: what was built, and does it work here?

Each backend, and on the CPU each instruction set, renders and differentiates a small scene and is held
against reference.py in float64: about a second for all. Exit status 1 when one fails.
"""

from __future__ import annotations

import functools
import math
import sys
import time

import torch

from . import _library, rasterize, reference

IMAGE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # relative norm


def main() -> int:
    """Print the report; 0 if all is well."""
    info = _library.build_info()
    isas = torch.ops.tilesplat.cpu_isas()
    cuda = f"CUDA {info['cuda']}, for {', '.join(info['cuda_archs'])}" if info.get("cuda") else "not built"
    print(f"diff-gaussian-rasterization {info.get('version', '?')}")
    print(f"  built with   torch {info.get('torch', '?')}, {info.get('compiler', '?')}")
    print(f"  running on   torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"  CPU          {torch.ops.tilesplat.cpu_isa()} in use of {', '.join(isas)}; "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"  CUDA         {cuda}; {_gpu()}")

    good = [check("cpu", isa) for isa in isas]
    if info.get("cuda") and torch.cuda.is_available():
        good.append(check("cuda"))
    return 0 if all(good) else 1


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU here"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def check(device: str, isa: str = "") -> bool:
    """Hold one backend against the reference; print the verdict. `isa` as for set_cpu_isa."""
    start = time.perf_counter()
    name = f"{device} {isa}".strip()
    try:
        torch.ops.tilesplat.set_cpu_isa(isa)
        truth, true_grads = _truth()
        image, grads = _render(rasterize, device, torch.float32)
    except Exception as error:
        print(f"  self-check   {name}: FAILED: {error}")
        return False
    finally:
        torch.ops.tilesplat.set_cpu_isa("")
    image_error = (image - truth).abs().max().item()
    gradient_error = max(((g - t).norm() / t.norm()).item() for g, t in zip(grads, true_grads))
    good = image_error < IMAGE_TOLERANCE and gradient_error < GRADIENT_TOLERANCE and truth.std() > 0.05
    print(f"  self-check   {name}: {'ok' if good else 'FAILED'}, image within {image_error:.1e}, gradients "
          f"within {gradient_error:.1e} of the reference ({time.perf_counter() - start:.1f} s)")  # fmt: skip
    return good


@functools.cache
def _truth():
    return _render(reference.rasterize, "cpu", torch.float64)


def _render(rasterize, device: str, dtype: torch.dtype):
    """A scene of 200 splats: its image, and the gradients of a random sum over it; float64 on the CPU."""
    random = torch.Generator().manual_seed(0)
    count, width, height = 200, 75, 53

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(device, dtype)

    leaves = [
        normal(count, 3) * 0.7,  # means
        torch.nn.functional.normalize(normal(count, 4), dim=1),
        torch.exp(0.5 * normal(count, 3)) * 0.08,  # scales
        torch.sigmoid(normal(count, 1)),  # opacities
        normal(count, 1, 3),  # sh_dc
        normal(count, 15, 3) * 0.2,  # sh_rest
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    view = torch.eye(4, device=device, dtype=dtype)
    view[2, 3] = 3
    focal = width / (2 * math.tan(0.5))
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], device=device, dtype=dtype)
    means, quats, scales, opacities, sh_dc, sh_rest = leaves
    out = rasterize(
        means, quats, scales, opacities, sh_dc=sh_dc, sh_rest=sh_rest, world_to_camera=view, K=K, width=width,
        height=height, background=torch.tensor([0.2, 0.4, 0.6], device=device, dtype=dtype), sh_degree=3,
    )  # fmt: skip
    grads = torch.autograd.grad((out.image * normal(3, height, width)).sum(), leaves)
    return out.image.detach().cpu().double(), [grad.cpu().double() for grad in grads]


if __name__ == "__main__":
    sys.exit(main())

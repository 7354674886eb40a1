"""The operators dealt_project, dealt_lists, dealt_blend and dealt_step in PyTorch: twins of the kernels.

Records hold other numbers than a GPU's, which only these look into.
"""

import math

import torch
from diff_gaussian_rasterization import photometric_loss
from diff_gaussian_rasterization.stages import Projected, blend, lists, project, sh_colors
from torch import Tensor

from utils.geometry import camera_center

FIELDS = [2, 3, 1, 1, 3, 1, 1]  # center, conic, opacity, depth, color, radius, row; and nothing more
GRADS = [2, 3, 1, 3, 2, 1]  # center, conic, opacity, color, absolute; nothing


def register() -> torch.library.Library:
    """For as long as what is returned lives."""
    library = torch.library.Library("tilesplat", "IMPL")
    for function in (dealt_project, dealt_lists, dealt_blend, dealt_step):
        library.impl(function.__name__, function, "CPU")
    return library


def screen_of(params, world_to_camera, K, width, height, sh_degree, antialiasing) -> tuple[Projected, Tensor]:
    means, sh_dc, sh_rest, opacities, scales, quats = params
    screen = project(
        means, quats, scales, opacities, world_to_camera=world_to_camera, K=K, width=width, height=height,
        raw=True, compensation="antialiasing" if antialiasing else "none",
    )  # fmt: skip
    return screen, sh_colors(means, sh_dc, sh_rest, camera_center(world_to_camera), sh_degree)


def dealt_project(
    params, exp_avg, exp_avg_sq, lrs, beta1, beta2, eps, step, world_to_camera, K, widths, heights, sh_degree,
    antialiasing, rank, ranks, capacity, moved_at=None, missed=None,
):  # fmt: skip
    means = params[0]
    totals, slots = torch.zeros(len(K), 4, dtype=torch.int64), torch.full((len(K), len(means)), -1).int()
    records = means.new_zeros(capacity, 16)
    for c, camera in enumerate(zip(world_to_camera, K, widths, heights)):
        screen, colors = screen_of(params, *camera, sh_degree, antialiasing)
        rows, begin = (screen.radii > 0).nonzero()[:, 0], int(totals[:c, 1].sum())
        totals[c, 1] = len(rows)
        rows = rows[: max(capacity - begin, 0)]
        slots[c, rows] = 8 * (begin + torch.arange(len(rows)).int())
        parts = [*screen[:2], screen.opacities[:, None], screen.depths[:, None], colors]
        parts += [screen.radii[:, None].to(means), torch.arange(len(means))[:, None].to(means) * ranks + rank]
        records[begin : begin + len(rows), :12] = torch.cat(parts, 1)[rows]
    return records, slots, totals


def dealt_lists(records, counts, width, height):
    splats = records[:, :12].clone()
    rows = splats[:, 11]
    assert sum(counts) == len(records)
    assert all((part[1:] > part[:-1]).all() for part in rows.split(counts))
    records.fill_(math.nan)  # nobody is to look into them again
    return splats, rows.argsort().int(), torch.zeros(0, dtype=torch.int32), torch.tensor([width, height])


def dealt_blend(
    splats, ids, ranges, totals, background, target, mask, lambda_dssim, absolute, losses
):  # fmt: skip
    center, conic, opacity, depth, color, radius, _ = splats[ids].split(FIELDS, 1)
    leaves = [v.clone().requires_grad_() for v in (center, conic, opacity[:, 0], color)]
    leaves.append(torch.zeros_like(center).requires_grad_())
    assert totals.tolist() == [target.shape[2], target.shape[1]]
    with torch.enable_grad():
        screen = Projected(*leaves[:3], depth[:, 0].contiguous(), radius[:, 0].int(), *totals.tolist())
        image = blend(screen, leaves[3], lists(screen), background, leaves[4] if absolute else None).image
        loss, l1 = photometric_loss(image, target, lambda_dssim, mask)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    losses.copy_(torch.stack([loss.detach(), l1.detach()]))
    parts = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads)]
    found = splats.new_zeros(len(splats), 12)
    found[ids.long(), :11] = torch.cat([v.view(len(splats), n) for v, n in zip(parts, GRADS)], 1)
    return found


def dealt_step(
    params, exp_avg, exp_avg_sq, lrs, beta1, beta2, eps, step, world_to_camera, K, widths, heights, sh_degree,
    antialiasing, slots, grads, opacity_pull, scale_pull, grad_norm_sum, visits, abs_grad_norm_sum,
    moved_at=None, missed=None,
):  # fmt: skip
    total = [torch.zeros_like(value) for value in params]
    for c, camera in enumerate(zip(world_to_camera, K, widths, heights)):
        rows = (slots[c] >= 0).nonzero()[:, 0]
        g_center, g_conic, g_opacity, g_color, g_absolute, _ = grads[slots[c, rows].long() // 8].split(
            GRADS, 1
        )
        leaves = [value.detach().clone().requires_grad_() for value in params]
        with torch.enable_grad():
            screen, colors = screen_of(leaves, *camera, sh_degree, antialiasing)
            outputs = [v[rows] for v in (screen.means2d, screen.conics, screen.opacities, colors)]
            found = torch.autograd.grad(outputs, leaves, [g_center, g_conic, g_opacity[:, 0], g_color])
        total = [sum_ + grad / len(K) for sum_, grad in zip(total, found)]
        half = grads.new_tensor([camera[2] / 2, camera[3] / 2])
        for values, sums in ((g_center, grad_norm_sum), (g_absolute, abs_grad_norm_sum)):
            if sums is not None:
                sums.index_add_(0, rows, (values * half).norm(dim=1).to(sums))
        if visits is not None:
            visits.index_add_(0, rows, torch.ones(len(rows)))
    opacity = params[3].sigmoid()
    total[3] += opacity_pull * opacity * (1 - opacity)
    total[4] += scale_pull * params[4].exp()
    torch.ops.tilesplat.adam_step(params, total, exp_avg, exp_avg_sq, lrs, beta1, beta2, eps, step, None)

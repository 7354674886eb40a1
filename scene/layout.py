"""A picture of where the cameras of a data set are, and of its points: from above and from the side."""

import numpy as np
from PIL import Image, ImageDraw

from scene.points import PointCloud
from scene.readers.views import View

PANEL, MARGIN, HEADER = 700, 20, 24  # pixels
MAX_POINTS = 60_000
PAPER, INK, TRAIN, TEST = (255, 255, 255), (60, 60, 60), (30, 90, 200), (220, 60, 20)


def draw_layout(views: list[View], test: list[View], points: PointCloud | None) -> Image.Image:
    """`test`: those of the views that are drawn in another color."""
    held_out = set(test)
    axes = axes_of(np.array([view.world_to_camera for view in views]))  # right, forward, up; rows
    centers = np.array([view.center for view in views]) @ axes.T
    cloud, colors = _visible(points, axes, centers)
    low, high = _bounds(centers, cloud)
    scale = (PANEL - 2 * MARGIN) / max((high - low).max(), 1e-9)
    picture = Image.new("RGB", (2 * PANEL, PANEL + HEADER), PAPER)
    draw = ImageDraw.Draw(picture)
    reach = 0.04 * (high - low).max()  # of the drawn pyramids
    for panel, (title, across, upwards) in enumerate((("from above", 0, 1), ("from the side", 0, 2))):
        middle = (low + high) / 2

        def place(xyz, across=across, upwards=upwards, panel=panel, middle=middle):
            x = panel * PANEL + PANEL / 2 + scale * (xyz[..., across] - middle[across])
            return np.stack([x, HEADER + PANEL / 2 - scale * (xyz[..., upwards] - middle[upwards])], -1)

        _dots(picture, place(cloud), colors, panel)
        for view in views:
            lines = _pyramid(view, axes, reach)
            for line in place(lines):
                draw.line([tuple(p) for p in line], TEST if view in held_out else TRAIN)
        draw.text((panel * PANEL + MARGIN, 6), title, INK)
    count = f"{len(views) - len(test)} train views (blue), {len(test)} test views (red)"
    count += f", {len(points or ()):,} points"
    draw.text((PANEL - 6 * len(count) - MARGIN, 6), count, INK)
    return picture


def axes_of(matrices: np.ndarray) -> np.ndarray:
    """Rows: across, forward, up, of cameras whose world_to_camera are [V, 4, 4]. Up is so for the average
    camera; across is where cameras spread most."""
    up = -matrices[:, 1, :3].mean(axis=0)
    up = up / np.linalg.norm(up) if np.linalg.norm(up) > 0.1 else np.array([0.0, -1, 0])
    centers = -(matrices[:, :3, :3].transpose(0, 2, 1) @ matrices[:, :3, 3:])[..., 0]
    flat = centers - centers.mean(axis=0)
    flat = flat - np.outer(flat @ up, up)
    across = np.linalg.svd(flat, full_matrices=True)[2][0]
    across = across - up * (across @ up)
    if np.linalg.norm(across) < 0.5:
        across = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    across /= np.linalg.norm(across)
    return np.stack([across, np.cross(up, across), up])


def _visible(
    points: PointCloud | None, axes: np.ndarray, centers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS of them, without those that are too far away to matter."""
    if points is None or not len(points):
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    chosen = np.random.RandomState(0).permutation(len(points))[:MAX_POINTS]
    xyz, colors = (
        points.xyz[chosen] @ axes.T,
        (points.rgb[chosen] * 200).astype(np.uint8),
    )  # darker, to be seen on white
    middle = np.median(xyz, axis=0)
    distance = np.linalg.norm(xyz - middle, axis=1)
    near = distance <= 4 * max(np.median(distance), np.linalg.norm(centers - middle, axis=1).max() / 4)
    return xyz[near], colors[near]


def _bounds(centers: np.ndarray, cloud: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = centers.min(axis=0), centers.max(axis=0)
    if len(cloud):
        inner = np.percentile(cloud, [2, 98], axis=0)
        low, high = np.minimum(low, inner[0]), np.maximum(high, inner[1])
    room = 0.05 * max((high - low).max(), 1e-6)
    return low - room, high + room


def _pyramid(view: View, axes: np.ndarray, reach: float) -> np.ndarray:
    """The eight edges [8, 2, 3] of what a camera sees, up to a depth of `reach`."""
    corners = np.array([(0, 0), (view.width, 0), (view.width, view.height), (0, view.height)], float)
    rays = np.linalg.solve(view.intrinsics, np.column_stack([corners, np.ones(4)]).T).T * reach
    corners = (view.center + rays @ view.world_to_camera[:3, :3]) @ axes.T
    tip = np.broadcast_to(view.center @ axes.T, (4, 3))
    return np.concatenate([np.stack([tip, corners], 1), np.stack([corners, np.roll(corners, 1, 0)], 1)])


def _dots(picture: Image.Image, places: np.ndarray, colors: np.ndarray, panel: int) -> None:
    x, y = places.astype(int).T
    inside = (x >= panel * PANEL) & (x < (panel + 1) * PANEL) & (y >= HEADER) & (y < HEADER + PANEL)
    pixels = np.array(picture)
    pixels[y[inside], x[inside]] = colors[inside]
    picture.paste(Image.fromarray(pixels))

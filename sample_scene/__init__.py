"""The sample scene: a still life on a terrace, ray traced by the project itself in seconds.

    python -m sample_scene data/sample              # 60 views in COLMAP form
    python -m sample_scene --help                   # Blender form, depth maps, masks, exposures, blur

It has what makes radiance fields worthwhile, and hard: marble, brick and wood; a copper ball that mirrors
what is around it; highlights on glaze and lacquer; spokes and iron rods a pixel wide; soft shadows; hills
and a sky.
The tests use the same generator, because it knows the exact answers.

Order of reading: shapes (what rays hit), materials (paint), light (sun and sky), garden (what stands where),
tracer (pictures), dataset (files).
"""

from .dataset import Options, Points, View, photograph, write_blender, write_colmap, write_depths
from .tracer import Camera, World, orbit

__all__ = [
    "Camera",
    "Options",
    "Points",
    "View",
    "World",
    "orbit",
    "photograph",
    "write_blender",
    "write_colmap",
    "write_depths",
]

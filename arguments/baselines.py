"""Flags of NeRF and voxel grids, under the names of nerf-pytorch and DirectVoxGO."""

from dataclasses import dataclass

from arguments.flag import arg


@dataclass
class FieldParams:
    """NeRF and voxel grids (--method nerf|dvgo; stored with the model)"""

    N_rand: int = arg(0, "rays of a step; 0: 4096 for nerf, 8192 for dvgo", minimum=0)
    chunk: int = arg(8192, "rays taken at a time when a picture is made", minimum=1)
    near: float = arg(0.0, "depth where rays begin; 0: 2 for Blender scenes, else by the points", minimum=0)
    far: float = arg(0.0, "depth where rays end; 0: 6 for Blender scenes, else by the points", minimum=0)
    bf16: bool = arg(False, "linear layers in bfloat16")
    # NeRF
    netdepth: int = arg(8, "nerf: layers", minimum=1)
    netwidth: int = arg(256, "nerf: channels of a layer", minimum=2)
    N_samples: int = arg(64, "nerf: coarse samples of a ray", minimum=3)
    N_importance: int = arg(128, "nerf: further samples for the fine network; 0: no fine one", minimum=0)
    perturb: bool = arg(True, "nerf: samples are drawn at random within their bins while training")
    use_viewdirs: bool = arg(True, "nerf, dvgo: colors depend on where one looks from")
    multires: int = arg(10, "nerf: octaves of the encoding of positions; -1: none", minimum=-1)
    multires_views: int = arg(4, "nerf: octaves of the encoding of directions; -1: none", minimum=-1)
    raw_noise_std: float = arg(0.0, "nerf: noise that is added to density while training", minimum=0)
    lrate: float = arg(5e-4, "nerf: learning rate", minimum=0)
    lrate_decay: float = arg(
        0.0, "thousands of steps to a tenth of the rate; 0: 500 (nerf), 20 (dvgo)", minimum=0
    )
    precrop_iters: int = arg(500, "nerf: first steps that see the middle of the photos only", minimum=0)
    precrop_frac: float = arg(0.5, "nerf: the fraction of height and width that is the middle", minimum=0.01)
    compile: bool = arg(False, "nerf: torch.compile the network")
    # DVGO
    coarse_iters: int = arg(10_000, "dvgo: steps of the coarse stage; the fine one has the rest", minimum=1)
    num_voxels_coarse: int = arg(1_024_000, "dvgo: voxels of the coarse stage", minimum=8)
    num_voxels: int = arg(4_096_000, "dvgo: voxels of the fine stage, at its end", minimum=8)
    pg_scale: list[int] = arg([1000, 2000, 3000], "dvgo: fine steps at which the number of voxels doubles")
    stepsize: float = arg(0.5, "dvgo: voxels from one sample to the next", minimum=0.01)
    alpha_init_coarse: float = arg(
        0.0, "dvgo: alpha of a voxel at the start, coarse; 0: 1e-6, for scenes without a box 1e-4", minimum=0
    )
    alpha_init: float = arg(1e-2, "dvgo: the same, fine", minimum=1e-12)
    fast_color_thres: float = arg(1e-4, "dvgo: fine samples of less alpha or weight are skipped", minimum=0)
    bbox_thres: float = arg(1e-3, "dvgo: coarse voxels of more alpha are in the fine box", minimum=0)
    mask_cache_thres: float = arg(
        1e-3, "dvgo: the fine stage has nothing where coarse alpha is less", minimum=0
    )
    world_bound_scale: float = arg(1.05, "dvgo: the fine box is enlarged by this factor", minimum=1)
    rgbnet_dim: int = arg(12, "dvgo: channels of the fine color grid", minimum=1)
    rgbnet_width: int = arg(128, "dvgo: channels of a layer of the color network", minimum=1)
    viewbase_pe: int = arg(4, "dvgo: octaves of the encoding of directions", minimum=0)
    lrate_density: float = arg(0.1, "dvgo: learning rate of the density grid", minimum=0)
    lrate_k0: float = arg(0.1, "dvgo: learning rate of the color grid", minimum=0)
    lrate_rgbnet: float = arg(1e-3, "dvgo: learning rate of the color network", minimum=0)

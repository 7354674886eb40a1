"""LPIPS (Zhang et al. 2018): distance of two pictures as a deep network sees them. Version 0.1.

Both pictures go through the convolutions of a network trained on ImageNet. At five depths, the features of
each pixel are scaled to unit length; the squared differences, weighted per channel by weights that were
fitted to human judgements, are averaged over the picture and summed over the depths.

Convention of the original trainer, kept so that numbers compare: pictures go in as [0, 1], though the
networks were fitted for [-1, 1].

The weights are other people's and are not part of this project. They are looked for on this machine only.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.files import DataError

# Statistics of ImageNet for inputs in [-1, 1], as published with LPIPS.
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
EPSILON = 1e-10


@dataclass(frozen=True)
class Network:
    """A trunk as torchvision names it: layer numbers of `features`, and after which ones to compare."""

    trunk_file: str
    trunk_url: str
    linear_file: str
    convolutions: dict[int, tuple[int, int]]  # layer -> (stride, padding); a ReLU follows each
    widths: tuple[int, ...]  # channels that each of them makes
    kernels: tuple[int, ...]  # and its size in pixels
    pools: dict[int, tuple[int, int]]  # layer -> (size, stride)
    compared: tuple[int, ...]  # layers of the ReLUs whose outputs are compared


NETWORKS = {
    "vgg": Network(
        trunk_file="vgg16-397923af.pth",
        trunk_url="https://download.pytorch.org/models/vgg16-397923af.pth",
        linear_file="vgg.pth",
        convolutions={i: (1, 1) for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)},
        widths=(64, 64, 128, 128, *3 * (256,), *6 * (512,)),
        kernels=13 * (3,),
        pools={i: (2, 2) for i in (4, 9, 16, 23)},
        compared=(3, 8, 15, 22, 29),
    ),
    "alex": Network(
        trunk_file="alexnet-owt-7be5be79.pth",
        trunk_url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        linear_file="alex.pth",
        convolutions={0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)},
        widths=(64, 192, 384, 256, 256),
        kernels=(11, 5, 3, 3, 3),
        pools={2: (3, 2), 5: (3, 2)},
        compared=(1, 4, 7, 9, 11),
    ),
}


class WeightsMissing(Exception):
    """The weights are not on this machine; the message says where they are looked for and how to get them."""


class LPIPS:
    """Callable on two pictures [3, H, W] in [0, 1]; returns a scalar tensor."""

    def __init__(self, network: str, trunk: dict[str, Tensor], linear: dict[str, Tensor]):
        self._network = NETWORKS[network]
        self._trunk = trunk
        self._linear = linear
        reference = trunk["features.0.weight"]
        self._mean = reference.new_tensor(MEAN)[:, None, None]
        self._std = reference.new_tensor(STD)[:, None, None]

    @torch.no_grad()
    def __call__(self, image: Tensor, truth: Tensor) -> Tensor:
        batch = (torch.stack([image, truth]).to(self._mean) - self._mean) / self._std
        total = batch.new_zeros(())
        for depth, features in enumerate(self._features(batch)):
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)
            difference = (unit[0] - unit[1]).square()
            total = total + (difference * self._linear[f"lin{depth}.model.1.weight"][0]).sum(dim=0).mean()
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in range(max(self._network.compared) + 1):
            if layer in self._network.convolutions:
                stride, padding = self._network.convolutions[layer]
                weight, bias = (self._trunk[f"features.{layer}.{part}"] for part in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, stride, padding)
            elif layer in self._network.pools:
                x = F.max_pool2d(x, *self._network.pools[layer])
            elif layer - 1 in self._network.convolutions:
                x = F.relu(x)
            if layer in self._network.compared:
                found.append(x)
        return found


def load(network: str, weights: str = "", device: torch.device | str = "cpu") -> LPIPS:
    """Find the weights and build the distance. WeightsMissing if they are not here.

    weights: a folder that holds the trunk file and, if need be, the linear one; or the trunk file itself.
    """
    if weights and not Path(weights).exists():
        raise DataError(f"{weights}: is not there, but --lpips_weights names it")
    about = NETWORKS[network]
    trunk_path, linear_path = _trunk_path(about, weights), _linear_path(about, weights)
    if trunk_path is None or linear_path is None:
        raise WeightsMissing(_how_to_get(network, trunk_path, linear_path))
    trunk_shapes, linear_shapes = _shapes(about)
    trunk, linear = _read(trunk_path, trunk_shapes, device), _read(linear_path, linear_shapes, device)
    return LPIPS(network, trunk, linear)


def _shapes(about: Network) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Of the weights in the trunk's file, and in that of the linear layers."""
    trunk, linear, channels = {}, {}, 3
    for layer, width, kernel in zip(about.convolutions, about.widths, about.kernels):
        trunk[f"features.{layer}.weight"] = (width, channels, kernel, kernel)
        trunk[f"features.{layer}.bias"] = (width,)
        channels = width
        if layer + 1 in about.compared:
            linear[f"lin{len(linear)}.model.1.weight"] = (1, width, 1, 1)
    return trunk, linear


def _trunk_path(about: Network, weights: str) -> Path | None:
    if weights and Path(weights).is_file():
        return Path(weights)
    folders = [Path(weights)] if weights else []
    return _first_file(folders + [_torch_cache()], about.trunk_file)


def _linear_path(about: Network, weights: str) -> Path | None:
    folders = [Path(weights) if Path(weights).is_dir() else Path(weights).parent] if weights else []
    package = find_spec("lpips")
    if package is not None and package.submodule_search_locations:
        folders += [Path(place) / "weights" / "v0.1" for place in package.submodule_search_locations]
    return _first_file(folders + [_torch_cache()], about.linear_file)


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _first_file(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read(path: Path, shapes: dict[str, tuple], device: torch.device | str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch's words are for programmers
        raise DataError(f"{path} must be a file of torch weights ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise DataError(f"{path} must hold weights by name, got a {type(state).__name__}")
    for key, shape in shapes.items():
        value = state.get(key)
        if value is None:
            raise DataError(f"{path} must hold the key {key}, got {str(list(state)[:3])[:200]}...")
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        if not dense or tuple(value.shape) != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{path}: {key} must be numbers {list(shape)}, got {got}")
    return {key: state[key].float() for key in shapes}


def _how_to_get(network: str, trunk: Path | None, linear: Path | None) -> str:
    about, cache = NETWORKS[network], _torch_cache()
    lines = [f"LPIPS ({network}) is left out: its weights are not on this machine."]
    if trunk is None:
        lines.append(f"  network: download {about.trunk_url} to {cache}/")
    if linear is None:
        lines.append(
            f"  linear layers: pip install --no-deps lpips, or put its {about.linear_file} into {cache}/"
        )
    lines.append("  or name the folder that holds them: --lpips_weights FOLDER; or do without: --lpips none")
    return "\n".join(lines)

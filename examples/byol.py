"""BYOL (Grill et al. 2020): learn to see without labels, on pictures from the project's ray tracer.

python -m examples.byol -o output/byol     # draw, pre-train, fine-tune, print the table of docs/byol.md
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from arguments import number
from sample_scene import shapes
from sample_scene.shapes import column, dot, normalize, turned
from utils.files import atomic_write

SIDE, RAYS = 32, 2  # pixels along a side of a picture; rays along a side of a pixel
SHAPES = {  # u(a, b, n) draws n numbers between a and b
    "ellipsoid": lambda u, **at: shapes.Ellipsoid(radii=u(0.35, 0.9, 3), **at),
    "box": lambda u, **at: shapes.Box(half=u(0.3, 0.65, 3), **at),
    "ring": lambda u, **at: shapes.Ring(radius=u(0.5, 0.7), thickness=u(0.1, 0.22), **at),
    "vase": lambda u, **at: shapes.Lathe(
        profile=((-0.8, 0.3), (-0.3, u(0.5, 0.7)), (0.8, u(0.1, 0.4))), **at
    ),
    "bush": lambda u, **at: shapes.Bush(radius=u(0.55, 0.75), lumps=u(4, 8), depth=0.12, **at),
    "cone": lambda u, **at: shapes.Lathe(profile=((-0.8, u(0.6, 0.8)), (0.8, 0.05)), **at),
    "hourglass": lambda u, **at: shapes.Lathe(profile=((-0.8, u(0.5, 0.7)), (0, 0.1), (0.8, 0.6)), **at),
    "spindle": lambda u, **at: shapes.Lathe(profile=((-0.8, 0.05), (0, u(0.5, 0.7)), (0.8, 0.05)), **at),
    "disk": lambda u, **at: shapes.Ellipsoid(radii=u(0.7, 1, 3) * (1, 1, 0.15), **at),
    "beam": lambda u, **at: shapes.Box(half=u(0.7, 1, 3) * (0.2, 0.2, 1), **at),
}
OLD, NEW = list(SHAPES)[:5], list(SHAPES)[5:]  # what networks are pre-trained with, and the task


def picture(name: str, seed: tuple[int, int]) -> np.ndarray:
    """A shape above the ground in the sun, [3, SIDE, SIDE] uint8. The same seed gives the same picture."""
    u, n = np.random.default_rng(seed).uniform, SIDE * RAYS
    pose = turned(u(0, 360)) @ turned(u(0, 180), "x") @ turned(u(0, 360))
    thing = SHAPES[name](u, center=(*u(-0.15, 0.15, 2), u(0.8, 1)), rotation=pose, material=None)
    row, side = (np.indices((n, n)).reshape(2, -1) + 0.5) / n - 0.5
    camera = turned(-90 - u(30, 70), "x")  # looks down
    d = normalize(camera @ np.stack([side, row, np.full_like(row, 1.7)]))
    o = column((0, 0, 0.7)) - 4.2 * camera[:, 2:]
    hits = np.where(thing.near(o, d), thing.hit(o, d), np.inf), shapes.Ground(o, None).hit(o, d)
    on_thing, points = hits[0] < hits[1], o + np.minimum(*hits) * d
    normal = np.where(on_thing, thing.normal(points), column((0, 0, 1)))
    sun = normalize(column((*u(-1, 1, 2), u(0.5, 1.2))))
    lit = np.isinf(thing.hit(points + np.float32(2e-3) * normal, sun)) * np.maximum(dot(normal, sun), 0)
    shine = on_thing * lit * np.maximum(dot(normal, normalize(sun - d)), 0) ** 30
    albedo = np.where(on_thing, column((0.6, 0.4, 0.3)) * u(0.6, 1.4, (3, 1)), 0.5)
    light = np.clip(albedo * (0.35 + 0.25 * normal[2] + lit) + shine / 2, 0, 1)
    return (255 * light.reshape(3, SIDE, RAYS, SIDE, RAYS).mean((2, 4)) ** (1 / 2.2) + 0.5).astype(np.uint8)


def draw(classes: list[str], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures [count, 3, SIDE, SIDE] uint8, classes by turns, and their labels [count]."""
    drawn = np.stack([picture(classes[k % len(classes)], (seed, k)) for k in range(count)])
    return torch.from_numpy(drawn), torch.arange(count) % len(classes)


def view(least: float, blur: float = 0, solarize: float = 0):
    """The paper's views, of a batch: each picture has draws of its own. Blur is that of 32 pixels."""
    jitter, blurred = v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.GaussianBlur(3, (0.1, 2))
    crop = v2.RandomResizedCrop(SIDE, (least, 1), interpolation=v2.InterpolationMode.BICUBIC)
    changes = v2.RandomHorizontalFlip(), v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)
    one = v2.Compose([crop, *changes, v2.RandomApply([blurred], blur), v2.RandomSolarize(128, solarize)])
    return lambda pictures: torch.stack([one(picture) for picture in pictures]).float()


def encoder() -> nn.Sequential:  # pictures to 128 features
    layers: list[nn.Module] = [nn.BatchNorm2d(3, affine=False)]
    for wide, out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Byol(nn.Module):
    """The online network learns to predict what a slow copy of itself says about another view."""

    def __init__(self, pictures: Tensor, steps: int, seed=0, least=0.4, base=0.99, batch=128):
        super().__init__()
        torch.manual_seed(seed)
        self.pictures, self.steps, self.base, self.batch, self.k = pictures, steps, base, batch, 0
        self.views = view(least, 1.0, 0.0), view(least, 0.1, 0.2)
        mlps = [[nn.Linear(n, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)] for n in (128, 64)]
        self.online, self.predictor = nn.Sequential(encoder(), *mlps[0]), nn.Sequential(*mlps[1])
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.adam = torch.optim.Adam([w for w in self.parameters() if w.requires_grad], weight_decay=1.5e-6)

    def step(self) -> tuple[float, float]:
        """Returns the loss, and the spread of embeddings: 1 all over the sphere, 0 if all are the same."""
        falling = float(np.cos(np.pi * self.k / self.steps)) / 2 + 0.5  # from 1 to 0
        self.adam.param_groups[0]["lr"] = 2e-3 * falling * min(1, (self.k + 1) / (0.1 * self.steps))
        some = self.pictures[torch.randint(len(self.pictures), (self.batch,))]
        v, w = (view(some) for view in self.views)
        z_v, z_w, cos = self.target(v), self.target(w), F.cosine_similarity
        p_v, p_w = self.predictor(self.online(v)), self.predictor(self.online(w))
        loss = (2 - 2 * cos(p_v, z_w) + 2 - 2 * cos(p_w, z_v)).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        for slow, fast in zip(self.target.parameters(), self.online.parameters()):
            slow.data.lerp_(fast.data, (1 - self.base) * falling)  # BatchNorm's statistics stay its own
        self.k += 1
        if (apart := F.normalize(z_v).std(0).mean().item() * z_v.shape[1] ** 0.5) < 0.3:
            raise SystemExit(f"step {self.k}: collapse: the spread of embeddings is {apart:.2f}, below 0.3")
        return loss.item(), apart

    def learn(self, path: Path, every: int = 100) -> nn.Module:
        """All steps; returns the encoder. A run that was cut off goes on from its file to the same end."""
        if path.exists():
            nets, adam, self.k, random = torch.load(path)
            self.load_state_dict(nets)
            self.adam.load_state_dict(adam)
            torch.set_rng_state(random)
        while self.k < self.steps:
            loss, apart = self.step()
            if self.k % every == 0 or self.k == self.steps:
                print(f"{path.stem}: step {self.k}, loss {loss:.3f}, spread {apart:.2f}", flush=True)
                parts = self.state_dict(), self.adam.state_dict(), self.k, torch.get_rng_state()
                with atomic_write(path) as file:
                    torch.save(parts, file)
        return self.online[0]


def taught(encoder: nn.Module, pictures: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Sequential:
    """A copy of the encoder with a classifier, all weights trained with labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(copy.deepcopy(encoder), nn.Linear(128, int(labels.max()) + 1)).train()
    adam, mild = torch.optim.Adam(net.parameters(), 2e-3), view(0.4)
    for _ in range(steps):
        some = torch.randint(len(labels), (min(128, len(labels)),))
        adam.zero_grad()
        F.cross_entropy(net(mild(pictures[some])), labels[some]).backward()
        adam.step()
    return net


def regression(encoder: nn.Module, pictures: Tensor, labels: Tensor, decay: float) -> nn.Sequential:
    """A linear classifier on frozen, standardized features: logistic regression, to convergence."""
    norm, linear = nn.BatchNorm1d(128, affine=False, momentum=1), nn.Linear(128, int(labels.max()) + 1)
    lbfgs = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")
    x = norm(encoder.eval()(pictures.float())).detach()

    def loss():
        lbfgs.zero_grad()
        (cost := F.cross_entropy(linear(x), labels) + decay * linear.weight.square().sum()).backward()
        return cost

    lbfgs.step(loss)
    return nn.Sequential(encoder, norm, linear)


def probe(encoder: nn.Module, x: Tensor, y: Tensor) -> nn.Sequential:  # every fifth picture chooses the decay
    held, decays = torch.arange(len(y)) // (int(y.max()) + 1) % 5 == 0, (1e-4, 1e-3, 1e-2, 1e-1)
    scores = [percent(regression(encoder, x[~held], y[~held], d), x[held], y[held]) for d in decays]
    return regression(encoder, x, y, decays[np.argmax(scores)])


@torch.no_grad()
def percent(net: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    scores = torch.cat([net.eval()(part.float()) for part in pictures.split(500)])
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def settings(seed: int, old, test, args) -> dict[str, float]:
    """Percent right, by row of the table."""
    byol, few = Byol(old[0], args.steps, seed, args.crop), draw(NEW, args.labels * len(NEW), 100 + seed)
    nets = {"nothing": copy.deepcopy(byol.online[0])}
    nets["labels"] = taught(nets["nothing"], *old, args.steps, seed)[0]
    nets["BYOL"] = byol.learn(args.output / f"byol_{args.crop}_{args.steps}_seed{seed}.pt")
    tuned = {f"{start} | all weights": taught(net, *few, 150, seed) for start, net in nets.items()}
    tuned |= {f"{start} | classifier only": probe(net, *few) for start, net in nets.items()}
    return {f"{row} | {name}": percent(net, *test) for row, (name, net) in zip("ABC-DE", tuned.items())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.byol", description="The table of docs/byol.md.")
    parser.add_argument("-o", "--output", type=Path, default=Path("output/byol"), help="keeps what it has")
    count = number(int, 1, 2**31)
    parser.add_argument("--steps", type=count, default=500, help="of pre-training")
    parser.add_argument("--pictures", type=count, default=6000, help="for pre-training")
    parser.add_argument("--labels", type=count, default=20, help="of each class")
    parser.add_argument("--crop", type=number(float, 0.01, 1), default=0.4, help="least area of a view")
    parser.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    old, test = draw(OLD, args.pictures, 0), draw(NEW, args.pictures // 4, 1)
    found = [settings(seed, old, test, args) for seed in args.seeds]
    print("| | pre-trained with | then trained | right, % |\n|---|---|---|---|")
    for row in found[0]:
        values = torch.tensor([scores[row] for scores in found])
        print(f"| {row} | {values.mean():.1f} ± {values.std(correction=min(len(found) - 1, 1)):.1f} |")


if __name__ == "__main__":
    main()

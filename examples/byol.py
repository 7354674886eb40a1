"""BYOL (Grill et al. 2020): learn to see without labels, on pictures of shapes from the project's ray tracer.

python -m examples.byol -o output/byol     # draw, pre-train, fine-tune, print the table of docs/byol.md
"""

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models.resnet import BasicBlock

from arguments import number
from sample_scene.labeled import PAIRS, SINGLES, draw
from utils.files import atomic_write

from .views import VIEWS, scaled, view

FINE_TUNING = 300  # steps
PARTS = ("online", "target", "predictor", "optimizer", "rate")  # of a run, with the generator and the step


def encoder() -> nn.Sequential:
    """Pictures to 128 features: a small ResNet, 0.3 million weights."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for wide, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)):
        cut = nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        layers.append(BasicBlock(wide, out, stride, cut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))


def distance(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance between the directions of p and z, 0 to 4, [n]."""
    return 2 - 2 * F.cosine_similarity(p, z, dim=1)


def spread(z: Tensor) -> float:
    """Deviation of directions over a batch, times sqrt(d): 1 all over the sphere, 0 if all are the same."""
    return (F.normalize(z, dim=1).std(0).mean() * z.shape[1] ** 0.5).item()


def adam(weights: list[nn.Parameter], steps: int, rate=2e-3):
    """No weight decay on biases and BatchNorm; the rate rises for a tenth, then falls by the cosine."""
    flat, others = [w for w in weights if w.ndim == 1], [w for w in weights if w.ndim > 1]
    optimizer = torch.optim.Adam([{"params": flat}, {"params": others, "weight_decay": 1.5e-6}], rate)
    return optimizer, OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)


class Byol:
    """The online network learns to predict what a slow copy of itself says about another view."""

    def __init__(self, pictures: Tensor, steps: int, seed=0, views="mild", base=0.99, batch=128):
        torch.manual_seed(seed)
        self.pictures, self.steps, self.views, self.base, self.batch = pictures, steps, views, base, batch
        self.online, self.predictor = nn.Sequential(encoder(), mlp(128)), mlp(64)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer, self.rate = adam([*self.online.parameters(), *self.predictor.parameters()], steps)
        self.generator, self.k = torch.Generator().manual_seed(seed), 0

    def step(self) -> tuple[float, float]:
        """Returns the loss and the spread of the embeddings."""
        g, (least, *shares) = self.generator, VIEWS[self.views]
        x = self.pictures[torch.randint(len(self.pictures), (self.batch,), generator=g)]
        v, w = (view(x, g, least, *share) for share in shares)
        z, z_ = self.target(v), self.target(w)
        p, p_ = self.predictor(self.online(v)), self.predictor(self.online(w))
        loss = (distance(p, z_) + distance(p_, z)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        tau = 1 - (1 - self.base) * (math.cos(math.pi * self.k / self.steps) + 1) / 2
        with torch.no_grad():  # the statistics of BatchNorm stay the target's own
            for slow, fast in zip(self.target.parameters(), self.online.parameters()):
                slow.copy_(tau * slow + (1 - tau) * fast)
        self.k += 1
        if (apart := spread(z)) < 0.3:
            raise SystemExit(f"step {self.k}: collapse: the spread of embeddings is {apart:.2f}, below 0.3")
        return loss.item(), apart

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        with atomic_write(path) as file:
            torch.save(parts | {"generator": self.generator.get_state(), "k": self.k}, file)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.k = state["k"]

    def train(self, path: Path) -> nn.Module:
        """All steps; returns the encoder. A run that was cut off goes on from its file to the same end."""
        if path.exists():
            self.load(path)
        while self.k < self.steps:
            loss, apart = self.step()
            if self.k % 100 == 0 or self.k == self.steps:
                self.save(path)
                print(f"{path.stem}: step {self.k}, loss {loss:.3f}, spread {apart:.2f}", flush=True)
        return self.online[0]


def learn(net: nn.Module, pictures: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Sequential:
    """A copy of the encoder with a classifier, all weights trained with labels on mild views."""
    g = torch.manual_seed(seed)
    net = nn.Sequential(copy.deepcopy(net), nn.Linear(128, int(labels.max()) + 1)).train()
    optimizer, rate = adam(list(net.parameters()), steps)
    for _ in range(steps):
        some = torch.randint(len(labels), (min(128, len(labels)),), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(view(pictures[some], g, 0.4, 0, 0)), labels[some]).backward()
        optimizer.step()
        rate.step()
    return net


@torch.no_grad()
def outputs(net: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([net.eval()(scaled(part / 255)) for part in pictures.split(500)])


def right(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def regression(x: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """Logistic regression to convergence."""
    linear = nn.Linear(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x), labels) + decay * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def probe(net: nn.Module, few, test) -> float:
    """A linear classifier on frozen features, % right; every fifth of each class chooses the decay."""
    (x, y), (test_x, test_y) = ((outputs(net, pictures), labels) for pictures, labels in (few, test))
    x, test_x = ((part - x.mean(0)) / (x.std(0) + 1e-6) for part in (x, test_x))
    held = torch.arange(len(y)) // (int(y.max()) + 1) % 5 == 0
    scores = {d: right(regression(x[~held], y[~held], d)(x[held]), y[held]) for d in (1e-4, 1e-3, 1e-2, 0.1)}
    return right(regression(x, y, max(scores, key=scores.__getitem__))(test_x), test_y)


def shapes(*args) -> tuple[Tensor, Tensor]:
    pictures, labels = draw(*args)
    return torch.from_numpy(pictures), torch.from_numpy(labels)


def settings(old: tuple[Tensor, Tensor], test, seed: int, args) -> dict[str, float]:
    """Percent right, by row of the table."""
    few = shapes(SINGLES, args.labels * len(SINGLES), 100 + seed)
    byol = Byol(old[0], args.steps, seed, args.views)
    nets = {"nothing": copy.deepcopy(byol.online[0])}
    nets["labels"] = learn(nets["nothing"], *old, args.steps, seed)[0]
    nets["BYOL"] = byol.train(args.output / f"byol_{args.views}_{args.pictures}_{args.steps}_seed{seed}.pt")
    tuned = {start: outputs(learn(net, *few, FINE_TUNING, seed), test[0]) for start, net in nets.items()}
    scores = {f"{start} | all weights": right(out, test[1]) for start, out in tuned.items()}
    scores |= {f"{start} | classifier only": probe(net, few, test) for start, net in nets.items()}
    return {f"{letter} | {row}": score for letter, (row, score) in zip("ABC-DE", scores.items())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.byol", description="The table of docs/byol.md.")
    parser.add_argument("-o", "--output", type=Path, default=Path("output/byol"), help="keeps what it has")
    parser.add_argument("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=number(int, 1, 2**31), default=500, help="of pre-training")
    parser.add_argument("--pictures", type=number(int, 1, 2**31), default=6000, help="for pre-training")
    parser.add_argument("--labels", type=number(int, 1, 2**31), default=20, help="of each class")
    parser.add_argument("--views", choices=VIEWS, default="mild")
    args = parser.parse_args(argv)
    cache, workers = args.output / f"pictures_{args.pictures}.pt", torch.get_num_threads()
    if not cache.exists():
        made = [shapes(PAIRS, args.pictures, 0, workers), shapes(SINGLES, args.pictures // 4, 1, workers)]
        with atomic_write(cache) as file:
            torch.save(made, file)
    found = [settings(*torch.load(cache), seed=seed, args=args) for seed in args.seeds]
    print("| | pre-trained with | then trained | right, % |\n|---|---|---|---|")
    for row in found[0]:
        values = torch.tensor([scores[row] for scores in found])
        print(f"| {row} | {values.mean():.1f} ± {values.std(correction=min(len(found) - 1, 1)):.1f} |")


if __name__ == "__main__":
    main()

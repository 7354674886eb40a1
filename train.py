"""Optimize 3D Gaussians to photos (Kerbl et al. 2023).

    python train.py -s dataset [-m output/x] [--eval]

The loop in train() is the method: show a view, compare, step, now and then clone, split and prune. What each
step does is in training/trainer.py; what a run does beside it (folder, lock, log, signals, checkpoints) is in
training/run.py. FAITHFULNESS.md says which equation of the paper lives where.
"""

import sys

import torch

from arguments import Options, parse_train
from scene import Scene
from training import method
from training.report import Summary
from training.run import Run
from utils import commands


def train(options: Options) -> Summary | None:
    with Run(options) as run:
        if run.finished():
            return None
        scene = Scene(options.model, run.device, options.run.seed, quiet=options.run.quiet)
        trainer = method.trainer(scene, options, run.say)

        for iteration in run.iterations(trainer):  # goes on from a checkpoint; ends early when asked to
            losses = trainer.step(iteration)  # a view, a picture, a loss, backward, Adam
            run.report(iteration, losses, trainer)
            run.evaluate_and_save(iteration, trainer)  # when it is time; before Gaussians come and go
            trainer.refine(iteration)
            run.checkpoint(iteration, trainer)
    return run.summary


def main(argv: list[str] | None = None) -> int:
    options = parse_train(argv)
    torch.autograd.set_detect_anomaly(options.run.detect_anomaly)
    return commands.run("train.py", lambda: train(options))


if __name__ == "__main__":
    sys.exit(main())

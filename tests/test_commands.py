"""How commands end: exit codes, and a line instead of a traceback for what a user can mend."""

import subprocess
import sys

import pytest
import torch

from arguments import ConfigError
from utils import commands
from utils.files import DataError


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error, code, said",
    [
        (DataError("x.png: is not a picture"), 1, "render.py: x.png: is not a picture\n"),
        (ConfigError("iterations must be positive"), 1, "render.py: iterations must be positive\n"),
        (PermissionError(13, "Permission denied", "m"), 1, "render.py: [Errno 13] Permission denied: 'm'\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            1,
            "render.py: CUDA out of memory; smaller photos (-r), or --data_device cpu, may help\n",
        ),
        (KeyboardInterrupt(), 130, "\nrender.py: interrupted\n"),
    ],
)
def test_what_a_user_can_mend(error, code, said, capsys):
    assert commands.run("render.py", lambda: fail(error)) == code
    assert capsys.readouterr().err == said


def test_our_mistakes_keep_their_traceback():
    assert commands.run("render.py", lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        commands.run("render.py", lambda: fail(ZeroDivisionError()))


def test_training_does_not_wait_for_a_compiler():
    """Importing torch's compiler takes seconds, and nothing here uses it."""
    steps = """
import sys, torch, train
from diff_gaussian_rasterization import FusedAdam, SparseGaussianAdam
weight = torch.nn.Parameter(torch.ones(3, 2))
for adam in FusedAdam([weight], lr=0.1), SparseGaussianAdam([weight], lr=0.1, eps=1e-15):
    weight.grad = torch.ones_like(weight)
    adam.step(*[torch.ones(3, dtype=torch.bool), 3] * isinstance(adam, SparseGaussianAdam))
    adam.zero_grad()
    assert weight.grad is None
assert (weight < 1).all()
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", steps], check=True)

"""How commands end: exit codes, and a line instead of a traceback for what a user can mend."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arguments import ConfigError, parse_render
from utils import commands, terminal
from utils.files import DataError

ROOT = Path(__file__).resolve().parent.parent


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


# What is said


def test_names_are_escaped():
    odd = "a\x1b[2Jb\nc\rd\x9bm\u202ee\u2028f\udcff"
    assert terminal.plain(odd) == r"a\x1b[2Jb\nc\rd\x9bm\u202ee\u2028f\udcff"
    same = "Größe 日本　x — C:\\new photo's.png"
    assert terminal.plain(same) == same


def test_an_error_is_one_line_without_control_characters(capsys):
    assert commands.run("render.py", lambda: fail(DataError("a\x1b[31m\nb.png: is odd"))) == 1
    assert capsys.readouterr().err == "render.py: a\\x1b[31m\\nb.png: is odd\n"
    with pytest.raises(SystemExit):
        parse_render(["-m", "a\x1b[31m\nb"])
    assert "but a\\x1b[31m\\nb is not there" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_cannot_be_encoded_is_escaped(encoding):
    done = in_a_process("print('Größe \\udcff')", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    expected = r"Größe \udcff" if encoding == "utf-8" else r"Gr\xf6\xdfe \udcff"
    assert done.stdout.decode().strip() == expected


def in_a_process(work: str, output=subprocess.PIPE, error=subprocess.PIPE, **environment):
    code = f"import sys\nfrom utils import commands\nsys.exit(commands.run('x.py', lambda: {work}))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=output, stderr=error, env=os.environ | environment
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_is_full_changes_no_exit_code():
    with open("/dev/full", "w") as full:
        assert in_a_process("print('x' * 100_000)", full, full).returncode == 0
        assert in_a_process("[print('x'), open('/nowhere')]", full, full).returncode == 1


def test_output_that_is_closed_changes_no_exit_code():
    for closed in "2>&-", ">&- 2>&-":
        code = "import sys; from utils import commands; from utils.terminal import say, progress\n"
        code += "sys.exit(commands.run('x.py', lambda: [say(i) for i in progress(range(3), 'x')]))"
        assert subprocess.run(f"{sys.executable} -c {shlex.quote(code)} {closed}", shell=True, cwd=ROOT,
                              stdout=subprocess.DEVNULL).returncode == 0  # fmt: skip


def test_progress_into_a_file_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    done = 0
    for _ in terminal.progress(range(1000), "Rendering a\x1bb"):
        done += 1
        now[0] += 0.1
    assert done == 1000
    told = capsys.readouterr().err
    assert "\r" not in told and "\x1b" not in told
    lines = told.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Rendering a\\x1bb: 300 of 1,000, 01:10 left"), lines

    now[0] = 0.0
    with terminal.progress(desc="Training", total=1000, initial=500) as bar:
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        now[0] += 40
        bar.update(100)
        now[0] += 10
        bar.update(100)
    assert capsys.readouterr().err == "Training: 600 of 1,000, 02:40 left, loss 0.5\n"
    for _ in terminal.progress(range(3), disable=True):
        now[0] += 40
    assert capsys.readouterr().err == ""


# Signals


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_terminal_that_is_closed(capsys):
    """SIGHUP is remembered as SIGTERM is, is never the second signal, and stays ignored under nohup."""
    with commands.Patience() as signals:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert signals.asked == signal.SIGHUP
        with pytest.raises(commands.Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert commands.run("x.py", lambda: signal.raise_signal(signal.SIGHUP)) == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "\nx.py: hung up\n"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert commands.run("x.py", lambda: signal.raise_signal(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

"""Full disks and numbers that are not finite: told, and nothing is destroyed by them."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from per_view import Exposure
from scene.folder import ModelFolder
from scene.formats.ply import load_ply
from scene.gaussian_model import GaussianModel
from tests import tiny_scenes
from training import losses, trainer
from training.report import Report, RunHistory
from utils import commands, files
from utils.files import DataError, atomic_write, write_json

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "--iterations", "60", "--densify_from_iter", "5", "--densification_interval", "10",
    "--densify_grad_threshold", "1e-5", "--device", "cpu", "--disable_viewer", "--checkpoint_every", "10",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


# Disks


def test_no_room_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage._replace(free=1_500_000))
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"needs 2.0 MB, 1.5 MB are free\): '.*x.bin'") as error:
        with atomic_write(path, 2_000_000):
            raise AssertionError("writing began")
    assert error.value.errno == errno.ENOSPC
    with atomic_write(path, 1_000_000) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x.bin"]


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(OSError, match="x.json") as error:
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["x.json"]


LIMITED = """
import resource, signal, sys, torch
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
import train
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_run_on_a_disk_that_fills_up(scene, tmp_path):
    """No file may become larger than the checkpoint of iteration 30: later ones fail while they are written,
    and the last model as well. What was there before stays, and can be gone on from."""
    whole = tmp_path / "whole"
    common = ["-s", str(scene), *SHORT]
    stay = ["--checkpoint_iterations", *map(str, range(10, 61, 10))]
    assert train.main([*common, "-m", str(whole), *stay, "--quiet"]) == 0
    sizes = {i: path.stat().st_size for i, path in ModelFolder(whole).checkpoints().items()}
    model = (whole / "point_cloud" / "iteration_60" / "point_cloud.ply").stat().st_size
    limit = (sizes[20] + sizes[30]) // 2
    assert sizes[20] < limit < min(sizes[30], model), (sizes, model)

    folder = tmp_path / "m"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *common, "-m", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "chkpnt30.pth'; training goes on" in done.stdout, done.stdout
    assert "point_cloud.ply" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    assert list(ModelFolder(folder).checkpoints()) == [20, 10] and not list(folder.rglob("*.tmp"))

    assert train.main(["-m", str(folder), "--resume", "--quiet"]) == 0
    name = "point_cloud/iteration_60/point_cloud.ply"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_log_that_cannot_be_written_does_not_end_the_run(scene, tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name):
            def fail(*arguments):
                raise OSError(errno.ENOSPC, "No space left on device")

            return fail

    real = Report.__init__

    def fill_up(report, *arguments, **options):
        real(report, *arguments, **options)
        report._board = report.log._file = Full()

    monkeypatch.setattr(Report, "__init__", fill_up)
    assert train.main(["-s", str(scene), "-m", str(tmp_path / "m"), *SHORT, "--quiet"]) == 0


FULL = """
import os, subprocess, sys
disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", sys.argv[2], "none", disk], check=True)
import torch, train
from training import report
torch.set_num_threads(1)
tensorboard = report._tensorboard

def when_full(*arguments):
    files = []
    try:
        while True:
            files.append(open(f"{disk}/{len(files)}", "wb", buffering=0))
            files[-1].write(bytes(100_000) if "size" in sys.argv[2] else b"")
    except OSError:
        board = tensorboard(*arguments)
    for number, file in enumerate(files):
        file.close()
        os.unlink(f"{disk}/{number}")
    return board

report._tensorboard = when_full
sys.exit(train.main(sys.argv[3:]))
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs user namespaces, for a small disk",
)
@pytest.mark.parametrize("limit", ["size=2m", "nr_inodes=30"])
def test_no_room_for_curves(limit, scene, tmp_path):
    """A real disk on which not a byte, or not a file more has room while TensorBoard begins."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train_there = ["-s", str(scene), "-m", str(disk / "m"), *SHORT, "--checkpoint_every", "-1"]
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", FULL, str(disk), limit, *train_there],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no TensorBoard events: [Errno 28] No space left on device" in done.stdout, done.stdout
    assert "Done: 60 iterations" in done.stdout
    assert "Traceback" not in done.stderr, done.stderr


def test_no_curves_at_a_start_and_when_resumed(scene, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    folder = tmp_path / "m"
    for options in (["-s", str(scene), *SHORT], ["--resume", "--iterations", "70"]):
        assert train.main([*options, "-m", str(folder), "--no-quiet"]) == 0
        told = capsys.readouterr().out
        assert "no TensorBoard events: [Errno 28] No space left on device; training goes on" in told


# Why a run ended is in its log


def last_words(folder: Path) -> str:
    return (folder / "train.log").read_text().rpartition("Ended: ")[2]


def test_the_log_says_why_a_run_ended(scene, tmp_path, monkeypatch, capsys):
    """The line that the user sees; of a mistake of ours its traceback, with names escaped."""
    common = ["-s", str(scene), *SHORT, "--quiet"]

    def ended(folder: str, error: BaseException) -> str:
        def fail(*arguments):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "step_that_fits", fail)
            if commands.in_a_line(error) is None:
                with pytest.raises(type(error)):
                    train.main([*common, "-m", str(tmp_path / folder)])
            else:
                assert train.main([*common, "-m", str(tmp_path / folder)]) in (1, 130)
        return last_words(tmp_path / folder)

    told = ended("data", DataError("photo\x1b\n.png: is torn"))
    assert told.startswith("photo\\x1b\\n.png: is torn. There is no checkpoint") and told.count("\n") == 1
    assert capsys.readouterr().err == "train.py: " + told
    told = ended("memory", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert told == "CUDA out of memory; smaller photos (-r), or --data_device cpu, may help\n"
    assert ended("stop", KeyboardInterrupt()) == "interrupted\n"
    told = ended("mistake", ZeroDivisionError("a\x1bb"))
    assert told.startswith("Traceback (most recent call last):\n") and "in learn" not in told
    assert told.endswith("ZeroDivisionError: a\\x1bb\n") and "train.py" in told


def test_the_log_says_why_a_run_did_not_begin(scene, tmp_path, monkeypatch):
    """Out of memory while photos are loaded is worth a log; what was refused leaves nothing."""

    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(train, "Scene", full)
    folder = tmp_path / "m"
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT]) == 1
    assert last_words(folder) == "out of memory; smaller photos (-r), or --data_device cpu, may help\n"
    before = (folder / "train.log").read_bytes()
    monkeypatch.undo()
    assert train.main(["-s", str(tmp_path / "nowhere"), "-m", str(folder), *SHORT]) == 1
    assert (folder / "train.log").read_bytes() == before


# Not a number


@pytest.fixture(autouse=True)
def check_often(monkeypatch):
    monkeypatch.setattr("training.run.CHECK_EVERY", 10)


def poison(monkeypatch, at: int, rows: slice, name: str = "sh_dc", value: float = float("nan")) -> None:
    """Write into the parameters before this iteration."""
    schedule = GaussianModel.schedule

    def poisoned(gaussians, iteration):
        schedule(gaussians, iteration)
        if iteration == at:
            with torch.no_grad():
                gaussians.params[name][rows] = value

    monkeypatch.setattr(GaussianModel, "schedule", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sh_dc", "means", "opacity_logits", "log_scales", "raw_quats", "sh_rest"])
def test_few_bad_gaussians_are_dropped(name, value, scene, tmp_path, monkeypatch):
    poison(monkeypatch, 59, slice(0, 1), name, value)
    monkeypatch.setattr("training.health.FEW", 1.0)  # one bad color spoils all that is behind it
    folder = tmp_path / "m"
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, "--quiet"]) == 0
    log = (folder / "train.log").read_text()
    assert re.search(r"dropped \d+ Gaussians with numbers that are not finite", log), log
    model = load_ply(folder / "point_cloud" / "iteration_60" / "point_cloud.ply")
    assert len(model) > 60 and all(value.isfinite().all() for value in model.params.values())


def bad_loss(monkeypatch) -> None:
    photometric = losses.photometric

    def bad(picture, camera, trainer, iteration):
        loss = photometric(picture, camera, trainer, iteration)
        return loss * float("nan") if iteration == 35 else loss

    monkeypatch.setattr("training.trainer.photometric", bad)


@pytest.mark.parametrize(
    "spoil, way, message",
    [
        (bad_loss, ["--no-fused"], r"iteration 35, view shot 0\d.png, loss nan"),
        (lambda patch: poison(patch, 35, slice(None)), [], "iteration 40"),  # its pictures are black, not NaN
    ],
    ids=["loss", "parameters"],
)
def test_divergence_ends_the_run_with_a_checkpoint_from_before(
    spoil, way, message, scene, tmp_path, monkeypatch, capsys
):
    whole, folder = tmp_path / "whole", tmp_path / "m"
    assert train.main(["-s", str(scene), "-m", str(whole), *SHORT, *way, "--quiet"]) == 0
    with monkeypatch.context() as patch:
        spoil(patch)
        assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, *way, "--quiet"]) == 1
    told = capsys.readouterr().err
    assert re.match(rf"train.py: {message}: [\d,]+ of [\d,]+ Gaussians are not finite", told), told
    assert f"train.py -m {folder} --resume" in told and "iteration 30" in told and told.count("\n") == 1
    assert "train.py: " + last_words(folder) == told
    assert list(ModelFolder(folder).checkpoints()) == [30, 20]
    assert train.main(["-m", str(folder), "--resume", "--quiet"]) == 0
    name = "point_cloud/iteration_60/point_cloud.ply"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_bad_exposures_end_the_run(scene, tmp_path, monkeypatch, capsys):
    schedule = Exposure.schedule

    def poisoned(exposure, iteration):
        schedule(exposure, iteration)
        if iteration == 35:
            with torch.no_grad():
                exposure.values.fill_(float("nan"))

    monkeypatch.setattr(Exposure, "schedule", poisoned)
    assert train.main(["-s", str(scene), "-m", str(tmp_path), *SHORT, "--train_test_exp", "--quiet"]) == 1
    told = capsys.readouterr().err
    assert "iteration 40" in told and "not finite" in told and "iteration 30 is saved" in told


def test_a_model_that_is_not_finite_is_not_saved_on_request(scene, tmp_path, monkeypatch, capsys):
    """Somebody asks the run to stop just after all has become NaN."""
    poison(monkeypatch, 33, slice(None))
    schedule = GaussianModel.schedule

    def interrupted(gaussians, iteration):
        schedule(gaussians, iteration)
        if iteration == 34:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GaussianModel, "schedule", interrupted)
    assert train.main(["-s", str(scene), "-m", str(tmp_path), *SHORT, "--quiet"]) == 1
    assert "iteration 34" in (told := capsys.readouterr().err) and "are not finite" in told
    assert list(ModelFolder(tmp_path).checkpoints()) == [30, 20] and not (tmp_path / "point_cloud").exists()


def test_a_bad_loss_of_a_run_that_is_continued(scene, tmp_path, monkeypatch):
    """It was waiting to be read when the checkpoint was written; the model is well."""
    folder = tmp_path / "m"
    options = [*SHORT, "--checkpoint_iterations", "5", "--iterations", "8", "--quiet"]
    assert train.main(["-s", str(scene), "-m", str(folder), *options]) == 0
    for iteration, path in ModelFolder(folder).checkpoints().items():
        if iteration != 5:
            path.unlink()
    load_state_dict = RunHistory.load_state_dict

    def with_a_bad_one(told, *arguments):
        load_state_dict(told, *arguments)
        assert [iteration for iteration, _ in told.waiting] == [1, 2, 3, 4, 5]
        told.waiting[2][1]["loss"].fill_(float("nan"))

    monkeypatch.setattr(RunHistory, "load_state_dict", with_a_bad_one)
    assert train.main(["-m", str(folder), "--resume", "--iterations", "20", "--quiet"]) == 0
    log = (folder / "train.log").read_text()
    assert "iteration 3, view ?, loss nan: all Gaussians are finite; training goes on" in log, log


def test_cameras_in_one_place(tmp_path):
    """Then what is large is told by the points, not by the cameras; or everything would be pruned."""
    data = tiny_scenes.colmap_scene(tmp_path / "scene", 1)
    folder = tmp_path / "m"
    options = [*SHORT, "--opacity_reset_interval", "20", "--iterations", "100", "--quiet"]
    assert train.main(["-s", str(data), "-m", str(folder), *options]) == 0
    assert re.search(r"1 train and 0 test views, extent [1-9]", (folder / "train.log").read_text())
    assert len(load_ply(folder / "point_cloud" / "iteration_100" / "point_cloud.ply")) > 40


# The same bits


def test_deterministic(scene, tmp_path):
    models = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        folder = tmp_path / str(threads)
        assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, "--deterministic", "--quiet"]) == 0
        torch.set_num_threads(before)
        models.append((folder / "point_cloud" / "iteration_60" / "point_cloud.ply").read_bytes())
    assert models[0] == models[1] == models[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_deterministic_on_a_gpu(way, scene, tmp_path):
    models = []
    for name in "abc":
        options = [*SHORT, "--device", "cuda", "--iterations", "300", "--deterministic", "--quiet", way]
        try:
            assert train.main(["-s", str(scene), "-m", str(tmp_path / name), *options]) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        models.append((tmp_path / name / "point_cloud" / "iteration_300" / "point_cloud.ply").read_bytes())
    assert models[0] == models[1] == models[2]

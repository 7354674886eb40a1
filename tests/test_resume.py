"""Runs that are cut off and continued end with the same bits as one that was left alone.

Real processes are killed at random moments of their own time, so that it does not matter how busy the machine
is. They are forked from one that has imported everything, so that a start takes milliseconds.
TILESPLAT_KILLS=200 kills that many.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import render
import train
from arguments import ConfigError, RunParams
from scene.folder import ModelFolder
from tests import tiny_scenes
from tests.test_viewer import message
from training import checkpoint
from training.resume import Checkpoints, alone_in, clear, finished
from utils.files import DataError

KILLS = int(os.environ.get("TILESPLAT_KILLS", 20))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # CUDA once started survives no fork
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_resume", "torch.utils.tensorboard"])
CPU = ["--device", "cpu", "--disable_viewer"]
SHORT = [
    "--iterations", "70", "--densify_from_iter", "5", "--densification_interval", "10",
    "--densify_until_iter", "60", "--opacity_reset_interval", "35", "--densify_grad_threshold", "1e-5",
    "--checkpoint_every", "7", "--save_iterations", "33", "--test_iterations", "21",
    "--eval", "--llffhold", "4", *CPU,
]  # fmt: skip
WAYS = {
    "one native call": ["--random_background"],
    "autograd, exposures": ["--train_test_exp", "--optimizer_type", "sparse_adam"],
}
if torch.cuda.is_available():
    GPU = ["--device", "cuda", "--deterministic"]
    WAYS |= {f"{way}, on a GPU": options + GPU for way, options in WAYS.items()}


def work(arguments: list[str], said: Path, seconds: float = 0.0) -> None:
    """In a process of its own, which a signal kills after so many seconds of its own time; 0: never."""
    torch.set_num_threads(1)
    if "cuda" in arguments:
        torch.zeros(1, device="cuda")  # this takes longer than all the rest
    signal.setitimer(signal.ITIMER_PROF, seconds)
    began = time.process_time()
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    # TensorBoard orders event files by the second they were begun in: let each start have one of its own.
    starts, now = len(list(Path(arguments[-1]).glob("events*"))), time.time
    time.time = lambda: now() + starts
    code = train.main(arguments)
    with contextlib.suppress(OSError):
        print(f"own time: {time.process_time() - began} s")
    sys.exit(code)


def start(folder: Path, *arguments, seconds: float = 0.0) -> multiprocessing.Process:
    said = folder.with_name(folder.name + ".txt")
    process = PROCESSES.Process(target=work, args=([*map(str, arguments), "-m", str(folder)], said, seconds))
    process.start()
    return process


def said(folder: Path) -> str:
    path = folder.with_name(folder.name + ".txt")
    return path.read_text() if path.exists() else ""


def ended(process, folder: Path) -> int:
    process.join(300)
    assert process.exitcode is not None, "it hangs:\n" + said(folder)
    return process.exitcode


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene")


def differences(ours, theirs, where: str = "") -> list[str]:
    """Places in two nested structures that are not the same to the bit."""
    if isinstance(theirs, torch.Tensor):
        same = isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [where]
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or ours.keys() != theirs.keys():
            return [where]
        return [d for key in theirs for d in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(theirs, list | tuple):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return [where]
        return [d for i, value in enumerate(theirs) for d in differences(ours[i], value, f"{where}.{i}")]
    return [] if ours == theirs and type(ours) is type(theirs) else [where]


TIMES = {".parts.history.seconds", ".parts.history.left_out"}  # the one thing that may differ


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"iter_time", "memory"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_results(ours: Path, theirs: Path) -> None:
    names = {
        str(path.relative_to(theirs))
        for path in theirs.rglob("*")
        if path.is_file() and not path.name.startswith("events") and path.name != "train.log"
    }
    assert {"point_cloud/iteration_33/point_cloud.ply", "exposure.json", "chkpnt70.pth"} <= names
    for name in names:
        assert (ours / name).is_file(), name
        if name.endswith(".pth"):
            pair = [torch.load(folder / name, weights_only=True) for folder in (ours, theirs)]
            assert set(differences(*pair)) <= TIMES, name
        elif name == "summary.json":
            told, expected = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
            for key in ("iterations", "gaussians", "scores"):
                assert told[key] == expected[key], key
        elif name not in ("config.json", "cfg_args"):  # they name the folder
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert not list(ours.glob(".*.tmp")), "what a killed process left half-written is cleared away"
    assert differences(curves(ours), curves(theirs)) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments(way, scene, tmp_path):
    common = ["-s", scene, *SHORT, *WAYS[way]]
    truth = tmp_path / "truth"
    assert ended(start(truth, *common), truth) == 0, said(truth)
    usual = float(re.search(r"own time: (\S+) s", said(truth))[1])
    assert (
        torch.load(truth / "chkpnt70.pth", weights_only=True)["parts"]["gaussians"]["params"]["means"].shape[
            0
        ]
        > 60
    )

    chance, kills, rounds, resumed_at = random.Random(way), 0, 0, []
    while kills < KILLS // len(WAYS):
        rounds += 1
        folder = tmp_path / f"round {rounds}"
        while True:
            process = start(folder, *common, "--resume", seconds=chance.uniform(0.001, 1.2 * usual))
            if ended(process, folder) != -signal.SIGPROF:
                break
            kills += 1
        assert process.exitcode == 0, said(folder)
        resumed_at += re.findall(r"Resuming from .*chkpnt(\d+)", said(folder))
        assert_same_results(folder, truth)
    print(f"{way}: {kills} kills in {rounds} runs, resumed from {resumed_at}")
    assert len(resumed_at) > kills // 3, f"most were killed before the first checkpoint: {resumed_at}"


# Ctrl-C and SIGTERM


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"]
)
def test_asked_to_stop(number, scene, tmp_path):
    """It leaves a checkpoint and the model, says how to go on, and what is said works."""
    long = [word if word != "70" else "100000" for word in SHORT]
    folder = tmp_path / "it's here"
    process = start(folder, "-s", scene, *long)
    wait_for(lambda: len(ModelFolder(folder).checkpoints()) > 0, process)
    os.kill(process.pid, number)
    assert ended(process, folder) == 128 + number
    stopped = int(re.search(r"Stopped after iteration (\d+)", said(folder)).group(1))
    assert ModelFolder(folder).checkpoints()[stopped].is_file() and stopped == max(
        ModelFolder(folder).checkpoints()
    )
    assert (folder / "point_cloud" / f"iteration_{stopped}" / "point_cloud.ply").is_file()
    assert "Traceback" not in said(folder)
    command = said(folder).split("To go on:\n")[1].splitlines()[0].strip()
    assert command == f"python train.py -m '{tmp_path}/it'\"'\"'s here' --resume"

    last = stopped + 3
    process = start(folder, "--resume", "--iterations", last)
    assert ended(process, folder) == 0, said(folder)
    assert f"Training from iteration {stopped + 1} " in said(folder)
    assert json.loads((folder / "summary.json").read_text())["iterations"] == last


def start_with_viewer(folder: Path, scene: Path):
    """A run that would go on and on, and the port to which a viewer connects."""
    arguments = [word for word in SHORT if word not in ("70", "--iterations", "--disable_viewer")]
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        process = start(folder, "-s", scene, *arguments, "--port", port)
        told = re.compile(rf"viewer port {port} is busy: listening on 127.0.0.1:(\d+)")
        wait_for(lambda: told.search(said(folder)), process)
    return process, int(told.search(said(folder)).group(1))


def test_asked_to_stop_while_a_viewer_pauses_training(scene, tmp_path):
    folder = tmp_path / "m"
    process, port = start_with_viewer(folder, scene)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(message(train=False))
        assert client.recv(1)
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process, folder) == 143
    assert "Stopped after iteration" in said(folder)


# Output that goes away


def listener(kind: str, path: Path) -> tuple[str, int]:
    """Where a run is to write to, and a descriptor whose closing ends that."""
    if kind == "full":
        return "/dev/full", os.open(os.devnull, os.O_RDONLY)
    if kind == "head":
        os.mkfifo(path)
        return str(path), os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    ours, theirs = os.openpty()
    return os.ttyname(theirs), ours  # theirs stays open, so that the name stays


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("kind", ["full", "head", "terminal"])
def test_output_that_goes_away_does_not_end_a_run(kind, scene, tmp_path):
    """`> /dev/full`, `| head -1`, and a terminal that is closed while nohup keeps SIGHUP away."""
    folder = tmp_path / "m"
    arguments = ["-s", str(scene), *[word if word != "70" else "400" for word in SHORT], "-m", str(folder)]
    path, end = listener(kind, tmp_path / "pipe")
    process = PROCESSES.Process(target=work, args=(arguments, path))
    process.start()
    wait_for(lambda: len(ModelFolder(folder).checkpoints()) > 0, process)
    os.close(end)
    process.join(300)
    assert process.exitcode == 0
    assert max(ModelFolder(folder).checkpoints()) == 399 and json.loads((folder / "summary.json").read_text())
    log = (folder / "train.log").read_text()
    assert "Done: 400 iterations" in log and "[   400]  test" in log, log


def in_a_terminal(arguments: list[str], path: str) -> None:
    os.setsid()
    os.open(path, os.O_RDWR)  # the terminal of this session
    work(arguments, path)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_terminal_that_is_closed_is_asked_to_stop(scene, tmp_path):
    folder = tmp_path / "m"
    arguments = ["-s", str(scene), *[word if word != "70" else "100000" for word in SHORT], "-m", str(folder)]
    ours, theirs = os.openpty()
    process = PROCESSES.Process(target=in_a_terminal, args=(arguments, os.ttyname(theirs)))
    process.start()
    wait_for(lambda: len(ModelFolder(folder).checkpoints()) > 0, process)
    os.close(theirs)
    os.close(ours)
    process.join(300)
    assert process.exitcode == 128 + signal.SIGHUP
    stopped = int(re.search(r"Stopped after iteration (\d+)", (folder / "train.log").read_text())[1])
    assert max(ModelFolder(folder).checkpoints()) == stopped
    assert (folder / "point_cloud" / f"iteration_{stopped}" / "point_cloud.ply").is_file()


def test_asked_to_stop_while_a_viewer_floods_the_run_with_large_pictures(scene, tmp_path):
    folder = tmp_path / "m"
    process, port = start_with_viewer(folder, scene)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(message(8192, 4096) * 50)
        left, before = 8192 * 4096 * 3, time.monotonic()
        while left > 0:  # the first one is there, the second one is being made
            left -= len(client.recv(min(left, 1 << 20)))
        picture, before = time.monotonic() - before, time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: "Stopped after iteration" in said(folder), process)
        limit = max(2.5, 4 * picture)  # 48 more pictures take longer, however busy the machine is
        assert time.monotonic() - before < limit, "heard within a second, then all is saved"
    assert ended(process, folder) == 143


@pytest.mark.parametrize(
    "summary",
    [b'{"iterations": Infinity}', b'{"iterations": NaN}', b"\xff", b"[", b'{"iterations": [7]}', b"{}"],
)
def test_a_damaged_summary_is_none(summary, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_bytes(summary)
    assert finished(ModelFolder(tmp_path)) == 0


def wait_for(what, process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.01)


# Which checkpoint, and which folder


@pytest.fixture(scope="module")
def cut_off(scene, tmp_path_factory) -> tuple[Path, Path]:
    """A folder of a run that ended at 70 and has checkpoints 63 and 70; and how it came out."""
    folder = tmp_path_factory.mktemp("runs") / "m"
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, "--quiet"]) == 0
    assert list(ModelFolder(folder).checkpoints()) == [70, 63], "the last two stay"
    return folder


def copy_cut_off(cut_off: Path, tmp_path: Path) -> Path:
    """As if the run had been killed before its last checkpoint."""
    folder = tmp_path / "m"
    shutil.copytree(cut_off, folder)
    state = torch.load(folder / "chkpnt70.pth", weights_only=True)
    torch.save(state | {"iteration": 69}, folder / "chkpnt69.pth")
    (folder / "chkpnt70.pth").unlink()
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("spoiled", ["torn", "flipped", "empty", "foreign", "renamed", "of another data set"])
def test_a_spoiled_checkpoint_is_told_and_the_one_before_used(spoiled, cut_off, tmp_path, capsys):
    folder = copy_cut_off(cut_off, tmp_path)
    newest = folder / "chkpnt69.pth"
    whole = newest.read_bytes()
    if spoiled == "torn":
        newest.write_bytes(whole[: len(whole) // 2])
    elif spoiled == "flipped":
        middle = len(whole) // 2
        newest.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif spoiled == "empty":
        newest.write_bytes(b"")
    elif spoiled == "foreign":
        torch.save({"weights": torch.zeros(3)}, newest)
    elif spoiled == "renamed":
        shutil.copyfile(folder / "chkpnt63.pth", newest)
    else:
        state = torch.load(newest, weights_only=True)
        state["parts"]["queue"]["count"] = 99
        torch.save(state, newest)
    assert train.main(["-m", str(folder), "--resume", "--no-quiet"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"chkpnt69.pth: .*trying the one before", told) and "Training from iteration 64 " in told
    name = "point_cloud/iteration_70/point_cloud.ply"
    assert (folder / name).read_bytes() == (cut_off / name).read_bytes()


def test_no_usable_checkpoint_at_all(cut_off, tmp_path, capsys):
    folder = copy_cut_off(cut_off, tmp_path)
    before = (folder / "config.json").read_bytes()
    for path in ModelFolder(folder).checkpoints().values():
        path.write_bytes(b"torn")
    assert train.main(["-m", str(folder), "--resume", "--seed", "7"]) == 1
    told = capsys.readouterr().err
    assert "none of its 2 checkpoints can be read" in told and "--overwrite" in told and told.count("\n") == 1
    assert (folder / "config.json").read_bytes() == before


def test_used_folder(cut_off, scene, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(cut_off, folder)
    mine = {folder / "my notes.txt", folder / "test" / "theirs_70" / "renders" / "00000.png"}
    rendered = [
        folder / "test" / "ours_70" / name
        for name in ("renders/00000.png", "gt/00000.png", "names.json", "seconds.json")
    ]
    for path in [*mine, *rendered, folder / "results.json", folder / "per_view.json"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    start_over = ["-s", str(scene), "-m", str(folder), *CPU, "--quiet", "--iterations", "5"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train.main(start_over) == 1
    told = capsys.readouterr().err
    assert "--resume" in told and "--overwrite" in told and told.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    assert train.main([*start_over, "--overwrite"]) == 0
    assert not ModelFolder(folder).checkpoints(), "an old checkpoint would be resumed from by mistake"
    assert [path.name for path in folder.glob("point_cloud/*")] == ["iteration_5"], "viewers take the last"
    assert {path for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"mine"} == mine
    assert not (folder / "test" / "ours_70").exists(), "pictures of a model that is gone would be scored"


def test_a_model_of_the_original_is_not_trained_anew_by_mistake(cut_off, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(cut_off, folder)
    for path in [
        folder / "config.json",
        folder / "summary.json",
        *ModelFolder(folder).checkpoints().values(),
    ]:
        path.unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train.main(["-m", str(folder), "--resume", "--iterations", "70", *CPU]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main(["-m", str(folder), "--resume", "--iterations", "80", *CPU]) == 1
    assert "--start_checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_finished_run(cut_off, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(cut_off, folder)
    assert train.main(["-m", str(folder), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main(["-m", str(folder), "--resume", "--iterations", "72", "--no-quiet"]) == 0
    assert "Training from iteration 71 " in capsys.readouterr().out
    for path in ModelFolder(folder).checkpoints().values():
        path.unlink()
    assert train.main(["-m", str(folder), "--resume", "--iterations", "80"]) == 1
    told = capsys.readouterr().err
    model = folder / "point_cloud" / "iteration_72" / "point_cloud.ply"
    command = f"python train.py -m {folder} --resume --iterations 80 --start_checkpoint {model}"
    assert f"{command} goes on from that" in told
    assert train.main(command.split()[2:]) == 0
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 80


def test_two_processes_and_one_folder(scene, tmp_path, capsys):
    folder = tmp_path / "m"
    long = ["-s", str(scene), *[word if word != "70" else "100000" for word in SHORT]]
    process = start(folder, *long)
    wait_for(lambda: "Training from" in said(folder), process)
    assert train.main([*long, "-m", str(folder), "--overwrite"]) == 1
    assert f"{folder}: another process is training into it" in capsys.readouterr().err
    process.kill()
    process.join(20)
    assert train.main(["-s", str(scene), "-m", str(folder), *SHORT, "--overwrite", "--quiet"]) == 0
    assert not list(folder.glob(".training"))

    (tmp_path / "file").touch()
    assert train.main([*long, "-m", str(tmp_path / "file")]) == 1
    assert "is a file" in capsys.readouterr().err
    assert train.main(["-s", str(tmp_path / "nowhere"), "-m", str(tmp_path / "n")]) == 1
    assert not (tmp_path / "n").exists()


def enter(folder: Path, inside: Path, seconds: float, results) -> None:
    """Go in and out of a folder, and see whether somebody else is there."""
    deadline, entered, met = time.monotonic() + seconds, 0, 0
    while time.monotonic() < deadline:
        try:
            with alone_in(folder):
                entered += 1
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    time.sleep(0.0005 * random.random())
                    inside.unlink()
                except FileExistsError:
                    met += 1
        except ConfigError:
            pass
    results.put((entered, met))


@pytest.mark.parametrize("there", [True, False], ids=["folder stays", "folder comes and goes"])
def test_never_two_in_one_folder(there, tmp_path):
    """Four processes that come and go; each is refused or alone."""
    folder, results = tmp_path / "m", PROCESSES.Queue()
    if there:
        folder.mkdir()
    crowd = [PROCESSES.Process(target=enter, args=(folder, tmp_path / "in", 2.0, results)) for _ in range(4)]
    for process in crowd:
        process.start()
    counts = [results.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join(20)
        assert process.exitcode == 0
    assert sum(met for _, met in counts) == 0, counts
    assert sum(entered for entered, _ in counts) > 100, counts
    assert not list(tmp_path.glob("m/*")) and (folder.exists() or not there)


def test_a_folder_is_left_as_it_was_found(tmp_path):
    ours, fresh = tmp_path / "ours", tmp_path / "a" / "b"
    ours.mkdir()
    for folder in (ours, fresh):
        with pytest.raises(DataError), alone_in(folder):
            assert (folder / ".training").is_file()
            raise DataError("refused")
    assert ours.is_dir() and not list(ours.iterdir()) and not (tmp_path / "a").exists()


def test_a_lock_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuse(path, *arguments, **options):
        if path.name == ".training":
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        with alone_in(tmp_path):
            pass
    assert (tmp_path / ".training").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_links_and_pipes_instead_of_our_files(kind, scene, tmp_path, capsys):
    """Neither written to nor waited for: as a lock it is refused, as a log it is done without."""
    folder, other = tmp_path / "m", tmp_path / "other.txt"
    folder.mkdir()
    if kind == "link":
        other.write_text("mine")

    def make(path: Path) -> Path:
        path.mkdir() if kind == "folder" else os.mkfifo(path) if kind == "pipe" else path.symlink_to(other)
        return path

    arguments = ["-s", str(scene), "-m", str(folder), *SHORT, "--iterations", "5"]
    lock = make(folder / ".training")
    assert train.main(arguments) == 1
    assert f"{lock} must be a plain file" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".training"]
    lock.rmdir() if kind == "folder" else lock.unlink()

    make(folder / "train.log")
    make(folder / f".summary.json.{os.getpid()}.tmp") if "link" in kind else None
    assert train.main(arguments) == 0
    assert "no log file: " in capsys.readouterr().out
    assert (folder / "summary.json").is_file() and not (folder / ".training").exists()
    assert other.exists() == (kind == "link") and (kind != "link" or other.read_text() == "mine")


def test_overwriting_removes_what_a_run_writes_and_nothing_else(scene, tmp_path):
    folder = tmp_path / "m"
    options = ["-s", str(scene), "-m", str(folder), *SHORT, "--iterations", "10", "--test_iterations", "7"]
    assert train.main([*options, "--quiet"]) == 0
    assert render.main(["-m", str(folder), "--quiet"]) == 0
    written = {path for path in folder.rglob("*") if path.is_file()}
    inputs = {
        folder / name for name in ("config.json", "cfg_args", "split.json", "cameras.json", "input.ply")
    }
    mine = [
        "chkpnt_mine.pth", "chkpnt7_best.pth", "chkpnt007.pth", "chkpnt7.pth.bak", ".chkpnt_mine.pth.1.tmp",
        "events.out.tfevents.mine", "train.log.1", "summary.json.old", ".notes.12.tmp",
        "point_cloud/foo", "point_cloud/iteration_10/foo.ply", "point_cloud/iteration_best/point_cloud.ply",
        "point_cloud/iteration_10_best/point_cloud.ply", "point_cloud/iteration_08/point_cloud.ply",
        "test/ours_10/renders/0_mine.png", "test/ours_10/renders/00000.jpg",
        "test/ours_mine/renders/00000.png",
        "test/ours_10/other/00000.png", "tests/ours_10/renders/00000.png", "train/ours_10/notes.json",
    ]  # fmt: skip
    torn = [
        ".chkpnt7.pth.123.tmp", ".config.json.123.tmp", "point_cloud/iteration_10/.point_cloud.ply.1.tmp",
    ]  # fmt: skip
    for name in [*mine, *torn]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "chkpnt9.pth").mkdir()  # a folder is nothing of ours
    (tmp_path / "mine.pth").write_text("mine")
    (folder / "chkpnt8.pth").symlink_to(tmp_path / "mine.pth")
    assert len(ModelFolder(folder).checkpoints()) == 2 and ModelFolder(folder).saved_iterations() == [10]

    clear(ModelFolder(folder), overwrite=False)
    assert not any((folder / name).exists() for name in torn) and all(path.exists() for path in written)
    clear(ModelFolder(folder), overwrite=True)
    left = {path for path in folder.rglob("*") if path.is_file()}
    assert left == inputs | {folder / name for name in mine}
    assert (folder / "chkpnt9.pth").is_dir() and (tmp_path / "mine.pth").read_text() == "mine"
    assert not (folder / "chkpnt8.pth").is_symlink()
    assert train.main([*options, "--quiet", "--overwrite"]) == 0
    assert all((folder / name).read_text() == "mine" for name in mine)


def test_a_run_that_is_refused_changes_nothing(cut_off, tmp_path, capsys):
    """Another data set, or a checkpoint that is not there; the folder goes on describing its model."""
    folder = tmp_path / "m"
    shutil.copytree(cut_off, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = tiny_scenes.colmap_scene(tmp_path / "other", 6)
    assert train.main(["-s", str(other), "-m", str(folder), "--resume", "--iterations", "80"]) == 1
    assert "-m names another folder" in capsys.readouterr().err
    missing = ["--overwrite", "--start_checkpoint", str(tmp_path / "nope.pth")]
    assert train.main(["-s", str(other), "-m", str(folder), *SHORT, *missing]) == 1
    assert "nope.pth: there is no such checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit):
        train.main(["-m", str(tmp_path / "typo"), "--resume"])
    assert "there is no run to resume" in capsys.readouterr().err


def test_a_start_from_another_run(cut_off, tmp_path):
    """With other views and another degree in its options: the Gaussians are those of the checkpoint."""
    other = tiny_scenes.colmap_scene(tmp_path / "other", 7)
    options = ["--start_checkpoint", str(cut_off / "chkpnt70.pth"), "--iterations", "80", "--sh_degree", "1"]
    folder = tmp_path / "m"
    assert train.main(["-s", str(other), "-m", str(folder), *options, *CPU, "--quiet"]) == 0
    assert "SH degree 3, as in the checkpoint, not 1" in (folder / "train.log").read_text()
    assert "sh_degree=3" in (folder / "cfg_args").read_text()
    told = json.loads((folder / "summary.json").read_text())
    assert told["scores"] and all(list(by_iteration) == ["80"] for by_iteration in told["scores"].values())


@pytest.mark.parametrize("content", [b"", b"garbage"], ids=["empty", "garbage"])
def test_bad_start_checkpoint(content, scene, tmp_path, capsys):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    arguments = ["-s", str(scene), "-m", str(tmp_path / "m"), *CPU, "--start_checkpoint", str(path)]
    assert train.main([*arguments, "--quiet"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"train.py: {path}: ") and told.count("\n") == 1, told


def test_when_checkpoints_are_written(tmp_path, monkeypatch):
    """By number, by steps, or by the clock; those asked for by number stay."""
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, *state: saved.append(path) or path.touch())
    now = [0.0]
    monkeypatch.setattr("training.resume.time.monotonic", lambda: now[0])

    def written(**options) -> list[int]:
        for path in tmp_path.glob("*"):
            path.unlink()
        saved.clear()
        checkpoints = Checkpoints(ModelFolder(tmp_path), RunParams(**options), {}, torch.device("cpu"))
        for iteration in range(1, 1001):
            now[0] += 1.0
            if checkpoints.due(iteration):
                checkpoints.write(iteration)
        return [int(path.stem.removeprefix("chkpnt")) for path in saved]

    assert written() == [310, 620, 930]
    assert list(ModelFolder(tmp_path).checkpoints()) == [930, 620]
    assert written(checkpoint_every=300, checkpoint_iterations=[7, 300]) == [7, 300, 600, 900]
    assert list(ModelFolder(tmp_path).checkpoints()) == [900, 600, 300, 7]
    assert written(checkpoint_every=-1, checkpoint_iterations=[5]) == [5]

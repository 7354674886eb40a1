"""A run goes on with its own data set, wherever that is now, and with no other one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_scenes
import torch

import train

SHORT = "--eval --device cpu --disable_viewer --quiet --iterations".split()
PLY = "point_cloud/iteration_30/point_cloud.ply"


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A data set, a run that ended at iteration 20, and what it would have become."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny_scenes.colmap_scene(folder / "scene")
    begin = ["-s", str(data), *SHORT, "20", "--checkpoint_iterations", "20"]
    assert train.main([*begin, "-m", str(folder / "m")]) == 0
    shutil.copytree(folder / "m", folder / "whole")
    assert train.main(["-m", str(folder / "whole"), "--resume", "--iterations", "30"]) == 0
    return folder


def resume(cut_off: Path, folder: Path, *flags: str) -> int:
    shutil.copytree(cut_off / "m", folder / "m")
    return train.main(["-m", str(folder / "m"), "--resume", "--iterations", "30", *flags])


def test_the_data_set_may_have_moved(cut_off, tmp_path):
    """And be written in other words: numbers with fewer digits."""
    shutil.copytree(cut_off / "scene", tmp_path / "moved")
    assert resume(cut_off, tmp_path, "-s", str(tmp_path / "moved")) == 0
    assert (tmp_path / "m" / PLY).read_bytes() == (cut_off / "whole" / PLY).read_bytes()
    rewrite_poses(tmp_path / "moved", lambda number: f"{number:.6f}")
    assert train.main(["-m", str(tmp_path / "m"), "--resume", "--iterations", "40"]) == 0


def rewrite_poses(data: Path, write) -> None:
    path = data / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    for i in range(0, len(lines), 2):
        number, *pose, camera_and_name = lines[i].split(maxsplit=8)
        lines[i] = " ".join([number, *(write(float(word)) for word in pose), camera_and_name])
    path.write_text("\n".join(lines) + "\n")


def more_views(data: Path) -> None:
    shutil.rmtree(data)
    tiny_scenes.colmap_scene(data, 9)


def other_names(data: Path) -> None:
    for path in [*(data / "images").iterdir()]:
        path.rename(path.with_name(path.name.replace("shot", "view")))
    path = data / "sparse" / "0" / "images.txt"
    path.write_text(path.read_text().replace("shot", "view"))


def other_poses(data: Path) -> None:
    shutil.rmtree(data)
    tiny_scenes.colmap_scene(data, shift=(0, 0, 1))


def other_turns(data: Path) -> None:
    rewrite_poses(data, lambda number: f"{number:.2f}")


def other_sizes(data: Path) -> None:
    path = data / "sparse" / "0" / "cameras.txt"
    path.write_text("1 PINHOLE 112 80 120 120 56 40\n")


def other_split(data: Path) -> None:
    (data / "test.txt").write_text("shot 02.png\n")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (more_views, "it is of a data set with 8 views, here are 9"),
        (other_names, "it is of a data set with the view 'shot 00.png', here is 'view 00.png' in its place"),
        (other_poses, "the camera of shot 00.png was at another place, or looked elsewhere"),
        (other_turns, "was at another place, or looked elsewhere"),
        (
            other_sizes,
            "shot 00.png was 56x40 with a focal length of 60, here it is 112x80 with a focal length of 120",
        ),
        (other_split, "the view shot 00.png was for testing, here it is for training"),
    ],
)
def test_another_data_set_is_refused(change, sentence, cut_off, tmp_path, capsys):
    """With as many views, too, which nobody had noticed. Nothing of the run is touched."""
    shutil.copytree(cut_off / "scene", tmp_path / "other")
    change(tmp_path / "other")
    before = {path: path.read_bytes() for path in (cut_off / "m").rglob("*") if path.is_file()}
    assert resume(cut_off, tmp_path, "-s", str(tmp_path / "other")) == 1
    told = capsys.readouterr().err
    assert sentence in told and "chkpnt20.pth: does not fit this run" in told and told.count("\n") == 1
    for path, content in before.items():
        assert (tmp_path / "m" / path.relative_to(cut_off / "m")).read_bytes() == content


def test_checkpoints_without_a_fingerprint_are_resumed(cut_off, tmp_path):
    shutil.copytree(cut_off / "m", tmp_path / "old")
    path = tmp_path / "old" / "chkpnt20.pth"
    state = torch.load(path, weights_only=True)
    del state["data"]
    torch.save(state, path)
    assert train.main(["-m", str(tmp_path / "old"), "--resume", "--iterations", "30"]) == 0
    assert (tmp_path / "old" / PLY).read_bytes() == (cut_off / "whole" / PLY).read_bytes()


@pytest.mark.parametrize(
    "key, value", [("names", 7), ("poses", torch.zeros(3)), ("roles", [9] * 8), ("frame", "x")]
)
def test_damaged_fingerprints(key, value, cut_off, tmp_path, capsys):
    shutil.copytree(cut_off / "m", tmp_path / "m")
    path = tmp_path / "m" / "chkpnt20.pth"
    state = torch.load(path, weights_only=True)
    state["data"][key] = value
    torch.save(state, path)
    assert train.main(["-m", str(tmp_path / "m"), "--resume", "--iterations", "30"]) == 1
    assert "chkpnt20.pth: does not fit this run" in capsys.readouterr().err


def test_another_run_may_start_from_it(cut_off, tmp_path):
    """Its scores are those of other views then, and are not taken over."""
    data = tiny_scenes.colmap_scene(tmp_path / "other", shift=(0, 0, 0.001))
    start = ["--start_checkpoint", str(cut_off / "m" / "chkpnt20.pth")]
    for source, known in ((data, ["30"]), (cut_off / "scene", ["20", "30"])):
        folder = tmp_path / f"from {source.name}"
        assert train.main(["-s", str(source), "-m", str(folder), *SHORT, "30", *start]) == 0
        assert list(json.loads((folder / "summary.json").read_text())["scores"]["test"]) == known

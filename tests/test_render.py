"""render.py: where pictures of another data set or of a file go, and what is said about unreadable files."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import render
import train
from scene import formats
from scene.formats.ply import count_in, load_ply, read_points, save_ply, write_points
from scene.gaussian_model import GaussianModel
from scene.points import PointCloud
from tests import tiny_scenes
from tools import contact_sheet
from utils.files import DataError
from utils.sh import rgb_to_sh

CPU = ["--device", "cpu"]
OWN = ["-m", "model", *CPU, "--quiet"]
POINTS = PointCloud(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Two data sets whose photos have the same names, and a model of the first."""
    folder = tmp_path_factory.mktemp("render")
    tiny_scenes.colmap_scene(folder / "one")
    tiny_scenes.colmap_scene(folder / "two", count=6)
    options = ["--eval", "--llffhold", "4", "--iterations", "20", "--disable_viewer", "--quiet", *CPU]
    assert train.main(["-s", str(folder / "one"), "-m", str(folder / "model"), *options]) == 0
    return folder


@pytest.fixture
def here(scenes, tmp_path, monkeypatch) -> Path:
    """A copy to work in."""
    shutil.copytree(scenes, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert render.main(OWN) == 0
    return tmp_path / "copy"


def pictures(folder: Path) -> dict[str, bytes]:
    """And the names of what they show; not how long they took."""
    files = [path for path in folder.rglob("*.*") if path.is_file() and path.name != "seconds.json"]
    return {str(path): path.read_bytes() for path in files}


def known_blobs(degree: int) -> GaussianModel:
    """The Gaussians that the photos of tiny_scenes show, as a trained model has them."""
    blobs = tiny_scenes.blobs()
    params = {
        "means": blobs["means"],
        "sh_dc": rgb_to_sh(blobs["colors"])[:, None],
        "sh_rest": torch.zeros(tiny_scenes.BLOBS, (degree + 1) ** 2 - 1, 3),
        "opacity_logits": blobs["opacities"].logit(),
        "log_scales": blobs["scales"].log(),
        "raw_quats": blobs["quats"],
    }
    return GaussianModel(params, degree, degree)


def test_another_data_set_leaves_the_models_own_pictures(here, capsys):
    before = pictures(here / "model" / "test") | pictures(here / "model" / "train")
    assert render.main(["-m", "model", "-s", "two", *CPU]) == 0
    assert "python metrics.py -m model/on_two" in capsys.readouterr().out
    assert pictures(here / "model" / "test") | pictures(here / "model" / "train") == before
    other = here / "model" / "on_two"
    names = json.loads((other / "train" / "ours_20" / "names.json").read_text())
    assert len(names) + len(list((other / "test/ours_20/renders").iterdir())) == 6
    assert metrics.main(["-m", "model/on_two", "--lpips", "none", *CPU]) == 0
    assert (other / "results.json").is_file() and not (here / "model" / "results.json").exists()
    shutil.rmtree("model/test")
    assert metrics.main(["-m", "model", "--lpips", "none", *CPU]) == 1
    assert "run metrics.py -m model/on_two, where" in capsys.readouterr().err
    # Again: the same place. Another data set with that name: not the same place.
    assert render.main([*OWN, "-s", "two"]) == 0
    shutil.copytree("two", "elsewhere/two")
    assert render.main([*OWN, "-s", "elsewhere/two"]) == 0
    assert sorted(path.name for path in (here / "model").glob("on_*")) == ["on_two", "on_two_2"]


def test_the_models_data_set_may_have_moved(here):
    first = pictures(here / "model" / "test")
    Path("elsewhere").mkdir()
    Path("one").rename("elsewhere/one")
    shutil.rmtree("model/test")
    assert render.main([*OWN, "-s", "elsewhere/one"]) == 0
    assert pictures(here / "model" / "test") == first and not list(Path("model").glob("on_*"))
    # Another one of the same name has other cameras.
    shutil.copytree("two", "again/one")
    assert render.main([*OWN, "-s", "again/one"]) == 0
    assert pictures(here / "model" / "test") == first and Path("model/on_one/test").is_dir()


def test_training_again_removes_the_pictures_of_other_data_sets(here):
    assert render.main([*OWN, "-s", "two"]) == 0
    assert metrics.main(["-m", "model/on_two", "--lpips", "none", *CPU]) == 0
    options = ["-m", "model", "--overwrite", "--iterations", "10", "--disable_viewer", "--quiet", *CPU]
    assert train.main(["-s", "one", *options]) == 0
    assert not Path("model/on_two").exists()
    # Photos without distortion stay, and do not keep the pictures from their folder.
    Path("model/on_two/undistorted").mkdir(parents=True)
    assert render.main([*OWN, "-s", "two"]) == 0
    assert Path("model/on_two/config.json").is_file()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_bare_ply_of_any_degree(here, degree, capsys):
    save_ply(known_blobs(degree), Path("files/blobs.ply"))
    assert render.main(["--ply", "files/blobs.ply", "-s", "two", "--eval", *CPU]) == 0
    place = Path("output/blobs_on_two")
    assert f"python metrics.py -m {place}" in capsys.readouterr().out
    method = place / "test" / "blobs"
    for index, name in enumerate(["shot 00.png"]):
        photo = np.array(Image.open(f"two/images/{name}")).astype(int)
        picture = np.array(Image.open(method / "renders" / f"{index:05d}.png")).astype(int)
        assert photo.std() > 10 and np.abs(photo - picture).max() <= 1, "the photos show these Gaussians"
    assert metrics.main(["-m", str(place), "--lpips", "none", *CPU]) == 0
    psnr = json.loads((place / "results.json").read_text())["blobs"]["PSNR"]
    assert psnr is None or psnr > 45, "null is infinite: the pictures are equal"
    assert contact_sheet.newest(place) == method


def test_files_of_one_name_do_not_share_a_folder(here):
    for folder, degree in (("a", 0), ("b", 1)):
        save_ply(known_blobs(degree), Path(folder, "point_cloud.ply"))
        for _ in range(2):
            assert render.main(["--ply", f"{folder}/point_cloud.ply", "-s", "two", "--quiet", *CPU]) == 0
    found = sorted(path.name for path in Path("output").iterdir())
    assert found == ["point_cloud_on_two", "point_cloud_on_two_2"]


def test_an_edited_model_keeps_the_models_options(here, capsys):
    before = pictures(here / "model" / "test")
    save_ply(known_blobs(3), Path("edited.ply"))
    assert render.main([*OWN, "--ply", "edited.ply"]) == 0
    assert pictures(here / "model" / "test") == before
    assert len(list(Path("model/edited_on_one/test/edited/renders").iterdir())) == 2, "--llffhold 4 of 8"
    assert metrics.main(["-m", "model", "model/edited_on_one", "--lpips", "none", *CPU]) == 0
    *_, first, second, following = capsys.readouterr().out.splitlines()
    assert following.startswith("Next: ")
    assert "| edited.ply |" in second.replace("  ", "") and "edited.ply" not in first
    assert f"| {tiny_scenes.BLOBS} " in second


def test_a_file_trained_with_antialiasing_is_told(here, capsys):
    save_ply(known_blobs(0), Path("soft.ply"), antialiasing=True)
    for flags, said in (([], True), (["--antialiasing"], False)):
        assert render.main(["--ply", "soft.ply", "-s", "two", *flags, *CPU]) == 0
        assert ("was trained with --antialiasing" in capsys.readouterr().out) == said


def compressed_ply(path: Path) -> None:
    """PlayCanvas' layout: a chunk of bounds, packed vertices."""
    properties = "".join(
        f"property uint packed_{name}\n" for name in ("position", "rotation", "scale", "color")
    )
    chunk = "".join(f"property float {end}_{axis}\n" for end in ("min", "max") for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement chunk 1\n{chunk}element vertex 1\n{properties}"
    path.write_bytes(f"{header}end_header\n".encode() + bytes(6 * 4 + 4 * 4))


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("x.spz", lambda path: path.write_bytes(gzip.compress(b"NGSP" + bytes(40))), "x.spz"),
        ("x.ksplat", lambda path: path.write_bytes(bytes(64)), "must end in one of .compressed.ply, .spz"),
        ("points.ply", lambda path: write_points(path, POINTS), "but is a point cloud"),
        ("nowhere.ply", lambda path: None, "No such file"),
    ],
)
def test_other_files_are_named_with_what_to_do(here, capsys, name, write, message):
    write(Path(name))
    assert render.main(["--ply", name, "-s", "two", "--quiet", *CPU]) == 1
    error = capsys.readouterr().err
    assert message in error and name in error and len(error.splitlines()) == 1
    assert not Path("output").exists()


def test_compressed_points_are_named_too(tmp_path):
    compressed_ply(tmp_path / "points3d.ply")
    for reader in (read_points, load_ply):
        with pytest.raises(DataError, match="is a compressed PLY of Gaussians"):
            reader(tmp_path / "points3d.ply")


def test_a_start_from_another_format(here, capsys):
    formats.write(known_blobs(2), Path("x.spz"))
    start = ["-s", "one", "-m", "new", "--start_checkpoint", "x.spz", "--disable_viewer", "--quiet", *CPU]
    assert train.main([*start, "--iterations", "3"]) == 0
    assert len(load_ply(Path("new/point_cloud/iteration_3/point_cloud.ply"))) == tiny_scenes.BLOBS


def test_count_in_the_header(tmp_path):
    save_ply(known_blobs(2), tmp_path / "x.ply")
    assert count_in(tmp_path / "x.ply") == tiny_scenes.BLOBS
    assert count_in(tmp_path / "no.ply") is None


@pytest.mark.parametrize(
    "line, message",
    [
        ("-s two", "or a file with --ply"),
        ("--ply x.ply", "name the data set folder with -s"),
        ("--ply x.ply -s two --iteration 7", "ply and iteration exclude each other"),
    ],
)
def test_mistakes_on_the_command_line(line, message, capsys):
    with pytest.raises(SystemExit):
        render.main(line.split())
    assert message in capsys.readouterr().err

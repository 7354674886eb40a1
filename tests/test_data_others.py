"""Folders that are no data set: the message says what to do next."""

from pathlib import Path

import pytest
from PIL import Image

from scene.readers import read_dataset
from tests import test_data_colmap as colmap
from tests.test_data_photos import photo
from utils.files import DataError


def message(folder: Path) -> str:
    with pytest.raises(DataError) as told:
        read_dataset(folder)
    assert "\n" not in str(told.value)
    return str(told.value)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("keyframes/cameras/1.json", b"", ["Polycam", "ns-process-data polycam"]),
        ("EXR_RGBD/rgb/0.jpg", b"", ["Record3D", "ns-process-data record3d"]),
        (
            "cameras.xml",
            b'<?xml version="1.0"?>\n<document version="2.0.0"><chunk label="1">',
            ["Metashape", "as COLMAP", "ns-process-data metashape"],
        ),
        ("project.psx", b"", ["Metashape"]),
        (
            "out.csv",
            b"\xef\xbb\xbf#name,x,y,alt,heading,pitch,roll,f,px,py,k1,k2,k3,k4,t1,t2\r\n",
            ["RealityCapture", "as COLMAP", "ns-process-data realitycapture"],
        ),
        ("odm_report/shots.geojson", b"", ["OpenDroneMap", "ns-process-data odm"]),
        ("opensfm/reconstruction.json", b"", ["OpenSfM", "export_colmap"]),
        ("scene0000_00.sens", b"", ["ScanNet", "SensReader", "transforms.json"]),
        ("pose/0.txt", b"", ["ScanNet", "second and third columns negated"]),
        ("nerfstudio_models/step-000.ckpt", b"", ["nerfstudio has trained", "config.yml"]),
        ("point_cloud/iteration_7/point_cloud.ply", b"", ["is a model folder", "-s names"]),
        ("walk.MP4", b"", ["a video", "python convert.py -s", "walk.MP4"]),
        ("cameras.bin", b"", ["reconstruction alone", "name the folder that has it as sparse/0"]),
        ("distorted/database.db", b"", ["convert.py has not finished", "python convert.py -s"]),
    ],
)
def test_what_to_do_with(name, content, words, tmp_path):
    folder = tmp_path / "my data"
    touch(folder / name)
    (folder / name).write_bytes(content)
    if name.startswith("pose"):
        (folder / "intrinsic").mkdir()
    photo(folder / "photos" / "a.jpg")  # that there are photos is not the first thing to say
    said = message(folder)
    assert said.startswith(f"{folder}: could not recognize the scene type; ")
    assert all(word in said for word in words), said
    assert "Looked for sparse/0" in said and "Found " in said


@pytest.mark.parametrize("place", ["", "input", "images", "deep", "deep/er"])
def test_photos_alone(place, tmp_path):
    for i in range(3):
        photo(tmp_path / place / f"{i}.JPG")
    said = message(tmp_path)
    assert f"there are 3 photos in {tmp_path / place}, but nothing says where they were taken from" in said
    source = tmp_path / place if place.startswith("deep") else tmp_path
    assert f"python convert.py -s {source} finds out" in said
    assert ("after renaming images to input" in said) == (place == "images")


def test_the_command_that_it_names_takes_the_photos(tmp_path):
    from convert import find_capture

    photo(tmp_path / "input" / "a.jpg")
    assert "python convert.py -s" in message(tmp_path)
    assert find_capture(tmp_path, 2, False)[0].source == tmp_path / "input"


def test_a_data_set_further_down(tmp_path):
    for name in ("train", "inner/truck"):
        colmap.make_scene(tmp_path / name)
    said = message(tmp_path)
    assert f"there is a data set in {tmp_path / 'train'}, {tmp_path / 'inner' / 'truck'}: name that" in said


@pytest.mark.parametrize("model", ["sparse", "sparse/0"])
def test_the_reconstruction_instead_of_the_data_set(model, tmp_path):
    colmap.make_scene(tmp_path / "a b", model=model)
    expected = f"such as '{tmp_path / 'a b'}'"
    assert expected in message(tmp_path / "a b" / model)


@pytest.mark.parametrize(
    "name, words",
    [
        ("walk.mov", ["it is a video", "python convert.py -s"]),
        ("data.tar.gz", ["it is an archive", "Unpack it"]),
        ("transforms.json", ["it is a file", "Name the folder"]),
    ],
)
def test_files_instead_of_folders(name, words, tmp_path):
    touch(tmp_path / name)
    said = message(tmp_path / name)
    assert all(word in said for word in words) and str(tmp_path / name) in said
    assert said.startswith(f"{tmp_path / name}: the data set folder is not there")


def test_nothing_is_made_up(tmp_path):
    assert "scene type. Looked for" in message(tmp_path) and "Found nothing" in message(tmp_path)
    (tmp_path / "notes.xml").write_bytes(b"<a/>")
    (tmp_path / "table.csv").write_bytes(b"a,b\n")
    Image.new("RGB", (2, 2)).save(tmp_path / "x.gif")
    assert "scene type. Looked for" in message(tmp_path)
    assert message(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: the data set folder is not there"

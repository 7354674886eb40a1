"""Files of data sets, cut off and with bytes changed: they are read, or a message names file and cause.
Never an exception of another library, never a wait."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scene.formats.ply import write_points
from scene.images import Mask, load_counts, load_image, load_inverse_depth
from scene.points import PointCloud, points_in_view
from scene.readers import read_dataset
from scene.split import split_views
from tests import test_data_blender as blender
from tests import test_data_colmap as colmap
from tests import test_data_llff as llff
from tests import test_data_transforms as transforms
from utils.files import DataError

EXAMPLES = settings(
    max_examples=150,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CLOUD = PointCloud(np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([[1, 0, 0.2], [0, 1, 0]]))


def add_pictures(folder: Path, images: str, names: list[str]) -> None:
    """A mask and a depth map for each photo, and content for the photo itself."""
    for name in names:
        with Image.open(folder / images / name) as photo:
            shape = (photo.height, photo.width, 3)
        pixels = np.random.RandomState(0).randint(0, 256, shape, np.uint8)
        for kind in ("masks", "depths"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / images / name)
        Image.fromarray(pixels).save(folder / "masks" / name)
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "depths" / name)


def colmap_scene(folder: Path, write) -> None:
    colmap.make_scene(folder, write)
    add_pictures(folder, "images", ["z.png", "sub dir/a é.png"])
    params = {"z": {"scale": 1.0, "offset": 0.5}, "sub dir/a é": {"scale": 2.0, "offset": 0}}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params), encoding="utf-8")
    (folder / "test.txt").write_text("z.png\n")


def transforms_scene(folder: Path) -> None:
    transforms.make_scene(folder, k1=0.05, ply_file_path="cloud.ply", train_filenames=["images/a.png"])
    add_pictures(folder, "images", list(transforms.NAMES))
    params = {Path(name).stem: {"scale": 1, "offset": 0} for name in transforms.NAMES}
    (folder / "depth_params.json").write_text(json.dumps(params))
    write_points(folder / "cloud.ply", CLOUD)


def blender_scene(folder: Path) -> None:
    blender.make_scene(folder)
    add_pictures(folder, "train", ["r_0.png"])
    write_points(folder / "points3d.ply", CLOUD)


def llff_scene(folder: Path) -> None:
    llff.make_scene(folder)
    names = [f"image{i:03d}.png" for i in range(3)]
    add_pictures(folder, "images_8", names)
    params = {Path(name).stem: {"scale": 1, "offset": 0} for name in names}
    (folder / "depth_params.json").write_text(json.dumps(params))


SCENES = {
    "binary": lambda folder: colmap_scene(folder, colmap.write_binary),
    "text": lambda folder: colmap_scene(folder, colmap.write_text),
    "transforms": transforms_scene,
    "blender": blender_scene,
    "llff": llff_scene,
}


def read_everything(folder: Path) -> None:
    """All that training reads, short of the Gaussians."""
    dataset = read_dataset(folder, depths="depths", masks="masks")
    split_views(dataset, True, 8)
    if dataset.read_points() is None:
        points_in_view(dataset.views, 10, seed=0)
    for view in dataset.views:
        load_image(view.image_path, (8, 6), True, view.lens)
        if view.mask_path:
            load_counts(view.image_path, (8, 6), view.lens, Mask(view.mask_path), True)
        if view.depth:
            load_inverse_depth(view.depth, (8, 6), view.lens)


@pytest.fixture(scope="module", params=SCENES)
def scene(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scene") / "data"
    SCENES[request.param](folder)
    read_everything(folder)
    return folder


def spoiled(data: bytes, how: str, seed: int) -> bytes:
    """The bytes of a file, after an accident."""
    chance = random.Random(seed)
    if how == "cut":
        return data[: chance.randrange(len(data))]
    if how == "empty":
        return b""
    if how == "other":
        return chance.randbytes(chance.choice([1, 30, 3000]))
    if how == "longer":
        return data + chance.randbytes(40)
    spoiled = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(spoiled))
        if how == "words":  # numbers and marks that text formats trip over
            word = chance.choice(
                [b"nan", b"-1", b"1e400", b"[]", b"{", b'"', b"null", b"9" * 5000, b"\n", b"0"]
            )
            spoiled[place : place + chance.choice([0, 1, 4])] = word
        elif how == "extremes":  # in binary formats: sizes and numbers as large as they get
            spoiled[place : place + chance.choice([1, 4, 8])] = chance.choice([b"\xff", b"\x7f", b"\0"]) * 4
        else:
            spoiled[place] = chance.randrange(256)
    return bytes(spoiled)


@EXAMPLES
@given(
    which=st.integers(0, 10**6),
    how=st.sampled_from(["cut", "bytes", "bytes", "extremes", "words", "empty", "other", "longer"]),
    seed=st.integers(0, 10**6),
)
def test_one_spoiled_file(scene, which, how, seed):
    files = sorted(path for path in scene.rglob("*") if path.is_file())
    path = files[which % len(files)]
    whole = path.read_bytes()
    path.write_bytes(spoiled(whole, how, seed))
    try:
        read_everything(scene)
    except DataError as error:
        assert names_a_file(str(error), scene), f"{path.name}, {how}: {error}"
        assert len(str(error)) < 2000, "a message, not a dump"
    finally:
        path.write_bytes(whole)


def test_every_file_is_a_pointer_of_git_lfs(scene):
    """One after the other: the message says so and names the file, or another form of it is used."""
    for path in sorted(path for path in scene.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(colmap.POINTER)
        try:
            with pytest.raises(DataError, match="is only Git LFS's pointer") as told:
                read_everything(scene)
        finally:
            path.write_bytes(whole)
        assert str(path) in str(told.value)


PARTS = st.sampled_from(["..", ".", "", "C:", "images", "a.png", "a", "x" * 300, "\ud800", "~", "\t", "é"])
PATHS = st.one_of(
    st.text(max_size=40),
    st.builds(lambda mark, parts: mark.join(parts), st.sampled_from("/\\"), st.lists(PARTS, max_size=12)),
)


@EXAMPLES
@given(path=PATHS, key=st.sampled_from(["file_path", "mask_path", "ply_file_path", "test_filenames"]))
def test_paths_in_transforms(path, key, tmp_path):
    folder = tmp_path / "data"
    if not folder.exists():
        transforms_scene(folder)
    whole = (folder / "transforms.json").read_text()
    try:
        frame = {key: path} if key in ("file_path", "mask_path") else {}
        transforms.change(folder, frame=frame, **({} if frame else {key: [path] if "names" in key else path}))
        dataset = read_dataset(folder)
        split_views(dataset, True, 8)
        dataset.read_points()
        for view in dataset.views:
            assert view.image_path.resolve().is_relative_to(folder)
    except DataError as error:
        assert names_a_file(str(error), folder), error
    finally:
        (folder / "transforms.json").write_text(whole)


@EXAMPLES
@given(path=PATHS.filter(lambda path: "\0" not in path))
def test_names_in_colmap_models(path, tmp_path):
    folder = tmp_path / "data"
    if not folder.exists():
        colmap.make_scene(folder)
    model = folder / "sparse" / "0" / "images.bin"
    whole = model.read_bytes()
    try:
        model.write_bytes(whole.replace(b"z.png\0", path.encode("utf-8", "ignore") + b"\0"))
        for view in read_dataset(folder).views:
            assert view.image_path.resolve().is_relative_to(folder)
    except DataError as error:
        assert names_a_file(str(error), folder), error
    finally:
        model.write_bytes(whole)


def names_a_file(message: str, folder: Path) -> bool:
    """A path inside the data set, or the folder itself where the whole of it is what is wrong."""
    return str(folder) in message


def test_folders_where_files_should_be_and_nothing_at_all(scene, tmp_path):
    """Each file in turn is missing, or is a folder."""
    folder = tmp_path / "data"
    shutil.copytree(scene, folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for make_folder in (False, True):
            path.unlink()
            if make_folder:
                path.mkdir()
            try:
                read_everything(folder)
            except DataError as error:
                assert names_a_file(str(error), folder), error
            if make_folder:
                path.rmdir()
                path.write_bytes(whole)
            else:
                path.write_bytes(whole)

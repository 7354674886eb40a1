"""Photos that are not where the data set says: found by ending or by the end of their path, counted, refused
where they are outside; and folders of masks and depth maps elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import arguments
from arguments import ModelParams
from scene import Scene
from scene.readers import read_dataset
from scene.split import split_views
from tests import test_data_blender as blender
from tests import test_data_colmap as colmap
from tests import test_data_llff as llff
from tests import test_data_transforms as transforms
from tests.test_scene import ring
from utils.files import DataError


def photo(path: Path, size=(8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def rename(folder: Path, names: dict[str, str]) -> None:
    for old, new in names.items():
        photo(folder / new)
        (folder / old).unlink()


def notes(folder: Path, **options) -> str:
    return "\n".join(read_dataset(folder, **options).notes)


# Another ending


def test_another_ending_of_colmap_photos(tmp_path):
    """As a program leaves them that has removed the background."""
    folder = ring(tmp_path / "data", count=3)
    rename(folder / "images", {f"v{i}.png": f"v{i}.webp" for i in (1, 2)})
    (folder / "test.txt").write_text("v1.png\n")
    dataset = read_dataset(folder)
    assert [view.image_path.name for view in dataset.views] == ["v0.png", "v1.webp", "v2.webp"]
    assert [view.name for view in dataset.views] == ["v0.png", "v1.png", "v2.png"], "as the model calls them"
    assert [view.name for view in split_views(dataset, True, 8)[1]] == ["v1.png"]
    said = notes(folder)
    assert f"Photos: 2 have another ending than in the data set's files: {folder}/images/v1.webp is" in said
    assert "taken for v1.png, and so on" in said and "all 3 in" in said
    assert len(Scene(ModelParams(source_path=str(folder)), torch.device("cpu")).train_cameras) == 3


def test_other_endings_in_other_formats(tmp_path):
    folder = transforms.make_scene(tmp_path / "nerf", train_filenames=["images/a.png"], w=None, h=None)
    rename(folder / "images", {"a.png": "a.JPG"})
    dataset = read_dataset(folder)
    assert [view.name for view in dataset.views] == ["a.png", "b.png", "c.png"]
    assert [view.held_out for view in dataset.views] == [False, True, True]
    assert "Photos: 1 have another ending" in notes(folder)
    folder = blender.make_scene(tmp_path / "blender", ending=".png")
    rename(folder / "train", {"r_0.png": "r_0.jpg"})
    assert read_dataset(folder).views[0].image_path == folder / "train" / "r_0.jpg"
    assert "another" not in notes(blender.make_scene(tmp_path / "bare")), "names there have none"


@pytest.mark.parametrize("first", ["v0.png", "v0.jpg"])
def test_a_photo_does_not_stand_in_for_another_beside_itself(first, tmp_path):
    folder = ring(tmp_path, count=2)
    images = folder / "sparse" / "0" / "images.txt"
    second = "v0.jpg" if first == "v0.png" else "v0.png"
    images.write_text(images.read_text().replace("v0.png", first).replace("v1.png", second))
    with pytest.raises(
        DataError, match=r"v0.png: would be both .*v0.\w+ and .*v0.\w+, which are not one photo"
    ):
        read_dataset(folder)
    photo(folder / "images" / "v0.jpg")
    assert len(read_dataset(folder).views) == 2


def test_lists_of_names_are_no_photos(tmp_path):
    """They may call a photo by less than its path, and nothing is said about that."""
    folder = transforms.make_scene(tmp_path, test_filenames=["a.png", "/home/other/b.jpg", "gone.png"])
    dataset = read_dataset(folder)
    assert [view.held_out for view in dataset.views] == [True, True, False]
    assert dataset.notes == [f"Photos: all 3 in {folder}/images have a pose"]


# How many have no pose


@pytest.mark.parametrize(
    "make, images",
    [
        (colmap.make_scene, "images"),
        (transforms.make_scene, "images"),
        (blender.make_scene, "train"),
        (llff.make_scene, "images_8"),
    ],
)
def test_photos_without_a_pose_are_counted(make, images, tmp_path):
    folder = make(tmp_path / "data")
    count = len(read_dataset(folder).views)
    assert f"Photos: all {count} in {folder}" in notes(folder)
    if make is llff.make_scene:  # has as many poses as photos, or is refused
        return
    for name in ("r_0_depth_0001.png", "._hidden.png", "list.txt"):  # no photos
        photo(folder / images / "x.png").rename(folder / images / name)
    assert f"Photos: all {count} in {folder}" in notes(folder)
    photo(folder / images / "new.jpg")
    assert f"Photos: 1 of {count + 1} photos in {folder}" in notes(folder)
    assert "have no pose and are not used: new.jpg" in notes(folder)
    for i in range(5):
        photo(folder / images / f"more {i}.png")
    assert f"Warning: 6 of {count + 6} photos in {folder}" in notes(folder)
    assert "more 0.png, more 1.png, more 2.png and 3 more" in notes(folder)


def test_training_and_inspection_say_it(tmp_path, capsys):
    folder = ring(tmp_path / "data", count=3)
    photo(folder / "images" / "night" / "v9.png")
    Scene(ModelParams(source_path=str(folder), model_path="m"), torch.device("cpu"), for_training=False)
    assert "Photos: 1 of 4 photos in" in capsys.readouterr().out


# Paths of another machine


FOREIGN = [
    "C:\\Users\\me\\scene\\images\\{}",
    "/home/other/scene/images/{}",
    "\\\\server\\share\\images\\{}",
    "data/scene/images/{}",
    "../elsewhere/images/{}",
    "/home/other/photos/{}",
]


@pytest.mark.parametrize("pattern", FOREIGN)
def test_paths_of_another_machine(pattern, tmp_path):
    folder = transforms.make_scene(tmp_path / "data")
    frames = [{"file_path": pattern.format(n), "transform_matrix": transforms.POSE} for n in transforms.NAMES]
    transforms.change(folder, frames=frames, test_filenames=[pattern.format("c.png")])
    dataset = read_dataset(folder)
    assert [view.name for view in dataset.views] == ["a.png", "b.png", "c.png"]
    assert [view.image_path for view in dataset.views] == [folder / "images" / f"{x}.png" for x in "abc"]
    assert [view.held_out for view in dataset.views] == [False, False, True]
    assert "Photos: 3 paths do not lead into the data set; the files with the same end" in notes(folder)
    for name in transforms.NAMES:
        photo(folder / "images_2" / name, (4, 3))
    assert read_dataset(folder, "images_2").views[0].image_path == folder / "images_2" / "a.png"


@pytest.mark.parametrize("write", [colmap.write_binary, colmap.write_text])
def test_paths_of_another_machine_in_colmap(write, tmp_path, monkeypatch):
    moved = [(*image[:4], f"C:\\me\\images\\{image[4]}", image[5]) for image in colmap.IMAGES]
    with monkeypatch.context() as change:
        change.setattr(colmap, "IMAGES", moved)
        (tmp_path / "sparse" / "0").mkdir(parents=True)
        write(tmp_path / "sparse" / "0")
    for name in ("z.png", "a é.png"):
        photo(tmp_path / "images" / name)
    with pytest.raises(DataError, match=r"1 of 2 images are not there: .*sub dir"):
        (tmp_path / "images" / "sub dir").mkdir()
        (tmp_path / "images" / "a é.png").unlink()
        read_dataset(tmp_path)
    photo(tmp_path / "images" / "sub dir" / "a é.png")
    views = read_dataset(tmp_path).views
    paths = {view.image_path.relative_to(tmp_path / "images").as_posix() for view in views}
    assert paths == {"z.png", "sub dir/a é.png"}


def test_a_missing_photo_is_no_foreign_one(tmp_path):
    """train/r_1.png is not there; another r_1.png is, in another place: it was taken from elsewhere."""
    folder = blender.make_scene(tmp_path, splits=("train",), ending=".png")
    path = folder / "transforms_train.json"
    path.write_text(path.read_text().replace("r_0", "r_1"))
    photo(folder / "r_1.png")
    with pytest.raises(DataError, match=r"1 of 1 images are not there: .*train/r_1.png"):
        read_dataset(folder)


def test_one_file_is_not_taken_for_two(tmp_path):
    folder = transforms.make_scene(tmp_path)
    frames = [
        {"file_path": f"/home/me/{camera}/a.png", "transform_matrix": transforms.POSE}
        for camera in ("left", "right")
    ]
    transforms.change(folder, frames=[*frames])
    with pytest.raises(DataError, match="a.png: would be both /home/me/left/a.png and /home/me/right/a.png"):
        read_dataset(folder)


@pytest.mark.parametrize("kind", ["photo", "mask_path", "ply_file_path", "colmap"])
def test_nothing_outside_is_read_unless_it_is_allowed(kind, tmp_path):
    outside = photo(tmp_path / "else" / "o.png")
    folder = tmp_path / "data"
    if kind == "colmap":
        ring(folder, count=2)
        images = folder / "sparse" / "0" / "images.txt"
        images.write_text(images.read_text().replace("v1.png", "../../else/o.png"))
    elif kind == "ply_file_path":
        transforms.make_scene(folder, ply_file_path=str(outside))
    else:
        transforms.make_scene(folder)
        key = {"photo": "file_path"}.get(kind, kind)
        transforms.change(folder, frame={key: str(outside) if kind == "photo" else "../else/o.png"})

    def read(**options):
        dataset = read_dataset(folder, **options)
        return dataset, dataset.read_points()

    with pytest.raises(DataError, match=r"o.png: is outside the data set .* --allow_outside_paths"):
        read()
    if kind == "ply_file_path":
        with pytest.raises(DataError, match="o.png: cannot be read as PLY"):
            read(outside=True)
        return
    views = read(outside=True)[0].views
    found = [view.mask_path if kind == "mask_path" else view.image_path for view in views]
    assert outside in [path and path.resolve() for path in found]


def test_links_are_followed(tmp_path):
    """A folder of photos on another disk is part of the data set; so are its own, absolute paths."""
    folder = transforms.make_scene(tmp_path / "data")
    (folder / "images").rename(tmp_path / "disk")
    (folder / "images").symlink_to(tmp_path / "disk")
    transforms.change(folder, frame={"file_path": str(tmp_path / "disk" / "a.png")})
    assert [view.name for view in read_dataset(folder).views] == ["a.png", "b.png", "c.png"]
    (tmp_path / "link").symlink_to(folder)
    transforms.change(folder, frame={"file_path": str(folder / "images" / "a.png")})
    assert "do not lead" not in notes(tmp_path / "link")


def test_the_flag(tmp_path):
    outside, folder = photo(tmp_path / "else" / "o.png"), transforms.make_scene(tmp_path / "data")
    transforms.change(folder, frame={"file_path": str(outside)})
    options = ["-s", str(folder), "-m", str(tmp_path / "model")]
    model, *_ = arguments.parse_train(options)
    with pytest.raises(DataError, match="allow_outside_paths"):
        Scene(model, torch.device("cpu"), quiet=True)
    model, *_ = arguments.parse_train([*options, "--allow_outside_paths"])
    assert len(Scene(model, torch.device("cpu"), quiet=True).train_cameras) == 3


NO_NAMES = ["x" * 5000, "/" * 100, "/".join("x" * 5000), "..", "/", ".", "a/../..", "\\", "C:\\", "/\ud800"]


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_names_that_no_file_can_have(name, tmp_path):
    folder = transforms.make_scene(tmp_path)
    transforms.change(folder, frame={"file_path": name, "mask_path": name}, test_filenames=[name])
    with pytest.raises(DataError, match="1 of 3 images are not there"):
        read_dataset(folder)


# Folders of masks and depth maps


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A data set whose masks and depth maps are in the folder where the command is given."""
    folder = ring(tmp_path / "data", count=2)
    for name in ("v0.png", "v1.png"):
        photo(tmp_path / "shell" / "masks" / name)
        photo(tmp_path / "shell" / "depths" / name)
    params = {name: {"scale": 1, "offset": 0} for name in ("v0", "v1")}
    (folder / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))
    monkeypatch.chdir(tmp_path / "shell")
    return folder


def test_masks_and_depths_relative_to_the_shell(beside):
    shell = beside.parent / "shell"
    view = read_dataset(beside, masks="masks", depths="depths").views[0]
    assert view.mask_path == shell / "masks" / "v0.png" and view.depth.path == shell / "depths" / "v0.png"
    for name in ("v0.png", "v1.png"):  # what is in the data set comes first
        photo(beside / "masks" / name)
    assert read_dataset(beside, masks="masks").views[0].mask_path == beside / "masks" / "v0.png"
    with pytest.raises(DataError, match="data/other: the folder of masks is not there"):
        read_dataset(beside, masks="other")


def test_the_model_remembers_where_they_are(beside, monkeypatch):
    shell = beside.parent / "shell"
    options = ["-s", str(beside), "-m", str(beside.parent / "m"), "--masks", "masks", "-d", "./depths"]
    model, *_ = arguments.parse_train(options)
    assert (model.masks, model.depths) == (str(shell / "masks"), str(shell / "depths"))
    photo(beside / "masks" / "v0.png")
    assert arguments.parse_train(options)[0].masks == "masks"

"""Photos that do not fit into memory: decoded into a file, from which they are read when they are shown."""

import contextlib
import io
import shutil
from collections import namedtuple

import pytest
import torch

import distributed
import train
from scene import on_disk
from scene.folder import ModelFolder
from scene.images import Picture
from tests import tiny_scenes
from tests.processes import in_processes
from tests.test_step_options import LINE
from training import checkpoint
from utils.files import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return str(tiny_scenes.colmap_scene(tmp_path_factory.mktemp("data") / "scene"))


def pictures() -> list[Picture]:
    values = [torch.randint(0, 256, (3, 5 + i, 7), dtype=torch.uint8) for i in range(3)]
    values += [torch.rand(4, 6), torch.zeros(5, 3, dtype=torch.uint8)]
    return [Picture(lambda v=v: v, v.shape, CPU, dtype=v.dtype) for v in values]


def never() -> torch.Tensor:
    raise AssertionError("it is decoded again")


def test_pictures_come_back_as_they_were(tmp_path):
    made = pictures()
    expected = [picture.decode() for picture in made]
    told = on_disk.keep_on_disk(made, tmp_path / "new", quiet=True)
    assert told.startswith("5 pictures on the disk") and not list((tmp_path / "new").iterdir())
    for picture in made:
        picture.decode = never
    for ahead in (False, True):
        for picture, value in zip(made, expected):
            if ahead:
                picture.prefetch()
                picture.prefetch()
            found = picture.get()
            assert torch.equal(found, value) and found.dtype == value.dtype and found.is_contiguous()
            found.fill_(7)  # it is a copy


def test_without_pictures(tmp_path):
    assert on_disk.keep_on_disk([], tmp_path, quiet=True) == "0 pictures on the disk, 0 MB"


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(
        DataError, match=r"the pictures take 0.0 GB there and 0.0 GB are free: make them smaller"
    ):
        on_disk.keep_on_disk(pictures(), tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def trained(scene: str, out: str, *words: str) -> list[str]:
    """Names of the photos that this process decodes."""
    decoded, load = [], images_of_scene().load_image

    def watched(path, *rest):
        decoded.append(path.name)
        return load(path, *rest)

    images_of_scene().load_image = watched
    assert (
        train.main(
            [*LINE, "-s", scene, "-m", out, "--iterations", "20", "--checkpoint_iterations", "20", *words]
        )
        == 0
    )
    images_of_scene().load_image = load
    return decoded


def images_of_scene():
    import scene

    return scene


def params(out) -> dict:
    return checkpoint.read(ModelFolder(out).checkpoint(20))["parts"]["gaussians"]["params"]


def assert_equal(ours: dict, theirs: dict) -> None:
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("words", [(), ("--coarse_until", "10", "--eval")])
def test_a_run_is_the_same(scene, tmp_path, words):
    for place in ("cpu", "disk"):
        trained(scene, str(tmp_path / place), "--data_device", place, *words)
    assert_equal(params(tmp_path / "disk"), params(tmp_path / "cpu"))
    assert not (tmp_path / "disk" / on_disk.NAME).exists()


def test_processes_decode_their_share(scene, tmp_path):
    one, two = in_processes(2, trained, scene, str(tmp_path / "disk"), "--data_device", "disk")
    assert len(one) == len(two) == 4 and not {*one} & {*two}
    one, two = in_processes(2, trained, scene, str(tmp_path / "cpu"), "--data_device", "cpu")
    assert len(one) == len(two) == 8
    assert_equal(params(tmp_path / "disk"), params(tmp_path / "cpu"))


def spoilt(scene: str, out: str) -> str:
    """The second process cannot decode one of its photos."""
    load = images_of_scene().load_image

    def fails(path, *rest):
        if distributed.current().rank == 1:
            raise DataError(f"{path.name}: cannot be read as an image")
        return load(path, *rest)

    images_of_scene().load_image = fails
    with contextlib.redirect_stderr(io.StringIO()) as text:
        assert train.main([*LINE, "-s", scene, "-m", out, "--data_device", "disk"]) == 1
    return text.getvalue()


def test_a_photo_that_one_process_cannot_read_ends_all(scene, tmp_path):
    first, second = in_processes(2, spoilt, scene, str(tmp_path / "m"))
    assert first.startswith("train.py: rank 1: shot") and second.startswith("train.py: shot")
    assert not (tmp_path / "m").exists() or not list((tmp_path / "m").iterdir())

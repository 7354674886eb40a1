"""capture.depth_scale: monocular inverse depth maps aligned with key-points, from .bin and .txt
reconstructions."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capture import depth_scale
from scene.readers import colmap

WIDTH, HEIGHT, FOCAL = 80, 60, 70.0
SCALE, OFFSET = 0.5, 0.1  # inverse depth = map * SCALE + OFFSET
ROTATION = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # a quarter turn about y
QUATERNION = (np.sqrt(0.5), 0.0, -np.sqrt(0.5), 0.0)
SHIFT = np.array([0.3, -0.2, 1.5])


def plane(x, y):
    """Inverse depth of a slanted plane at a pixel: linear, so that bilinear interpolation is exact."""
    return 0.3 + 0.1 * (x - WIDTH / 2) / FOCAL + 0.2 * (y - HEIGHT / 2) / FOCAL


def key_points(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [P, 2] and the points of the plane [P, 3] in the world that are seen there."""
    x, y = np.random.default_rng(0).uniform((1, 1), (WIDTH - 1, HEIGHT - 1), (count, 2)).T
    z = 1 / plane(x, y)
    camera = np.stack([(x - WIDTH / 2) / FOCAL * z, (y - HEIGHT / 2) / FOCAL * z, z], axis=1)
    return np.stack([x, y], axis=1), (camera - SHIFT) @ ROTATION


def data_set(folder: Path, form: str, counts: dict[str, int], map_size=(WIDTH, HEIGHT)) -> Path:
    """One photo per name, each with that many key-points on the plane, and its map in folder/depths."""
    model = folder / "sparse" / "0"
    for part in (model, folder / "images", folder / "depths"):
        part.mkdir(parents=True)
    pixels, points = key_points(max(counts.values()))
    ids = 1000 + 7 * np.arange(len(points))[::-1]  # not in order, with gaps
    (_write_bin if form == "bin" else _write_txt)(model, counts, pixels, points, ids)
    width, height = map_size
    x = (np.arange(width) + 0.5) * WIDTH / width
    y = (np.arange(height) + 0.5) * HEIGHT / height
    levels = np.uint16((plane(x[None, :], y[:, None]) - OFFSET) / SCALE * 65536 + 0.5)
    assert levels.std() > 1000
    for name in counts:
        (folder / "depths" / f"{name}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(levels).save(folder / "depths" / f"{name}.png")
    return folder


def _write_txt(model: Path, counts, pixels, points, ids) -> None:
    (model / "cameras.txt").write_text(
        f"1 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n"
    )
    lines = ["# comment"]
    for number, (name, count) in enumerate(counts.items(), start=1):
        lines.append(" ".join(map(str, [number, *QUATERNION, *SHIFT, 1, f"{name}.jpg"])))
        features = [f"{x!r} {y!r} {i}" for (x, y), i in zip(pixels.tolist(), ids[:count])]
        lines.append(" ".join([*features, "5.0 5.0 -1", "6.0 6.0 999999"]))  # no point, and one that is gone
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{i} {x!r} {y!r} {z!r} 10 20 30 0.5 1 0" for i, (x, y, z) in zip(ids, points.tolist())]
    (model / "points3D.txt").write_text("# comment\n" + "\n".join(rows) + "\n")


def _write_bin(model: Path, counts, pixels, points, ids) -> None:
    cameras = struct.pack("<QIiQQ4d", 1, 1, 1, WIDTH, HEIGHT, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2)
    (model / "cameras.bin").write_bytes(cameras)
    images = struct.pack("<Q", len(counts))
    for number, (name, count) in enumerate(counts.items(), start=1):
        images += struct.pack("<I7dI", number, *QUATERNION, *SHIFT, 1) + f"{name}.jpg".encode() + b"\0"
        features = [*zip(pixels.tolist(), ids[:count]), ((5.0, 5.0), -1), ((6.0, 6.0), 999999)]
        images += struct.pack("<Q", len(features)) + b"".join(
            struct.pack("<ddq", x, y, i) for (x, y), i in features
        )
    (model / "images.bin").write_bytes(images)
    rows = [struct.pack("<Q3d3BdQ", i, *p, 10, 20, 30, 0.5, 2) + bytes(16) for i, p in zip(ids, points)]
    (model / "points3D.bin").write_bytes(struct.pack("<Q", len(rows)) + b"".join(rows))


@pytest.mark.parametrize("form", ["bin", "txt"])
@pytest.mark.parametrize("map_size", [(WIDTH, HEIGHT), (160, 120), (40, 30)])
def test_scale_and_offset_are_found(form, map_size, tmp_path):
    folder = data_set(tmp_path, form, {"a": 60, "sub/b": 30, "few": 10}, map_size)
    params = depth_scale.depth_params(folder, folder / "depths")
    assert set(params) == {"a", "sub/b", "few"}
    for name in ("a", "sub/b"):
        assert params[name]["scale"] == pytest.approx(SCALE, rel=2e-3)
        assert params[name]["offset"] == pytest.approx(OFFSET, abs=1e-3)
    assert params["few"] == {"scale": 0.0, "offset": 0.0}  # needs more than ten


@pytest.mark.parametrize("k", [-0.3, 0.3])  # without distortion the frame is 91 or 71 pixels wide, not 80
def test_a_photo_is_aligned_as_it_was_taken(k, tmp_path):
    folder = data_set(tmp_path, "txt", {"a": 60})
    camera = f"1 SIMPLE_RADIAL {WIDTH} {HEIGHT} {FOCAL} {WIDTH / 2} {HEIGHT / 2} {k}\n"
    (folder / "sparse" / "0" / "cameras.txt").write_text(camera)
    params = depth_scale.depth_params(folder, folder / "depths")["a"]
    assert params["scale"] == pytest.approx(SCALE, rel=2e-3)
    assert params["offset"] == pytest.approx(OFFSET, abs=1e-3)


@pytest.mark.parametrize("lines", ["blank", "double", "comments"])
def test_blank_lines_between_images(lines, tmp_path):
    """In a file written by hand or by another program."""
    folder = data_set(tmp_path, "txt", {"few": 10, "a": 60, "b": 30})
    path = folder / "sparse" / "0" / "images.txt"
    first, *pairs = path.read_text().splitlines()
    extra = {"blank": ["", "", "  "], "double": [""], "comments": ["# more", ""]}[lines]
    spaced = [first, *extra]
    for i, line in enumerate(pairs):
        spaced += [line, *(extra if lines == "double" or i % 2 else [])]
    path.write_text("\n".join(spaced))
    params = depth_scale.depth_params(folder, folder / "depths")
    assert params["few"]["scale"] == 0 and len(params) == 3
    for name in ("a", "b"):
        assert params[name]["scale"] == pytest.approx(SCALE, rel=2e-3)


def test_fit():
    known = np.linspace(0.2, 0.8, 21)
    assert depth_scale.fit(known, (known - 0.3) / 1.7) == pytest.approx((1.7, 0.3))
    assert depth_scale.fit(0.5 + 1e-4 * known, known) == (0.0, 0.0)  # all at one depth
    assert depth_scale.fit(known, np.full(21, 0.5)) == (0.0, 0.0)  # a flat map
    outliers = np.append(known, [5.0])  # the median does not follow one bad point
    scale, _ = depth_scale.fit(outliers, np.append((known - 0.3) / 1.7, 0.3))
    assert scale == pytest.approx(1.7 * np.abs(outliers - 0.5).mean() / np.abs(known - 0.5).mean(), rel=0.1)


def test_goes_where_training_looks(tmp_path, monkeypatch, capsys):
    folder = data_set(tmp_path / "data", "bin", {"a": 40})
    places = [part / "depth_params.json" for part in (folder / "sparse" / "0", folder / "depths")]
    monkeypatch.setattr("sys.argv", ["depth_scale", "-s", str(folder), "-d", "depths"])
    for i, place in enumerate(places):
        for earlier in places[:i]:
            earlier.unlink()
            earlier.mkdir()  # cannot be written to, even by root
        assert depth_scale.main() == 0
        assert str(place) in capsys.readouterr().out and place.is_file()
        assert colmap.read(folder, depths="depths").views[0].depth.scale == pytest.approx(SCALE, rel=2e-3)
    places[1].unlink()
    places[1].mkdir()
    assert depth_scale.main() == 1
    said = capsys.readouterr().err
    assert all(str(place) in said for place in places) and "-o" in said


def test_maps_relative_to_the_shell(tmp_path, monkeypatch, capsys):
    folder = data_set(tmp_path / "data", "bin", {"a": 40})
    (folder / "depths").rename(tmp_path / "maps")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["depth_scale", "-s", "data", "-d", "maps"])
    assert depth_scale.main() == 0
    assert "1 maps aligned" in capsys.readouterr().out
    assert colmap.read(folder, depths=str(tmp_path / "maps")).views[0].depth.reliable


def test_read_only_data_set(tmp_path, monkeypatch, capsys):
    folder = data_set(tmp_path / "data", "bin", {"a": 40})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    output = tmp_path / "elsewhere" / "depth_params.json"
    monkeypatch.setattr("sys.argv", ["depth_scale", "-s", str(folder), "-d", "depths", "-o", str(output)])
    assert depth_scale.main() == 0
    assert "1 maps aligned, 0 not usable" in capsys.readouterr().out
    assert json.loads(output.read_text())["a"]["scale"] == pytest.approx(SCALE, rel=2e-3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda f: Image.new("L", (8, 8)).save(f / "depths" / "a.png"),
            "a.png must be a 16-bit gray PNG, got mode L",
        ),
        (lambda f: (f / "depths" / "a.png").unlink(), "depths must hold <name of the photo>.png"),
        (
            lambda f: os.truncate(f / "sparse" / "0" / "points3D.bin", 500),
            "points3D.bin: says 40 points, but has only 500 bytes",
        ),
        (lambda f: (f / "sparse" / "0" / "points3D.bin").unlink(), "points3D.bin"),
    ],
)
def test_mistakes_are_named(break_it, message, tmp_path, monkeypatch, capsys):
    folder = data_set(tmp_path, "bin", {"a": 40})
    break_it(folder)
    monkeypatch.setattr("sys.argv", ["depth_scale", "-s", str(folder), "-d", "depths"])
    assert depth_scale.main() == 1
    assert message in capsys.readouterr().err

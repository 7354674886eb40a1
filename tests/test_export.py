"""export.py: the model turned, cut and written; nothing else about it changes."""

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData

import export
import train
from scene import edit, formats
from scene.gaussian_model import GaussianModel
from tests import tiny_scenes
from tests.test_film import known_blobs
from tests.test_formats import cloud
from utils.geometry import covariances, rotation_matrices
from utils.sh import basis


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_turns_with_the_scene(degree):
    """Truth: the turned scene, seen from a direction, is the scene seen from that direction turned back."""
    g = torch.Generator().manual_seed(degree)
    quat = torch.randn(4, dtype=torch.float64, generator=g)
    rotation = rotation_matrices(quat[None])[0]
    matrix = edit.sh_rotation(rotation, degree)
    coefficients = torch.randn((degree + 1) ** 2 - 1, dtype=torch.float64, generator=g)
    d = torch.nn.functional.normalize(torch.randn(100, 3, dtype=torch.float64, generator=g), dim=1)
    truth = basis(degree, d @ rotation)[:, 1:] @ coefficients
    torch.testing.assert_close(basis(degree, d)[:, 1:] @ (matrix @ coefficients), truth, rtol=0, atol=1e-12)


def test_shapes_turn_with_the_scene():
    model = cloud(50)
    quat = torch.tensor([0.3, -0.5, 0.7, 0.2])
    rotation = rotation_matrices(quat[None])[0]
    turned = edit.turn(model, quat)
    torch.testing.assert_close(turned.means, model.means @ rotation.T)

    def full(m):
        upper = covariances(m.scales, m.quats)
        return upper[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].view(-1, 3, 3)

    torch.testing.assert_close(full(turned), rotation @ full(model) @ rotation.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("up", [[0, 0, 1], [0, 1, 0], [0, -1, 0], [0.3, -0.2, 0.9]])
def test_up_becomes_minus_y(up):
    up = torch.tensor(up, dtype=torch.float64)
    turned = rotation_matrices(edit.to_up(up)[None])[0] @ up / up.norm()
    torch.testing.assert_close(turned, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))


def test_the_command(tmp_path, capsys):
    model = cloud(400, 2, antialiased=True)
    formats.write(model, tmp_path / "a.ply")
    to = [
        str(tmp_path / f"b{ending}")
        for ending in (".spz", ".compressed.ply", ".sog", ".splat", ".glb", ".ply")
    ]
    assert export.main([str(tmp_path / "a.ply"), "--to", *to, "--sh", "1", "--keep", "50%"]) == 0
    for name in to:
        back = formats.read(Path(name))
        assert len(back) == 200 and back.sh_degree == (0 if name.endswith(".splat") else 1)
    said = capsys.readouterr().out
    assert "400 splats" in said and "32.0 bytes each" in said and "cannot hold SH" in said


def test_crop_and_opacity(tmp_path):
    model = cloud(400)
    formats.write(model, tmp_path / "a.ply")
    flags = ["--crop", "-2", "-3", "-4", "2", "3", "4", "--min_opacity", "0.3"]
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "b.ply"), *flags]) == 0
    inside = (model.means.abs() <= torch.tensor([2.0, 3.0, 4.0])).all(1) & (model.opacities[:, 0] >= 0.3)
    assert 0 < inside.sum() < 400
    assert torch.equal(formats.read(tmp_path / "b.ply").means, model.means[inside])


def test_crop_by_a_turned_box(tmp_path):
    """Truth: the corners of the box, by hand. Turned by 90 degrees about z, its x is the world's y."""
    model = cloud(500)
    formats.write(model, tmp_path / "a.ply")
    flags = ["--crop", "1", "0", "0", "2", "8", "20", "0", "0", "90"]
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "b.ply"), *flags]) == 0
    inside = ((model.means - torch.tensor([1.0, 0, 0])).abs() <= torch.tensor([4.0, 1.0, 10.0])).all(1)
    assert 0 < inside.sum() < 500
    assert torch.equal(formats.read(tmp_path / "b.ply").means, model.means[inside])
    crop = {"crop_center": [1, 0, 0], "crop_scale": [2, 8, 20], "crop_rot": [0, 0, math.pi / 2]}
    (tmp_path / "path.json").write_text(json.dumps({"crop": crop}))
    flags = ["--crop", str(tmp_path / "path.json")]
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "c.ply"), *flags]) == 0
    assert torch.equal(formats.read(tmp_path / "c.ply").means, model.means[inside])


def test_turns_about_x_then_y_then_z():
    about = torch.tensor([math.pi / 2, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(edit.euler(about)[:, 1], torch.tensor([0.0, 0, 1], dtype=torch.float64))
    both = torch.tensor([math.pi / 2, 0.0, math.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(edit.euler(both)[:, 0], torch.tensor([0.0, 1, 0], dtype=torch.float64))


def test_hull_of_points():
    """Truth: a cube, and points that are well inside or well outside of it."""
    corners = torch.tensor([[x, y, z] for x in (0.0, 2) for y in (0.0, 2) for z in (0.0, 2)]).double()
    model = cloud(4)
    with torch.no_grad():
        model.means.copy_(torch.tensor([[1.0, 1, 1], [1.9, 0.1, 1.9], [2.2, 1, 1], [-1.0, -1, -1]]))
    assert edit.in_hull(model, corners).tolist() == [True, True, False, False]


def test_up_of_the_cameras(tmp_path):
    model = cloud(20)
    formats.write(model, tmp_path / "point_cloud/iteration_7/point_cloud.ply")
    down = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # the second column is (0, 0, -1): up is +z
    (tmp_path / "cameras.json").write_text(json.dumps([{"rotation": down}] * 3))
    assert export.main(["-m", str(tmp_path), "--to", str(tmp_path / "b.ply"), "--up", "auto"]) == 0
    back = formats.read(tmp_path / "b.ply")
    torch.testing.assert_close(back.means[:, 1], -model.means[:, 2])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["a.ply"], "to is empty"),
        (["--to", "a.spz"], "name a model folder"),
        (["a.ply", "--to", "b.ply", "--keep", "half"], "keep must be a share"),
        (["a.ply", "--to", "b.ply", "--crop", "1", "2"], "crop must be 6 numbers"),
        (["a.ply", "--to", "b.ply", "--crop", "1", "2", "3", "4", "5", "x"], "crop must be 6 numbers"),
        (["a.ply", "--to", "b.ply", "--crop", "box"], "crop must be numbers, cameras"),
        (["a.ply", "--to", "b.ply", "--crop", "cameras"], "crop is cameras, which needs"),
        (["a.ply", "--to", "b.ply", "--clean", "balanced"], "clean needs the train views"),
        (["a.ply", "--to", "b.ply", "--up", "auto"], "needs the cameras"),
    ],
)
def test_flags_that_cannot_be_meant(flags, said, capsys):
    with pytest.raises(SystemExit):
        export.main(flags)
    assert said in capsys.readouterr().err


def test_an_ending_nobody_knows(tmp_path, capsys):
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "b.obj")]) == 1
    assert "b.obj: must end in one of" in capsys.readouterr().err


# Against the views of a model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Blobs that are known, in the folder of a run."""
    folder = tmp_path_factory.mktemp("export")
    tiny_scenes.colmap_scene(folder / "data")
    options = ["--eval", "--llffhold", "4", "--iterations", "5", "--disable_viewer", "--quiet"]
    run = ["-s", str(folder / "data"), "-m", str(folder / "model"), *options, "--device", "cpu"]
    assert train.main(run) == 0
    formats.write(known_blobs(3), folder / "model/point_cloud/iteration_5/point_cloud.ply")
    return folder / "model"


def exported(model: Path, *flags) -> None:
    assert export.main(["-m", str(model), "--device", "cpu", *map(str, flags)]) == 0


def kept(said: str, name: str) -> list[float]:
    """What is said about a file: dB against the model's pictures, of the file, of the model."""
    line = next(line for line in said.splitlines() if name in line and "test views" in line)
    return [float(text) for text in re.findall(r"([\d.]+)(?= dB|$)", line)]


def test_what_the_test_views_keep(trained, tmp_path, capsys):
    exported(trained, "--to", tmp_path / "a.ply", tmp_path / "b.spz", tmp_path / "d.html", "--up", "auto")
    said = capsys.readouterr().out
    assert kept(said, "d.html") == kept(said, "b.spz"), "the same numbers are in it"
    own, now, before = kept(said, "a.ply")
    assert own > 60 and now == before > 35, "nothing is lost, and the blobs are what the photos show"
    own, now, before = kept(said, "b.spz")
    assert 35 < own < 60 and 35 < now < before
    exported(trained, "--to", tmp_path / "c.ply", "--keep", "50%")
    own, now, before = kept(capsys.readouterr().out, "c.ply")
    assert own < 30 and now < before - 5
    exported(trained, "--to", tmp_path / "c.ply", "--no-psnr")
    assert "test views" not in capsys.readouterr().out


def test_what_is_kept_without_photos(trained, tmp_path, capsys):
    alone = shutil.copytree(trained, tmp_path / "alone")
    config = (alone / "config.json").read_text().replace(str(trained.parent / "data"), "/nowhere")
    (alone / "config.json").write_text(config)
    exported(alone, "--to", tmp_path / "b.spz")
    (own,) = kept(capsys.readouterr().out, "b.spz")
    assert 35 < own < 60


def test_what_is_kept_in_another_frame(trained, tmp_path, capsys):
    moved = shutil.copytree(trained, tmp_path / "moved")
    (moved / "normalization.json").write_text(json.dumps({"center": [0.3, -0.2, 0.5], "unit": 2.0}))
    exported(moved, "--to", tmp_path / "a.ply", "--up", "+z")
    own, now, before = kept(capsys.readouterr().out, "a.ply")
    assert own > 45 and abs(now - before) < 0.1 and before > 30


def with_floaters(model: GaussianModel) -> GaussianModel:
    """Three more: one that no camera sees, one far behind that only its opposite camera sees, and a huge and
    faint one."""
    params = {name: torch.cat([v.detach(), v.detach()[:3]]) for name, v in model.params.items()}
    n, camera = len(model), np.array([4 * 0.5**0.5, 0.8 * math.sin(0.75 * math.pi), -4 * 0.5**0.5])
    params["means"][n:] = torch.tensor(
        [[0.0, 40.0, 0.0], (-7.5 * camera - [0, 8, 0]).tolist(), [0.0, 0.0, 0.0]]
    )
    params["log_scales"][n:] = torch.tensor([[-2.0], [-0.5], [1.0]]).expand(3, 3)
    params["opacity_logits"][n:] = torch.tensor([[2.0], [2.0], [-3.5]])
    return GaussianModel(params, model.sh_degree, model.sh_degree)


def test_clean_drops_floaters_and_nothing_else(trained, tmp_path, capsys):
    dirty = shutil.copytree(trained, tmp_path / "dirty")
    ply = dirty / "point_cloud/iteration_5/point_cloud.ply"
    formats.write(with_floaters(known_blobs(3)), ply)
    before = ply.read_bytes()
    exported(dirty, "--to", tmp_path / "a.ply", "--clean", "balanced")
    said = capsys.readouterr().out
    for reason in ("show in no train view", "are alone and in few views", "are huge and faint"):
        assert f" 1 splats {reason}" in said
    assert torch.equal(formats.read(tmp_path / "a.ply").means, known_blobs(3).means)
    assert ply.read_bytes() == before
    exported(dirty, "--to", tmp_path / "b.ply", "--clean", "conservative")
    assert tiny_scenes.BLOBS <= len(formats.read(tmp_path / "b.ply")) < tiny_scenes.BLOBS + 3


def test_what_is_kept_is_what_the_views_show(trained, tmp_path):
    """The largest splat goes first if no train view shows it; of a file alone nobody knows."""
    dirty = shutil.copytree(trained, tmp_path / "dirty")
    ply = dirty / "point_cloud/iteration_5/point_cloud.ply"
    model = with_floaters(known_blobs(3))
    n = len(known_blobs(3)) + 1
    params = {name: value.detach()[:n].clone() for name, value in model.params.items()}
    params["log_scales"][-1] = 1.0
    formats.write(GaussianModel(params, model.sh_degree, model.sh_degree), ply)
    keep = ["--keep", f"{100 * (n - 1) / n}%", "--up", "+x"]
    exported(dirty, "--to", tmp_path / "a.ply", *keep)
    assert len(formats.read(tmp_path / "a.ply")) == n - 1
    assert formats.read(tmp_path / "a.ply").means.norm(dim=1).max() < 10
    assert export.main([str(ply), "--to", str(tmp_path / "b.ply"), *keep, "--device", "cpu"]) == 0
    assert formats.read(tmp_path / "b.ply").means.norm(dim=1).max() > 30


def test_crop_to_what_the_cameras_are_around(trained, tmp_path):
    dirty = shutil.copytree(trained, tmp_path / "dirty")
    formats.write(with_floaters(known_blobs(3)), dirty / "point_cloud/iteration_5/point_cloud.ply")
    exported(dirty, "--to", tmp_path / "a.ply", "--crop", "cameras")
    assert len(formats.read(tmp_path / "a.ply")) == tiny_scenes.BLOBS + 1, "all but those far away"


def test_centers_as_points(trained, tmp_path, capsys):
    exported(trained, "--to", tmp_path / "a.points.ply")
    points = PlyData.read(tmp_path / "a.points.ply")["vertex"].data
    blobs = tiny_scenes.blobs()
    np.testing.assert_allclose(np.stack([points[n] for n in "xyz"], 1), blobs["means"].numpy(), atol=1e-6)
    colors = np.stack([points[n] for n in ("red", "green", "blue")], 1) / 255
    np.testing.assert_allclose(colors, blobs["colors"].numpy(), atol=0.003)
    assert "40 points" in capsys.readouterr().out


def ball(radius: float = 0.8, count: int = 3000) -> GaussianModel:
    """A solid-looking one: small splats on a sphere, the upper half red and the lower blue."""
    k = torch.arange(count) + 0.5
    y, angle = 1 - 2 * k / count, k * math.pi * (3 - 5**0.5)
    ring, red = (1 - y * y).sqrt(), torch.tensor([1.7, 0.0, -1.7])
    params = {
        "means": radius * torch.stack([ring * angle.cos(), y, ring * angle.sin()], 1),
        "sh_dc": torch.where(y[:, None] < 0, red, -red)[:, None],
        "sh_rest": torch.zeros(count, 0, 3),
        "opacity_logits": torch.full((count, 1), 4.0),
        "log_scales": torch.full((count, 3), math.log(0.03)),
        "raw_quats": torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
    }  # fmt: skip
    return GaussianModel(params, 0, 0)


@pytest.mark.parametrize("up", ["none", "+x"])
def test_mesh_of_a_ball(trained, tmp_path, monkeypatch, capsys, up):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    monkeypatch.setattr("viewer.mesh.VOXELS", 60)
    copy = shutil.copytree(trained, tmp_path / "ball")
    formats.write(ball(), copy / "point_cloud/iteration_5/point_cloud.ply")
    if up == "none":  # the frame of training must not matter
        (copy / "normalization.json").write_text(json.dumps({"center": [0.3, 0, 0.5], "unit": 2.0}))
    exported(copy, "--to", tmp_path / "a.mesh.ply", "--up", up)
    assert "a mesh of splats is rough" in capsys.readouterr().out
    mesh = PlyData.read(tmp_path / "a.mesh.ply")
    places = np.stack([mesh["vertex"][n] for n in "xyz"], 1)
    radii = np.linalg.norm(places, axis=1)
    pixel = 4 / tiny_scenes.FOCAL
    assert len(places) > 500 and np.median(np.abs(radii - 0.8)) < pixel
    faces = np.stack(mesh["face"]["vertex_indices"])
    assert faces.min() == 0 and faces.max() == len(places) - 1
    a, b, c = (places[faces[:, k]] for k in range(3))
    outward = (np.cross(b - a, c - a) * (a + b + c)).sum(1) > 0
    assert outward.mean() > 0.9, "triangles turn their front outwards"
    down = -places[:, 0] if up == "+x" else places[:, 1]  # turned so that +x is up, -y, the old y is x
    red = mesh["vertex"]["red"].astype(int) - mesh["vertex"]["blue"]
    assert abs(red[down < -0.3].mean()) > 100 and red[down < -0.3].mean() * red[down > 0.3].mean() < 0


def test_a_mesh_needs_scikit_image_and_views(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    assert export.main(["-m", str(trained), "--to", str(tmp_path / "mesh.ply"), "--device", "cpu"]) == 1
    assert "mesh.ply: a mesh needs the package scikit-image" in capsys.readouterr().err
    formats.write(cloud(10), tmp_path / "a.ply")
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "mesh.ply")]) == 1
    assert "a mesh needs the train views" in capsys.readouterr().err


# USD


@pytest.mark.parametrize("count, degree", [(0, 3), (1, 0), (257, 1), (50, 2), (50, 3)])
@pytest.mark.parametrize("ending", ["usdc", "usda"])
def test_usd_holds_everything(tmp_path, ending, count, degree):
    pytest.importorskip("pxr", reason="usd-core is not installed")
    model, path = cloud(count, degree), tmp_path / f"a.{ending}"
    formats.write(model, path)
    back = formats.read(path)
    assert len(back) == count and back.sh_degree == degree
    for name in ("means", "sh_dc", "sh_rest", "log_scales"):
        torch.testing.assert_close(back.params[name], model.params[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.opacities, model.opacities.clamp(1e-6, 1 - 1e-6), rtol=0, atol=1e-6)
    same = (back.quats * model.quats).sum(1).abs()
    torch.testing.assert_close(same, torch.ones(count), rtol=0, atol=1e-5)


def test_usd_is_y_up(tmp_path):
    """What pxr says: up on the photos, -y in the model, is +y there; and the scene is not mirrored."""
    pytest.importorskip("pxr", reason="usd-core is not installed")
    Usd, UsdVol = (importlib.import_module(f"pxr.{name}") for name in ("Usd", "UsdVol"))
    model = cloud(3)
    formats.write(model, tmp_path / "a.usdc")
    stage = Usd.Stage.Open(str(tmp_path / "a.usdc"))
    assert stage.GetMetadata("upAxis") == "Y"
    field = UsdVol.ParticleField3DGaussianSplat(stage.GetDefaultPrim())
    places = np.array(field.GetPositionsAttr().Get())
    np.testing.assert_allclose(places, model.means.detach().numpy() * [1, -1, -1], rtol=1e-6)
    scales = np.array(field.GetScalesAttr().Get())
    np.testing.assert_allclose(scales, model.scales.detach().numpy(), rtol=1e-5)


def test_usd_that_is_damaged_or_has_no_splats(tmp_path, capsys):
    pytest.importorskip("pxr", reason="usd-core is not installed")
    (tmp_path / "a.usda").write_text("#usda 1.0\n")
    (tmp_path / "b.usdc").write_bytes(b"PXR-USDC" + bytes(100))
    for name, said in (("a.usda", "must have a ParticleField"), ("b.usdc", "cannot be read as USD")):
        assert export.main([str(tmp_path / name), "--to", str(tmp_path / "c.ply")]) == 1
        assert said in capsys.readouterr().err


def test_usd_needs_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pxr", None)
    formats.write(cloud(3), tmp_path / "a.ply")
    assert export.main([str(tmp_path / "a.ply"), "--to", str(tmp_path / "a.usdc")]) == 1
    assert "a.usdc: USD needs the package usd-core" in capsys.readouterr().err

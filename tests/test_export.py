"""export.py: the model turned, cut and written; nothing else about it changes."""

import json

import pytest
import torch

import export
from scene import edit, formats
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
        back = formats.read(name)
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
        (["a.ply", "--to", "b.ply", "--crop", "1"], "crop must be 6 numbers"),
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

"""Lenses: distortions against numbers worked by hand (and against pycolmap, where it is installed), the frame
that is left, and undistorted pictures against a picture that is known as a formula."""

import math

import numpy as np
import pytest

from scene.lens import MODELS, Lens, parameter_count, undistort, undistorted_size
from utils.files import DataError

# At the direction (0.3, 0.4, 1): r = 0.5, r² = 0.25, and the angle off the axis is atan(0.5).
ANGLE = math.atan(0.5)
EQUIDISTANT = 0.6 * ANGLE, 0.8 * ANGLE
CASES = {
    "SIMPLE_PINHOLE": ((), (0.3, 0.4)),
    "PINHOLE": ((), (0.3, 0.4)),
    "SIMPLE_RADIAL": ((0.2,), (0.3 * 1.05, 0.4 * 1.05)),
    "RADIAL": ((0.2, -0.4), (0.3 * 1.025, 0.4 * 1.025)),
    # 2 p1 xy + p2 (r² + 2x²) = 0.0024 + 0.0086; 2 p2 xy + p1 (r² + 2y²) = 0.0048 + 0.0057
    "OPENCV": ((0.2, -0.4, 0.01, 0.02), (0.3 * 1.025 + 0.011, 0.4 * 1.025 + 0.0105)),
    # (1 + 0.05 + 0.4 / 64) / (1 + 0.025)
    "FULL_OPENCV": (
        (0.2, 0, 0.01, 0.02, 0.4, 0.1, 0, 0),
        (0.3 * 1.05625 / 1.025 + 0.011, 0.4 * 1.05625 / 1.025 + 0.0105),
    ),
    "SIMPLE_FISHEYE": ((), EQUIDISTANT),
    "FISHEYE": ((), EQUIDISTANT),
    "SIMPLE_RADIAL_FISHEYE": ((0.2,), tuple(e * (1 + 0.2 * ANGLE**2) for e in EQUIDISTANT)),
    "RADIAL_FISHEYE": ((0.2, 0.1), tuple(e * (1 + 0.2 * ANGLE**2 + 0.1 * ANGLE**4) for e in EQUIDISTANT)),
    "OPENCV_FISHEYE": (
        (0.2, 0, 0.3, 0.1),
        tuple(e * (1 + 0.2 * ANGLE**2 + 0.3 * ANGLE**6 + 0.1 * ANGLE**8) for e in EQUIDISTANT),
    ),
    "THIN_PRISM_FISHEYE": (
        (0.2, 0, 0, 0, 0, 0, 0.05, 0.1),
        tuple(e * (1 + 0.2 * ANGLE**2) + s * ANGLE**2 for e, s in zip(EQUIDISTANT, (0.05, 0.1))),
    ),
    "RAD_TAN_THIN_PRISM_FISHEYE": (
        (0, 0, 0, 0, 0, 0, 0, 0, 0.05, 0.2, 0.1, 0),
        (0.6 * ANGLE + 0.05 * ANGLE**2 + 0.2 * ANGLE**4, 0.8 * ANGLE + 0.1 * ANGLE**2),
    ),
    "FOV": ((math.pi / 2,), tuple(2 * n * math.atan(1.0) / math.pi for n in (0.6, 0.8))),  # 2 r tan 45° = 1
    "SIMPLE_DIVISION": ((0.75,), (0.4, 1.6 / 3)),  # r = 2/3 gives r / (1 + k r²) = (2/3) / (4/3)
    "DIVISION": ((0.75,), (0.4, 1.6 / 3)),
    "EUCM": ((0.5, 5.0), (0.3 / 1.25, 0.4 / 1.25)),  # 0.5 sqrt(5 / 4 + 1) + 0.5
}


@pytest.mark.parametrize("model", MODELS)
def test_distortions_worked_by_hand(model):
    coefficients, (u, v) = CASES[model]
    lens = Lens(model, 640, 480, 500.0, 520.0, 310.0, 250.0, coefficients)
    here = lens.project(np.array(0.3), np.array(0.4))
    np.testing.assert_allclose(here, (500 * u + 310, 520 * v + 250), rtol=1e-12)
    middle = lens.project(np.array(0.0), np.array(0.0))
    np.testing.assert_allclose(middle, (310, 250), atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_distortions_are_colmaps(model):
    pycolmap = pytest.importorskip("pycolmap")
    camera = pycolmap.Camera.create_from_model_name(1, model, 500.0, 640, 480)
    random = np.random.default_rng(0)
    _, focals, count = MODELS[model]
    coefficients = {"FOV": [0.9], "EUCM": [0.6, 1.1]}.get(model, list(random.uniform(-0.05, 0.05, count)))
    camera.params = params = np.array([500.0, 510.0][:focals] + [330.0, 235.0] + coefficients)
    lens = Lens.from_parameters(model, 640, 480, tuple(params))
    assert len(params) == parameter_count(model)
    directions = random.uniform(-0.6, 0.6, (50, 2))
    theirs = [camera.img_from_cam(np.array([*direction, 1.0])) for direction in directions]
    np.testing.assert_allclose(np.transpose(lens.project(*directions.T)), theirs, atol=1e-9)


LENSES = {
    "barrel": Lens("SIMPLE_RADIAL", 160, 120, 150.0, 150.0, 80.0, 60.0, (-0.2,)),
    "pincushion": Lens("SIMPLE_RADIAL", 160, 120, 150.0, 150.0, 75.0, 63.0, (0.2,)),
    "tilted": Lens("OPENCV", 160, 120, 150.0, 155.0, 90.0, 50.0, (0.1, -0.3, 0.01, -0.02)),
    "fisheye": Lens("OPENCV_FISHEYE", 160, 120, 80.0, 80.0, 80.0, 60.0, (0.02, -0.01, 0, 0)),
    "thin prism": Lens(
        "THIN_PRISM_FISHEYE", 160, 120, 120.0, 120.0, 82.0, 61.0, (0.02, 0, 0.01, 0, 0, 0, 0.01, 0.02)
    ),
    "field of view": Lens("FOV", 160, 120, 90.0, 90.0, 80.0, 60.0, (0.9,)),
}


def border(frame, grow=(0, 0, 0, 0)):
    """Directions along the edges of the frame, grown by pixels to the left, top, right, bottom."""
    left, top = -frame.cx - grow[0], -frame.cy - grow[1]
    right, bottom = frame.width - frame.cx + grow[2], frame.height - frame.cy + grow[3]
    t = np.linspace(0, 1, 1001)
    x = np.concatenate([left + (right - left) * t] * 2 + [np.full(1001, left), np.full(1001, right)])
    y = np.concatenate([np.full(1001, top), np.full(1001, bottom)] + [top + (bottom - top) * t] * 2)
    return x / frame.fx, y / frame.fy


@pytest.mark.parametrize("name", LENSES)
def test_the_frame_is_the_largest_that_was_photographed(name):
    lens = LENSES[name]
    frame = lens.pinhole()
    assert (frame.fx, frame.fy) == (lens.fx, lens.fy)

    def outside(grow):
        u, v = lens.project(*border(frame, grow))
        return max(-u.min(), -v.min(), u.max() - lens.width, v.max() - lens.height)

    now = outside((0, 0, 0, 0))
    assert now < 0.01
    for side in range(4):
        grow = [0.0] * 4
        grow[side] = 1.5  # the size is a whole number of pixels: up to one is lost
        assert outside(grow) > now + 1e-5, "this side could have grown"


def test_wide_lenses_end_at_sixty_degrees():
    all_around = Lens("FISHEYE", 1000, 1000, 1000 / math.pi, 1000 / math.pi, 500.0, 500.0)  # 180 degrees
    frame = all_around.pinhole()
    assert frame.width == frame.height == int(2 * math.tan(math.radians(60)) * 1000 / math.pi)


def test_beyond_the_turning_point_nothing_is_used():
    """r (1 - 0.3 r²) is largest at r = 1 / sqrt(0.9), short of the picture's edge: a square ends there."""
    frame = Lens("SIMPLE_RADIAL", 1000, 1000, 500.0, 500.0, 500.0, 500.0, (-0.3,)).pinhole()
    assert frame.width == frame.height == pytest.approx(2 * 500 / math.sqrt(0.9) / math.sqrt(2), abs=2)


def test_lenses_that_do_not_distort_are_left_alone():
    lens = Lens("OPENCV", 160, 120, 150.0, 155.0, 90.0, 50.0, (0.0, 0.0, 0.0, 0.0))
    assert not lens.distorts() and lens.pinhole().width == 160 and lens.pinhole().cx == 90
    assert not Lens("FOV", 160, 120, 150.0, 155.0, 90.0, 50.0, (1e-9,)).distorts()
    assert not Lens("EUCM", 160, 120, 150.0, 155.0, 90.0, 50.0, (0.0, 2.0)).distorts()
    assert Lens("FISHEYE", 160, 120, 150.0, 155.0, 90.0, 50.0).distorts()


@pytest.mark.parametrize(
    "lens, message",
    [
        (Lens("SIMPLE_RADIAL", 100, 100, 50.0, 50.0, -3.0, 50.0, (0.1,)), "principal point .-3, 50. outside"),
        (Lens("SIMPLE_RADIAL", 100, 100, 50.0, 50.0, 50.0, 50.0, (-1e6,)), "leaves .* pixels once undist"),
        (Lens("SIMPLE_RADIAL", 100, 100, 50.0, 50.0, 50.0, 50.0, (math.nan,)), "leaves 0 x 0 of 100 x 100"),
    ],
)
def test_lenses_that_cannot_be(lens, message):
    with pytest.raises(DataError, match=message):
        lens.pinhole()


def pattern(u, v, width, height):
    """A smooth picture as a function of the place in it (0..1), three channels of 20..235."""
    waves = [
        np.sin(9 * u / width + 4 * v / height),
        np.cos(7 * v / height),
        np.sin(5 * u / width * v / height),
    ]
    return 127.5 + 107 * np.stack(waves, -1)


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize("scale", [1, 2])
def test_undistorted_pictures_show_what_is_there(monkeypatch, name, scale):
    """The file may be larger or smaller than the camera says. Bands are smaller than the picture."""
    monkeypatch.setattr("scene.lens.BAND", 2000)
    lens, size = LENSES[name], (160 * scale, 120 * scale)
    row, column = np.mgrid[: size[1], : size[0]] + 0.5
    picture = np.uint8(pattern(column, row, *size) + 0.5)
    ours = undistort(picture, lens)
    width, height = undistorted_size(lens, size)
    assert ours.shape == (height, width, 3) and ours.std() > 20

    frame = lens.pinhole()
    x = ((np.arange(width) + 0.5) / width * frame.width - frame.cx) / frame.fx
    y = ((np.arange(height) + 0.5) / height * frame.height - frame.cy) / frame.fy
    u, v = lens.project(*np.meshgrid(x, y))
    exact = pattern(u * scale, v * scale, *size)
    # Half a level of rounding before, times 1.375² as the bicubic weights add up to at most, and half after.
    assert np.abs(ours - exact)[2:-2, 2:-2].max() < 1.5
    depth = undistort(picture[..., :1].astype(np.float32), lens)
    assert depth.dtype == np.float32 and np.abs(depth[..., 0] - exact[..., 0])[2:-2, 2:-2].max() < 0.8

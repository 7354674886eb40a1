"""Colors that each photo has of its own: what cameras do to them, derivatives, files, test views."""

import json
from functools import cache

import pytest
import torch
from diff_gaussian_rasterization import Rendered

import metrics
import render
from arguments import Options, parse_train
from per_view import Affine, Bilateral, Exposure, PerView, Ppisp, attached, bilateral, saved
from per_view.affine import transforms
from per_view.appearance import color_rate
from per_view.bilateral import SHAPE, recolored, roughness
from per_view.exposure import apply_exposure
from per_view.ppisp import POINTS, balanced, camera_of, falloff, homography
from scene import Scene
from scene.cameras import Camera
from scene.folder import ModelFolder
from tests import blurred_scenes, tiny_scenes
from tests.derivatives import assert_derivatives
from tests.test_deblurring import trained
from utils.files import DataError
from utils.image import psnr, with_colors_of

CPU = torch.device("cpu")


def camera(name: str = "a", is_test: bool = False) -> Camera:
    K = torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
    return Camera(name, 16, 12, torch.eye(4), K, is_test=is_test)


def image(seed: int = 0, **kind) -> torch.Tensor:
    return 0.1 + 0.8 * torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(seed), **kind)


def rendered(of: torch.Tensor) -> Rendered:
    one = torch.ones_like(of[:1])
    return Rendered(of, one, one, torch.ones(1, dtype=torch.int32))


def module(kind: str, names=("a", "b", "c"), size: float = 0.1, **to) -> Affine | Ppisp | Bilateral:
    names, random = list(names), torch.Generator().manual_seed(1)
    if kind == "exposure":
        return Affine(names, size * torch.randn(len(names), 3, 4, generator=random))
    if kind == "ppisp":
        found = Ppisp(names, [camera_of(camera())], torch.zeros(len(names), 9))
    else:
        found = Bilateral(names, CPU)
    for part in (found, found.lenses if kind == "ppisp" else found.whole):
        values = part.values.detach() + size * torch.randn(part.values.shape, generator=random)
        part.values = torch.nn.Parameter(values.to(**to))
    return found


@pytest.mark.parametrize("kind", ("ppisp", "bilateral"))
def test_they_begin_as_nothing(kind):
    shown = module(kind, size=0.0).picture(camera(), [rendered(image())]).image
    torch.testing.assert_close(shown, image(), atol=1e-6, rtol=1e-5)


WEIGHTS = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("found", (Exposure(["a", "b"], CPU), Affine(["a", "b"], torch.zeros(2, 3, 4))))
def test_derivatives_of_exposures(found):
    del found.values

    def loss(seen, values):
        found.values = values
        return (WEIGHTS * found.picture(camera(), [rendered(seen)]).image).sum()

    values = torch.eye(3, 4).repeat(2, 1, 1) + 0.1 * torch.arange(24).view(2, 3, 4)
    assert_derivatives(loss, [image().double(), values.double()])


def test_derivatives_of_ppisp():
    """Of what is shown and of the restraint, by the numbers of the photo, of its lens and by the render."""
    found = module("ppisp", dtype=torch.float64)
    lens = found.lenses.values.detach().clone()
    lens[:, :, 2:] = -0.3 + 0.1 * lens[:, :, 2:]  # inside of the clamp
    inputs = image().double(), found.values.detach().clone(), lens
    del found.values, found.lenses.values

    def loss(seen, values, lenses):
        found.values, found.lenses.values = values, lenses
        shown = found.picture(camera(), [rendered(seen)])
        return (WEIGHTS * shown.image).sum() + found.restraint(shown, camera(), None, 1)

    assert_derivatives(loss, inputs)


def test_derivatives_of_grids():
    """The same; a grid has 24,576 numbers: along directions."""
    found = module("bilateral", dtype=torch.float64)
    grid, whole = found.values.detach().clone(), found.whole.values.detach().clone()
    directions = torch.randn(5, *grid.shape, generator=torch.Generator().manual_seed(4)).double()
    del found.values, found.whole.values

    def loss(seen, by, whole):
        found.values, found.whole.values = grid + torch.tensordot(by, directions, 1), whole
        shown = found.picture(camera(), [rendered(seen)])
        return (WEIGHTS * shown.image).sum() + found.restraint(shown, camera(), None, 1)

    assert_derivatives(loss, [image().double(), torch.zeros(5).double(), whole])


def test_chromaticities_go_where_latents_say():
    latents = torch.tensor([0.5, -0.3, 0.2, 0.4, -0.6, 0.1, 0.3, -0.2]).double()
    H, still = homography(latents), homography(torch.zeros(8).double())
    torch.testing.assert_close(still, torch.eye(3).double())
    seen = H @ torch.tensor([*POINTS[3], 1.0]).double()  # gray
    gray = torch.tensor([1 / 3, 1 / 3]).double()
    move = torch.tensor([[0.0128369, -0.0034654], [-0.0034654, 0.0128158]]).double() @ latents[6:]
    torch.testing.assert_close(seen[:2] / seen[2], gray + move)
    blue = H @ torch.tensor([0.0, 0, 1]).double()
    move = torch.tensor([[0.0480542, -0.0043631], [-0.0043631, 0.0481283]]).double() @ latents[:2]
    torch.testing.assert_close(blue[:2] / blue[2], move)
    shown = balanced(image().double(), H)
    torch.testing.assert_close(shown.sum(0), image().double().sum(0))
    assert (shown - image()).abs().max() > 0.01
    assert balanced(torch.zeros(3, 2, 2).double(), H).eq(0).all()


def test_light_falls_off_from_the_center():
    lens = torch.zeros(3, 5)
    assert falloff(lens, 12, 16).eq(1).all()
    lens[0] = torch.tensor([0.25, 0, -1.0, 0, 0])  # red, centered a quarter of the width to the right
    lens[1, 2:] = torch.tensor([0.0, 0.5, -9.0])
    light = falloff(lens, 12, 16)
    x, y = (3.5 / 16 - 0.25), 0.5 / 16
    assert light[0, 6, 11].item() == pytest.approx(1 - x**2 - y**2)
    r2 = (7.5**2 + 5.5**2) / 16**2
    assert light[1, 0, 0].item() == pytest.approx(1 + 0.5 * r2**2 - 9 * r2**3)
    assert light[2].eq(1).all() and light.max() <= 1


def test_grids_are_read_by_place_and_gray():
    transform = torch.tensor([[0.9, 0.1, 0, 0.05], [0, 1.1, 0, 0], [0, 0.2, 0.7, -0.02]])
    grid = transform.view(12, 1, 1, 1).expand(SHAPE)
    torch.testing.assert_close(recolored(image(), grid), apply_exposure(image(), as_exposure(transform)))
    assert roughness(grid) == 0
    grid = torch.zeros(SHAPE)
    grid[3] = torch.linspace(0, 1, 16)  # red is where it is from left to right
    grid[7] = torch.linspace(0, 1, 16)[:, None]
    grid[11] = torch.linspace(0, 1, 8)[:, None, None]  # blue is how bright it was
    shown, gray = recolored(image(), grid), torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), image(), 1)
    torch.testing.assert_close(shown[0, 5], (torch.arange(16) + 0.5) / 16)
    torch.testing.assert_close(shown[1, :, 5], (torch.arange(12) + 0.5) / 12)
    torch.testing.assert_close(shown[2], gray)
    assert roughness(grid).item() == pytest.approx((1 / 15**2 + 1 / 15**2 + 1 / 7**2) / 12)


def as_exposure(transform: torch.Tensor) -> torch.Tensor:
    return torch.cat([transform[:, :3].T, transform[:, 3:]], 1)


@pytest.mark.parametrize("kind", ("exposure", "ppisp", "bilateral"))
def test_other_views_have_the_median(kind):
    found = module(kind)
    shown = [
        found.picture(camera(*view), [rendered(image())]).image for view in (("a",), ("z",), ("a", True))
    ]
    with torch.no_grad():
        if kind == "bilateral":
            found.values += found._whole()
            found.whole.values.zero_()
        found.values[:] = found.values.median(0).values
    middle = found.picture(camera("b"), [rendered(image())]).image
    assert not torch.allclose(shown[0], middle, atol=1e-3)
    for other in shown[1:]:
        torch.testing.assert_close(other, middle)


def test_what_photos_share_is_the_scenes():
    found = module("ppisp", size=0.0)
    found.rate = 0.01
    found.values.grad = torch.zeros_like(found.values)
    found.values.grad[1] = 1.0
    found.step()
    torch.testing.assert_close(found.values.mean(0), torch.zeros(9), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.values[1] - found.values[0], torch.full((9,), -0.01))
    found = Affine(["a", "b", "c"], torch.zeros(3, 3, 4))
    found.rate = 0.01
    found.values.grad = torch.zeros(3, 3, 4)
    found.values.grad[1] = 1.0
    found.step()
    moved = transforms(found.values.detach())
    torch.testing.assert_close(moved.mean(0), torch.eye(3, 4))
    torch.testing.assert_close(moved[1] - moved[0], -0.01 * (0.2 + 0.8 * torch.eye(3, 4)))
    found = module("bilateral", size=0.0)
    found.rate = 0.01
    found.whole.values.grad = torch.zeros_like(found.whole.values)
    found.whole.values.grad[2] = 1.0
    found.step()
    assert found.whole.values[2].max() < 0 and found.whole.values.mean(0).abs().max() < 1e-8


def test_rates_ease_in_and_rest_after_opacity_resets():
    options = parse_train(["-s", "data", "--iterations", "6000", "--appearance", "ppisp"])
    rates = {step: color_rate(options, step, 1 / 60) for step in (1, 100, 3000, 3001, 3300, 3301, 6000)}
    assert rates[1] < 0.1 * rates[100] and rates[100] == pytest.approx(0.05 * 0.01 ** (1 / 60))
    assert [step for step, value in rates.items() if value == 0] == [3001, 3300]
    assert rates[6000] == pytest.approx(0.0005)


@pytest.mark.parametrize("kind", ("exposure", "ppisp", "bilateral"))
def test_files(kind, tmp_path):
    found, folder = module(kind), ModelFolder(tmp_path)
    ply = folder.ply(7)
    ply.parent.mkdir(parents=True)
    found.save(folder, 7)
    (other,) = saved(parse_train(["-s", str(tmp_path)]).model, ply, folder, CPU)
    for view in (camera("b"), camera("z")):
        ours, theirs = (m.picture(view, [rendered(image())]).image for m in (found, other))
        torch.testing.assert_close(ours, theirs)
    path = ply.with_name("appearance.pth" if kind == "bilateral" else "appearance.json")
    for wrong in ("{}", '{"appearance": "ppisp", "photos": {"a": [1, 2]}, "vignetting": {}}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match=path.name):
            saved(parse_train(["-s", str(tmp_path)]).model, ply, folder, CPU)


def test_modules_of_the_flags(tmp_path, capsys):
    data = tiny_scenes.colmap_scene(tmp_path / "data")

    def modules(*flags: str) -> list[PerView]:
        options: Options = parse_train(["-s", str(data), "-m", str(tmp_path / "m"), *flags])
        return attached(options, Scene(options.model, CPU, quiet=True))

    assert modules() == []
    assert [type(m) for m in modules("--appearance", "ppisp", "--poses")][0] is Ppisp
    (exposure,) = modules("--appearance", "exposure")
    (published,) = modules("--train_test_exp")
    assert isinstance(exposure, Affine) and isinstance(published, Exposure) and not published.median
    assert isinstance(modules("--train_test_exp", "--appearance", "exposure")[0], Exposure)
    with pytest.raises(SystemExit):
        modules("--appearance", "ppisp", "--train_test_exp")
    assert "train_test_exp must go with --appearance exposure or none, got ppisp" in capsys.readouterr().err


def test_colors_that_fit_best():
    transform = torch.tensor([[0.9, 0.1, 0, 0.05], [0, 0.8, 0.1, 0], [0, 0.2, 0.7, -0.02]])
    truth = apply_exposure(image(), as_exposure(transform))
    assert psnr(image(), truth) < 25
    assert psnr(with_colors_of(truth, image()), truth) > 80
    mask = torch.zeros(12, 16)
    mask[:, :8] = 1
    spoiled = torch.where(mask.bool(), truth, torch.rand(3, 12, 16))
    torch.testing.assert_close(with_colors_of(spoiled, image(), mask), truth, atol=1e-4, rtol=0)
    bright = (1.6 * truth).clamp(0, 1)
    assert bright.eq(1).float().mean() > 0.1, "photos that are partly white"
    assert psnr(with_colors_of(bright, image()).clamp(0, 1), bright) > 80
    flat = torch.full((3, 4, 4), 0.5)
    torch.testing.assert_close(with_colors_of(0.4 * flat, flat), 0.4 * flat, atol=1e-3, rtol=0)
    white = torch.ones(3, 4, 4)
    torch.testing.assert_close(with_colors_of(white, flat).clamp(0, 1), white, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def fitted_psnr(tmp_path_factory):
    """Of test views whose colors are fitted: of a run with photos of changing exposure or not, and flags."""
    place = tmp_path_factory.mktemp("exposures")

    @cache
    def run(exposures: float, *flags: str) -> float:
        data = place / f"data_{exposures}"
        if not data.exists():
            blurred_scenes.make(data, count=16, exposures=exposures)
        _, folder = trained(data, place / "_".join([str(exposures), *flags]), *flags)
        common = ["-m", str(folder), "--device", "cpu"]
        assert render.main([*common, "--fit_test_colors", "--skip_train", "--quiet"]) == 0
        assert metrics.main([*common, "--lpips", "none"]) == 0
        return json.loads((folder.path / "results.json").read_text())["ours_1200_colors"]["PSNR"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("exposure", "ppisp", "bilateral"))
def test_photos_of_changing_exposure(kind, fitted_psnr, monkeypatch):
    """Fitted test views of photos that were brighter and darker come near those of photos that were not."""
    monkeypatch.setattr(bilateral, "SHAPE", (12, 4, 4, 4))
    even, plain, fitted = fitted_psnr(0.0), fitted_psnr(0.3), fitted_psnr(0.3, "--appearance", kind)
    assert fitted > plain + 2, (even, plain, fitted)
    assert fitted > even - 1.2, (even, plain, fitted)

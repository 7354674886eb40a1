"""metrics.py: its numbers, its files, and what it says when something is missing."""

import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import render
import train
from arguments import FieldParams, ModelParams, OptimizationParams, PipelineParams, RunParams
from benchmarks import train as benchmark
from scene.folder import ModelFolder
from tests import tiny_scenes
from tools import contact_sheet
from utils import lpips
from utils.files import DataError


def pair(seed: int, height=40, width=56) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    truth = np.stack([120 + 80 * np.sin(x / 5 + c) * np.cos(y / 7) for c in range(3)], -1)
    return np.uint8(np.clip(truth + rng.normal(0, 8, truth.shape), 0, 255)), np.uint8(truth)


@pytest.fixture
def model(tmp_path) -> Path:
    for method, seeds in {"ours_7000": (0, 1), "ours_30000": (2, 3, 4)}.items():
        for part in ("renders", "gt"):
            (tmp_path / "test" / method / part).mkdir(parents=True)
        for index, seed in enumerate(seeds):
            render, truth = pair(seed)
            Image.fromarray(render).save(tmp_path / "test" / method / "renders" / f"{index:05d}.png")
            Image.fromarray(truth).save(tmp_path / "test" / method / "gt" / f"{index:05d}.png")
        names = {f"{index:05d}.png": f"cam {seed}.jpg" for index, seed in enumerate(seeds)}
        (tmp_path / "test" / method / "names.json").write_text(json.dumps(names))
    return tmp_path


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def score(capsys, monkeypatch, tmp_path):
    """metrics.py, in this process, with an empty torch cache."""

    def run(*arguments) -> Result:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        code = metrics.main(["--device", "cpu", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return run


def test_numbers_files_and_missing_weights(model, score):
    result = score("-m", model)
    assert result.returncode == 0, result.stderr
    results = json.loads((model / "results.json").read_text())
    per_view = json.loads((model / "per_view.json").read_text())
    assert list(results) == list(per_view) == ["ours_30000", "ours_7000"]
    bands = {"PSNR far": slice(0, 13), "PSNR middle": slice(13, 27), "PSNR near": slice(27, 40)}
    assert set(results["ours_7000"]) == {"SSIM", "PSNR", "LPIPS", *bands}
    for band, rows in bands.items():
        error = np.square(np.subtract(*(image[rows] / 255.0 for image in pair(2)))).mean()
        assert per_view["ours_30000"][band]["00000.png"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert list(per_view["ours_30000"]["PSNR"]) == ["00000.png", "00001.png", "00002.png"]

    errors = [np.square(np.subtract(*(image / 255.0 for image in pair(seed)))).mean() for seed in (2, 3, 4)]
    psnrs = [-10 * math.log10(error) for error in errors]
    assert 28 < min(psnrs) < 33
    assert list(per_view["ours_30000"]["PSNR"].values()) == pytest.approx(psnrs, abs=1e-3)
    assert results["ours_30000"]["PSNR"] == pytest.approx(sum(psnrs) / 3, abs=1e-3)
    assert 0.5 < results["ours_30000"]["SSIM"] < 0.99

    # No weights on this machine: said, with the way to get them, and null in both files.
    assert results["ours_7000"]["LPIPS"] is None and set(per_view["ours_7000"]["LPIPS"].values()) == {None}
    assert "vgg16-397923af.pth" in result.stdout and "--lpips_weights" in result.stdout
    worst = f"cam {2 + int(np.argmin(psnrs))}.jpg"
    assert worst in result.stdout and "ours_30000" in result.stdout


def test_ssim_is_the_definition(model, score):
    from tests.test_losses import ssim_by_definition

    score("-m", model, "--lpips", "none")
    per_view = json.loads((model / "per_view.json").read_text())
    images = [torch.from_numpy(image / 255.0).permute(2, 0, 1) for image in pair(0)]
    truth = ssim_by_definition(*images).item()
    assert per_view["ours_7000"]["SSIM"]["00000.png"] == pytest.approx(truth, abs=2e-5)


TRUNKS = {  # layer -> shape of its weights
    "alex": {
        0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    },
    "vgg": {
        0: (64, 3, 3, 3), 2: (64, 64, 3, 3), 5: (128, 64, 3, 3), 7: (128, 128, 3, 3), 10: (256, 128, 3, 3),
        12: (256, 256, 3, 3), 14: (256, 256, 3, 3), 17: (512, 256, 3, 3), 19: (512, 512, 3, 3),
        21: (512, 512, 3, 3), 24: (512, 512, 3, 3), 26: (512, 512, 3, 3), 28: (512, 512, 3, 3),
    },
}  # fmt: skip


def _random_trunk(network: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, shape in TRUNKS[network].items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"features.{layer}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


def _random_linear(widths) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(widths)
    }


WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_equals_the_authors_package(network):
    authors = pytest.importorskip("lpips")
    trunk, linear = _random_trunk(network), _random_linear(WIDTHS[network])
    ours = lpips.LPIPS(network, trunk, linear)

    theirs = authors.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False).eval()
    sliced = {key.split(".", 2)[2]: key for key in theirs.state_dict() if key.startswith("net.")}
    state = {sliced[key.removeprefix("features.")]: value for key, value in trunk.items()}
    theirs.load_state_dict(state | linear, strict=False)

    image, truth = (torch.from_numpy(image / 255.0).float().permute(2, 0, 1) for image in pair(0, 64, 70))
    with torch.no_grad():
        expected = theirs(
            image[None], truth[None]
        ).item()  # [0, 1] without rescale: the original's convention
    assert expected > 1e-3
    assert ours(image, truth).item() == pytest.approx(expected, rel=1e-4)


def test_lpips_weights_from_a_folder(model, score):
    pytest.importorskip("lpips")  # for the linear layers
    folder = model / "weights"
    folder.mkdir()
    torch.save(_random_trunk("alex"), folder / lpips.NETWORKS["alex"].trunk_file)
    torch.save(_random_linear(WIDTHS["alex"]), folder / lpips.NETWORKS["alex"].linear_file)
    shutil.rmtree(model / "test" / "ours_30000")
    for part, image in zip(("renders", "gt"), big := pair(0, 80, 80)):
        for file in sorted((model / "test" / "ours_7000" / part).iterdir()):
            Image.fromarray(image).save(file)

    result = score("-m", model, "--lpips", "alex", "--lpips_weights", folder)
    assert result.returncode == 0, result.stderr
    expected = lpips.load("alex", str(folder))(
        *(torch.from_numpy(i / 255.0).float().permute(2, 0, 1) for i in big)
    )
    value = json.loads((model / "results.json").read_text())["ours_7000"]["LPIPS"]
    assert value > 0 and value == pytest.approx(expected.item(), rel=1e-4)
    assert "[0, 1]" in result.stdout


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda test: (test / "ours_7000" / "gt" / "00001.png").unlink(), "00001.png is only in one of them"),
        (lambda test: (test / "ours_7000" / "renders" / "00000.png").write_bytes(b"no picture"), "00000.png"),
        (lambda test: test.rename(test.with_name("elsewhere")), "run render.py -m"),
        (
            lambda test: Image.new("RGB", (10, 10)).save(test / "ours_7000" / "renders" / "00000.png"),
            "must be 56x40 like its ground truth, got 10x10",
        ),
    ],
)
def test_errors_are_errors(model, score, break_it, message):
    break_it(model / "test")
    result = score("-m", model, "--lpips", "none")
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (model / "results.json").exists()


def test_one_bad_model_of_two(model, score, tmp_path):
    (tmp_path / "bad").mkdir()
    result = score("-m", tmp_path / "bad", model, "--lpips", "none")
    assert result.returncode == 1 and "bad/test must be a folder" in result.stderr
    assert (model / "results.json").exists()


@pytest.mark.parametrize("part", ["renders", "gt", "masks"])
def test_a_torn_picture_ends_the_scores_of_its_model_only(model, score, tmp_path, part):
    torn = tmp_path / "torn"
    shutil.copytree(model / "test", torn / "test")
    file = torn / "test" / "ours_7000" / part / "00001.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((model / "test" / "ours_7000" / "gt" / "00001.png").read_bytes()[:-500])
    result = score("-m", torn, model, "--lpips", "none")
    assert result.returncode == 1 and f"{file}: cannot be read as a PNG picture" in result.stderr
    assert len(result.stderr.splitlines()) == 1 or "Scoring" in result.stderr
    assert (model / "results.json").exists() and not (torn / "results.json").exists()


def test_a_mask_of_another_size(model, score):
    mask = model / "test" / "ours_7000" / "masks" / "00000.png"
    mask.parent.mkdir()
    Image.new("L", (9, 9), 255).save(mask)
    result = score("-m", model, "--lpips", "none")
    assert result.returncode == 1 and f"{mask} must be 56x40 like its ground truth" in result.stderr


def test_equal_pictures_leave_files_that_any_reader_of_json_takes(model, score):
    """Their PSNR is infinite."""
    method = model / "test" / "ours_7000"
    for file in (method / "gt").iterdir():
        shutil.copy(file, method / "renders" / file.name)
    result = score("-m", model, "--lpips", "none")
    assert result.returncode == 0 and "inf" in result.stdout, result.stderr

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    for name in ("results.json", "per_view.json"):
        scores = json.loads((model / name).read_text(), parse_constant=no_constant)
        assert scores["ours_7000"]["SSIM"] and scores["ours_30000"]["PSNR"]
    assert json.loads((model / "results.json").read_text())["ours_7000"]["PSNR"] is None


@pytest.mark.parametrize(
    "names", [b"{", b"\xff\xfe", b"[1]", b'{"00000.png": 7, "00001.png": null}', b"[" * 9999]
)
def test_damaged_names(model, score, names):
    (model / "test" / "ours_7000" / "names.json").write_bytes(names)
    result = score("-m", model, "--lpips", "none")
    assert result.returncode == 0, result.stderr
    assert "0000" in result.stdout.splitlines()[-1], "named by its file"
    assert contact_sheet.draw(model / "test" / "ours_7000", 2).width > 100


def test_a_torn_picture_in_a_contact_sheet(model):
    file = model / "test" / "ours_7000" / "gt" / "00001.png"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(DataError, match="gt/00001.png: cannot be read as a PNG picture"):
        contact_sheet.draw(file.parent.parent, 2)


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.zeros(3), "must hold weights by name, got a Tensor"),
        ([1, 2], "must hold weights by name, got a list"),
        ({"features.0.weight": 1.0}, "features.0.weight must be numbers .64, 3, 11, 11., got float"),
        (
            {"features.0.weight": torch.zeros(64, 3, 3, 3)},
            "must be numbers .64, 3, 11, 11., got .64, 3, 3, 3.",
        ),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11).to_sparse()}, "must be numbers"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11), "x": 1}, "must hold the key features.0.bias"),
    ],
)
def test_odd_weights(tmp_path, weights, message):
    torch.save(weights, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save(_random_linear(WIDTHS["alex"]), tmp_path / "alex.pth")
    with pytest.raises(DataError, match=f"alexnet-owt-7be5be79.pth:? {message}|{message}"):
        lpips.load("alex", str(tmp_path))


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """benchmarks/train.py in this process; returns the cells of its table, and what it printed."""
    mains = {"train.py": train.main, "render.py": render.main, "metrics.py": metrics.main}

    def in_process(script: str, *arguments: str) -> None:
        assert mains[script]([*arguments, "--device", "cpu"]) == 0

    def run(*scenes) -> tuple[list[list[str]], str]:
        output = ["-o", str(tmp_path / "out"), "--iterations", "3"]
        monkeypatch.setattr("sys.argv", ["train.py", "-s", *map(str, scenes), *output])
        monkeypatch.setattr(benchmark, "run", in_process)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        benchmark.main()
        printed = capsys.readouterr().out
        return [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")], printed

    return run


def test_the_training_benchmark_keeps_its_models_apart(tmp_path, bench):
    """One data set with different flags, another one of the same name, and the first again."""
    first, second = (tiny_scenes.colmap_scene(tmp_path / name / "fox") for name in ("a", "b"))
    flags = "--sh_degree:1", f"--masks:{tmp_path / 'masks'}:--masks:"
    rows, printed = bench(first, *(f"{first}:{flag}" for flag in flags), second, first)
    options = {
        folder.name: json.loads((folder / "config.json").read_text())["ModelParams"]
        for folder in (tmp_path / "out").iterdir()
    }
    assert len(options) == 4 and len(rows) == 2 + 4, "the same scene twice is one row"
    assert options["fox_0"]["sh_degree"] == 3 and options["fox_sh_degree_1_0"]["sh_degree"] == 1
    assert options["fox_0"]["source_path"] == str(first) and options["fox_2_0"]["source_path"] == str(second)
    assert rows[2][rows[0].index("LPIPS")] == "-" and "LPIPS is left out: python metrics.py -m" in printed


def test_the_training_benchmark_computes_lpips(tmp_path, bench):
    pytest.importorskip("lpips")  # for the linear layers
    weights = tmp_path / "cache" / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    torch.save(_random_trunk("vgg"), weights / lpips.NETWORKS["vgg"].trunk_file)
    rows, printed = bench(tiny_scenes.colmap_scene(tmp_path / "fox"))
    value = json.loads((tmp_path / "out/fox_0/results.json").read_text())["ours_3"]["LPIPS"]
    assert value > 0 and rows[2][rows[0].index("LPIPS")] == f"{value:.4f}" and "left out" not in printed


def test_broken_weights_are_an_error(model, score):
    (model / "vgg.pth").write_bytes(b"not weights")
    result = score("-m", model, "--lpips_weights", model / "vgg.pth")
    assert result.returncode == 1 and "vgg.pth must be a file of torch weights" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = score("-m", model, "--lpips_weights", model / "nowhere")
    assert result.returncode == 1 and "nowhere: is not there" in result.stderr


# Several models


def trained_model(folder: Path, seeds=(0, 1), iterations=30, gaussians=7, **options) -> Path:
    """A folder as training and render.py leave it."""
    for index, seed in enumerate(seeds):
        for part, image in zip(("renders", "gt"), pair(seed)):
            path = folder / "test" / f"ours_{iterations}" / part / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    splats = folder / "point_cloud" / f"iteration_{iterations}" / "point_cloud.ply"
    splats.parent.mkdir(parents=True)
    splats.write_text(f"ply\nformat ascii 1.0\nelement vertex {gaussians}\nend_header\n")
    groups = [ModelParams(source_path="/data/fox"), PipelineParams(), OptimizationParams(), RunParams()]
    groups.append(FieldParams())
    for group in groups:
        changed = {name: value for name, value in options.items() if hasattr(group, name)}
        vars(group).update(changed, **({"iterations": iterations} if hasattr(group, "iterations") else {}))
    ModelFolder(folder).write_options(groups)
    told = {"iterations": iterations, "optimization_seconds": 12.5, "device": "CPU"}
    (folder / "summary.json").write_text(json.dumps(told))
    return folder


def table_of(result) -> dict[str, list[str]]:
    """Column -> cells of the Markdown table at the end of what was printed."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    head, rule, *rows = ([cell.strip() for cell in line.split(" | ")] for line in lines)
    assert all(set(cell) <= set("|- ") for cell in rule)
    head, *rows = ([cell.strip("| ") for cell in row] for row in (head, *rows))
    return {name: [row[k] for row in rows] for k, name in enumerate(head)}


BANDS = ["PSNR far", "PSNR middle", "PSNR near"]
SCORES = ["PSNR", "SSIM", "LPIPS", *BANDS, "views", "Gaussians", "MB", "training s", "ms a view"]


def test_several_models_end_in_one_table(tmp_path, score):
    one = trained_model(tmp_path / "one", gaussians=1234567)
    two = trained_model(tmp_path / "two", seeds=(2, 3, 4), gaussians=9, antialiasing=True, lambda_dssim=0.5,
                        port=7000, test_iterations=[5])  # fmt: skip
    (one / "test/ours_30/seconds.json").write_text('{"a view": 0.01234}')
    files = [tmp_path / "out" / "table.md", tmp_path / "table.csv"]
    result = score("-m", one, two, "--lpips", "none", "--table", *files)
    assert result.returncode == 0, result.stderr
    table = table_of(result)
    assert list(table) == ["model", "antialiasing", "lambda_dssim", *SCORES], "columns only for what differs"
    assert table["model"] == [str(one), str(two)]
    assert (table["antialiasing"], table["lambda_dssim"]) == (["off", "on"], ["0.2", "0.5"])
    assert (table["views"], table["Gaussians"]) == (["2", "3"], ["1,234,567", "9"])
    assert (table["LPIPS"], table["training s"]) == (["-", "-"], ["12.5", "12.5"])
    assert table["ms a view"] == ["12.3", "-"]
    means = [json.loads((model / "results.json").read_text())["ours_30"] for model in (one, two)]
    assert table["PSNR"] == [f"{mean['PSNR']:.3f}" for mean in means]
    assert table["SSIM"] == [f"{mean['SSIM']:.4f}" for mean in means]

    assert files[0].read_text() in result.stdout + "\n"
    rows = list(csv.DictReader(files[1].open(newline="")))
    assert [float(row["PSNR"]) for row in rows] == [mean["PSNR"] for mean in means], "every digit"
    assert rows[0]["Gaussians"] == "1234567" and rows[1]["LPIPS"] == "" and rows[0]["model"] == str(one)


def test_settings_of_voxel_grids_in_the_table(tmp_path, score):
    one = trained_model(tmp_path / "one", method="dvgo", pg_scale=[5, 9], stepsize=0.25)
    two = trained_model(tmp_path / "two", method="dvgo")
    table = table_of(score("-m", one, two, "--lpips", "none"))
    assert list(table) == ["model", "pg_scale", "stepsize", *SCORES]
    assert (table["pg_scale"], table["stepsize"]) == (["5 9", "1000 2000 3000"], ["0.25", "0.5"])


def test_data_sets_and_methods_in_the_table(tmp_path, score):
    one = trained_model(tmp_path / "one", source_path="/data/a|b")
    trained_model(tmp_path / "more", iterations=10)
    shutil.move(tmp_path / "more/test/ours_10", one / "test")
    shutil.move(tmp_path / "more/point_cloud/iteration_10", one / "point_cloud")
    two = trained_model(tmp_path / "two", source_path="/data/c")
    table = table_of(score("-m", one, two, "--lpips", "none"))
    assert list(table) == ["model", "method", "source_path", *SCORES]
    assert table["method"] == ["ours_10", "ours_30", "ours_30"]
    assert table["source_path"] == ["a\\|b", "a\\|b", "c"]
    assert table["training s"] == ["-", "12.5", "12.5"], "the time of iteration 10 is not known"
    # Two data sets of one name are called by their paths.
    other = trained_model(tmp_path / "other", source_path="/elsewhere/c")
    table = table_of(score("-m", two, other, "--lpips", "none"))
    assert table["source_path"] == ["/data/c", "/elsewhere/c"]


def test_the_table_of_models_that_tell_little(tmp_path, score, model):
    """The original's folders have no config.json and no summary.json, and some have nothing but pictures."""
    ours = trained_model(tmp_path / "ours", resolution=2, lambda_dssim=0.0)
    original = trained_model(tmp_path / "original")
    for name in ("config.json", "summary.json"):
        (original / name).unlink()
    (original / "cfg_args").write_text("Namespace(source_path='/data/fox', sh_degree=2, resolution=1)")
    result = score("-m", ours, original, "--lpips", "none")
    table = table_of(result)
    assert list(table) == [
        "model",
        "sh_degree",
        "resolution",
        "iterations",
        "lambda_dssim",
        "device",
        *SCORES,
    ]
    assert table["iterations"] == ["30", "-"]
    assert (table["lambda_dssim"], table["training s"]) == (["0.0", "-"], ["12.5", "-"])
    assert (table["sh_degree"], table["Gaussians"]) == (["3", "2"], ["7", "7"])

    result = score("-m", ours, model, "--lpips", "none")
    assert result.returncode == 0, result.stderr
    assert "holds neither config.json nor cfg_args; the table is without its settings" in result.stdout
    assert table_of(result)["Gaussians"] == ["7", "-", "-"]


def test_names_in_a_table_and_beside_it_are_escaped(tmp_path, score):
    odd = trained_model(tmp_path / "odd\x1b[31m")
    for name in ("config.json", "cfg_args"):
        (odd / name).unlink()
    (odd / "test/ours_30/names.json").write_text("{")
    result = score("-m", odd, "--lpips", "none", "--table", tmp_path / "\x1b[2J.md")
    assert result.returncode == 0 and "\x1b" not in result.stdout
    assert r"odd\x1b[31m" in result.stdout
    for said in ("views are called by their files", "the table is without its settings", r"\x1b[2J.md"):
        assert said in result.stdout


def test_a_model_that_fails_is_not_in_the_table(tmp_path, score):
    good = [trained_model(tmp_path / name, sh_degree=degree) for name, degree in (("a", 1), ("b", 2))]
    bad = trained_model(tmp_path / "bad")
    (bad / "test/ours_30/gt/00000.png").unlink()
    result = score("-m", good[0], bad, good[1], "--lpips", "none")
    assert result.returncode == 1 and "only in one of them" in result.stderr
    assert table_of(result)["model"] == [str(path) for path in good]


def test_the_table_of_one_model(tmp_path, score, capsys):
    one = trained_model(tmp_path / "one")
    assert "|" not in score("-m", one, "--lpips", "none").stdout
    score("-m", one, "--lpips", "none", "--table", tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text().startswith("| model ")
    with pytest.raises(SystemExit):
        score("-m", one, "--table", tmp_path / "x.txt")
    assert "table must be a file that ends in .csv or .md, got" in capsys.readouterr().err

"""The real scripts on tiny data sets: train, render, score, continue; what they leave behind, and what
options do."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

import metrics
import render
import train
from gaussian_renderer import render as render_view
from per_view import Exposure
from scene.folder import ModelFolder
from tests import tiny_scenes
from training.report import Report

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
QUIET = ["--device", "cpu", "--quiet", "--disable_viewer"]
EAGER = [  # learning rates for runs of a few hundred iterations
    "--position_lr_max_steps", "300", "--position_lr_init", "1.6e-3", "--position_lr_final", "1.6e-5",
    "--feature_lr", "0.01", "--scaling_lr", "0.02", "--opacity_lr", "0.1", "--rotation_lr", "0.005",
]  # fmt: skip
SHORT = [
    "--iterations", "300", "--densify_from_iter", "50", "--densify_until_iter", "200",
    "--densification_interval", "50", *EAGER,
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Pictures this small are not worth a second thread, least of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(name: str, *arguments) -> str:
    """Run a script as a user does; returns what it printed."""
    command = [sys.executable, ROOT / name, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def in_process(*arguments) -> dict:
    """train.py in this process; returns its summary."""
    arguments = [str(word) for word in arguments]
    assert train.main([*arguments, *QUIET]) == 0
    return summary(Path(arguments[arguments.index("-m") + 1]))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def vertices(folder: Path, iteration: int) -> np.ndarray:
    return PlyData.read(folder / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply")["vertex"].data


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def colmap(tmp_path_factory) -> Path:
    return tiny_scenes.colmap_scene(tmp_path_factory.mktemp("colmap") / "scène")  # not ASCII


@pytest.fixture(scope="session")
def blender(tmp_path_factory) -> Path:
    return tiny_scenes.blender_scene(tmp_path_factory.mktemp("blender") / "scene")


@pytest.fixture(scope="session")
def trained(colmap, tmp_path_factory) -> tuple[Path, str]:
    """Model folder of a run on the COLMAP scene, and what the run printed."""
    folder = tmp_path_factory.mktemp("models") / "colmap"
    printed = script(
        "train.py", "-s", colmap, "-m", folder, "--eval", "--llffhold", 4, "--device", "cpu", "--port", 0,
        *SHORT, "--test_iterations", 1, 150, 300, "--save_iterations", 150, "--checkpoint_iterations", 150,
    )  # fmt: skip
    return folder, printed


# Train


def test_training_raises_psnr(trained):
    scores = summary(trained[0])["scores"]
    for views in ("train", "test"):
        first, last = scores[views]["1"], scores[views]["300"]
        assert last["psnr"] > first["psnr"] + 5 and last["psnr"] > 23, (views, first, last)
        assert last["l1"] < first["l1"] and last["psnr_by_channel"] >= last["psnr"]
    assert scores["test"]["300"]["views"] == 2 and scores["train"]["300"]["views"] == 5


def test_model_folder(trained):
    files = {
        name
        for name in files_below(trained[0])
        if not name.startswith(("train/", "test/", "results", "per_"))
    }
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {
        "cfg_args", "config.json", "cameras.json", "split.json", "input.ply", "exposure.json", "summary.json",
        "train.log", "chkpnt150.pth", "point_cloud/iteration_150/point_cloud.ply",
        "point_cloud/iteration_300/point_cloud.ply",
    }  # fmt: skip
    assert len(json.loads((trained[0] / "cameras.json").read_text())) == 8


def test_what_the_run_says(trained):
    folder, printed = trained
    told = summary(folder)
    assert told["gaussians"] == len(vertices(folder, 300)) > tiny_scenes.BLOBS
    assert 0 < told["optimization_seconds"] < told["total_seconds"] and told["peak_memory_bytes"] > 1e8
    log = (folder / "train.log").read_text()
    for text in (printed, log):
        assert re.search(r"\[ +300\] +test: PSNR \d\d\.\d\d\d dB", text), text
        assert "6 train and 2 test views" in text
        assert f"render.py -m {folder}" in text


def test_tensorboard_has_the_originals_tags(trained, colmap):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "train_loss_patches/l1_loss", "train_loss_patches/total_loss", "iter_time", "total_points", "memory",
        "test/loss_viewpoint - l1_loss", "test/loss_viewpoint - psnr",
        "train/loss_viewpoint - l1_loss", "train/loss_viewpoint - psnr",
    }  # fmt: skip
    assert tags["histograms"] == ["scene/opacity_histogram"]
    assert {"test_view_shot 00.png/render", "test_view_shot 00.png/ground_truth"} <= set(tags["images"])
    losses = events.Scalars("train_loss_patches/total_loss")
    assert [event.step for event in losses] == list(range(10, 301, 10))
    assert losses[-1].value < 0.6 * losses[0].value
    for tag, least in (("total_points", 1), ("memory", 100)):
        counts = events.Scalars(tag)
        assert [event.step for event in counts] == [1, 100, 150, 200, 300]
        assert all(event.value > least for event in counts)
    assert len(events.Images("test_view_shot 00.png/render")) == 3
    (photo,) = events.Images("test_view_shot 00.png/ground_truth")
    shown = Image.open(BytesIO(photo.encoded_image_string))
    assert (photo.width, photo.height) == shown.size
    error = np.asarray(shown, float) - np.asarray(Image.open(colmap / "images" / "shot 00.png"))
    assert 0 < np.square(error).mean() < 2.5**2  # a JPEG file


def test_continued_run_equals_the_uninterrupted_one(trained, colmap, tmp_path):
    folder = trained[0]
    told = in_process("-s", colmap, "-m", tmp_path, "--eval", "--llffhold", 4, *SHORT,
                      "--start_checkpoint", folder / "chkpnt150.pth")  # fmt: skip
    assert told["gaussians"] == summary(folder)["gaussians"]
    ours, theirs = vertices(tmp_path, 300), vertices(folder, 300)
    assert all((ours[name] == theirs[name]).all() for name in ours.dtype.names)
    assert told["scores"]["test"]["300"] == summary(folder)["scores"]["test"]["300"]


def test_saved_model_is_the_trained_one(colmap, tmp_path):
    """Adam's first step has the size of the learning rate: the model of iteration 1 has taken it."""
    from scene.formats.ply import load_ply

    in_process("-s", colmap, "-m", tmp_path, "--iterations", 1)
    gaussians = load_ply(tmp_path / "point_cloud" / "iteration_1" / "point_cloud.ply", torch.device("cpu"))
    start = (tiny_scenes.blobs()["colors"] * 255).int() / 255
    moved = (gaussians.sh_dc[:, 0].detach() - (start - 0.5) / 0.28209479177387814).abs()
    torch.testing.assert_close(moved.amax(), torch.tensor(0.0025), rtol=1e-3, atol=0)
    opacity = gaussians.opacity_logits.detach().flatten() - torch.logit(torch.tensor(0.1))
    torch.testing.assert_close(opacity.abs().amax(), torch.tensor(0.025), rtol=1e-3, atol=0)


def test_same_seed_same_model(colmap, tmp_path):
    common = ["-s", colmap, "--iterations", 60, "--densify_from_iter", 10, "--densification_interval", 20,
              "--random_background"]  # fmt: skip
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        in_process(*common, "-m", tmp_path / name, "--seed", seed)
    a, b, c = (vertices(tmp_path / name, 60) for name in "abc")
    assert a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()


def test_errors_are_told_and_not_traced(tmp_path, capsys):
    assert train.main(["-s", str(tmp_path / "nowhere"), "-m", str(tmp_path / "m"), *QUIET]) == 1
    told = capsys.readouterr().err
    assert told.startswith("train.py: ") and "nowhere" in told and "Traceback" not in told
    assert not (tmp_path / "m").exists(), "a model that is there already keeps its options"


def test_checkpoint_at_the_end_of_the_run(trained, colmap, tmp_path, capsys):
    split = ["--eval", "--llffhold", "4"]  # as the checkpoint's run, whose view queue it continues
    start = ["-s", str(colmap), "-m", str(tmp_path), "--start_checkpoint", str(trained[0] / "chkpnt150.pth")]
    assert train.main([*start, *split, "--iterations", "150", *QUIET]) == 1
    assert "iterations must be more than the 150 of the checkpoint, got 150" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [[], ["--random_background"], ["--antialiasing"]], ids=lambda extra: str(extra)
)
def test_one_native_call_per_iteration_gives_the_same(extra, colmap, tmp_path):
    """--fused is another way to the same parameters; Adam turns rounding into steps where gradients are
    tiny."""
    common = ["-s", colmap, "--iterations", 60, "--densify_from_iter", 1000, *EAGER, *extra]
    ours = in_process(*common, "-m", tmp_path / "fused", "--fused")["scores"]["train"]["60"]
    theirs = in_process(*common, "-m", tmp_path / "parts", "--no-fused")["scores"]["train"]["60"]
    assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=0.02)
    a, b = vertices(tmp_path / "fused", 60), vertices(tmp_path / "parts", 60)
    for name in ("x", "f_dc_0", "opacity", "scale_0"):
        moved = np.abs(b[name] - vertices_at_start(colmap, tmp_path, name)).mean()
        assert moved > 0 and np.abs(a[name] - b[name]).mean() < 0.02 * moved, name


def vertices_at_start(dataset: Path, folder: Path, name: str) -> np.ndarray:
    """One property of the model before training: after one step of no length."""
    if not (folder / "start").exists():
        rates = [f"--{kind}_lr" for kind in ("feature", "opacity", "scaling", "rotation")]
        still = [
            word for rate in [*rates, "--position_lr_init", "--position_lr_final"] for word in (rate, "0")
        ]
        in_process("-s", dataset, "-m", folder / "start", "--iterations", 1, *still)
    return vertices(folder / "start", 1)[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["--fused", "--no-fused"])
def test_ordinary_iterations_do_not_wait_for_the_gpu(way, colmap, tmp_path, monkeypatch):
    """Iterations 2 to 99; a hundredth one may densify, and the last one is judged."""
    step = Report.step

    def watched(report, iteration, *arguments):
        step(report, iteration, *arguments)
        torch.cuda.set_sync_debug_mode("error" if 1 <= iteration < 99 else "default")

    monkeypatch.setattr(Report, "step", watched)
    options = ["--iterations", "101", "--device", "cuda", "--quiet", "--disable_viewer", way]
    try:
        assert train.main(["-s", str(colmap), "-m", str(tmp_path), *options]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Render and score


@pytest.fixture(scope="session")
def rendered(trained) -> Path:
    script("render.py", "-m", trained[0], "--device", "cpu", "--quiet")
    script("render.py", "-m", trained[0], "--device", "cpu", "--quiet", "--iteration", 150, "--skip_train")
    return trained[0]


def test_render_files_and_names(rendered):
    pictures = {f"{part}/{index:05d}.png" for part in ("renders", "gt") for index in range(6)}
    assert files_below(rendered / "train" / "ours_300") == pictures | {"names.json", "seconds.json"}
    names = json.loads((rendered / "test" / "ours_300" / "names.json").read_text())
    assert names == {"00000.png": "shot 00.png", "00001.png": "shot 04.png"}
    assert not (rendered / "train" / "ours_150").exists()
    assert len(files_below(rendered / "test" / "ours_150")) == 6
    seconds = json.loads((rendered / "train" / "ours_300" / "seconds.json").read_text())["a view"]
    assert 1e-5 < seconds < 60


def test_render_pictures(rendered, colmap):
    for index, name in enumerate(["shot 00.png", "shot 04.png"]):
        photo = np.array(Image.open(colmap / "images" / name))
        truth = np.array(Image.open(rendered / "test" / "ours_300" / "gt" / f"{index:05d}.png"))
        picture = np.array(Image.open(rendered / "test" / "ours_300" / "renders" / f"{index:05d}.png"))
        assert (truth == photo).all()
        assert picture.std() > 10 and np.square((picture - 1.0 * photo) / 255).mean() < 10**-2.2


def test_rendering_fewer_views_leaves_no_old_pictures(rendered, capsys):
    extra = rendered / "test" / "ours_300" / "gt" / "00099.png"
    Image.new("RGB", (4, 4)).save(extra)
    assert render.main(["-m", str(rendered), "--device", "cpu", "--quiet", "--skip_train"]) == 0
    assert not extra.exists()
    assert not capsys.readouterr().out, "--quiet"


def test_metrics_of_the_renders(rendered):
    printed = script("metrics.py", "-m", rendered, "--device", "cpu", "--lpips", "none")
    results = json.loads((rendered / "results.json").read_text())
    assert list(results) == ["ours_150", "ours_300"]
    for iteration in ("150", "300"):
        unquantized = summary(rendered)["scores"]["test"][iteration]["psnr"]
        assert results[f"ours_{iteration}"]["PSNR"] == pytest.approx(unquantized, abs=0.05)
    assert re.search(r"ours_300 +2 +\d\d\.\d+ +0\.\d+ +- +(\d\d\.\d\d +){3}shot 0[04]\.png", printed), printed


def test_render_without_a_model(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        render.main(["-m", str(tmp_path / "nothing")])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err


# Blender


def test_blender_scene_from_rgba_and_random_points(blender, tmp_path):
    told = in_process("-s", blender, "-m", tmp_path, "--eval", "-w", "--random_init", 1500, *SHORT,
                      "--test_iterations", 1)  # fmt: skip
    test = told["scores"]["test"]
    assert test["300"]["psnr"] > test["1"]["psnr"] + 4 and test["300"]["psnr"] > 19, test
    assert render.main(["-m", str(tmp_path), "--device", "cpu", "--quiet", "--skip_train"]) == 0
    corner = np.array(Image.open(tmp_path / "test" / "ours_300" / "gt" / "00000.png"))[0, 0]
    assert (corner == 255).all(), "the ground truth is composited over white"
    assert metrics.main(["-m", str(tmp_path), "--device", "cpu", "--lpips", "none"]) == 0
    score = json.loads((tmp_path / "results.json").read_text())["ours_300"]["PSNR"]
    assert score == pytest.approx(test["300"]["psnr"], abs=0.05)


# Options


def test_python_colors_and_covariances_change_nothing(trained, colmap):
    from arguments import ModelParams, PipelineParams
    from scene import Scene, load_gaussians

    device = torch.device("cpu")
    gaussians, _ = load_gaussians(trained[0], 300, device)
    with torch.no_grad():  # colors that depend on the direction in all bands, and shapes that are not round
        generator = torch.Generator().manual_seed(0)
        gaussians.sh_rest += 0.1 * torch.randn(gaussians.sh_rest.shape, generator=generator)
        gaussians.log_scales += 0.5 * torch.randn(gaussians.log_scales.shape, generator=generator)
        gaussians.raw_quats += 0.5 * torch.randn(gaussians.raw_quats.shape, generator=generator)
    camera = Scene(
        ModelParams(source_path=str(colmap)), device, for_training=False, quiet=True
    ).train_cameras[1]

    def picture_and_gradients(**options):
        for parameter in gaussians.params.values():
            parameter.grad = None
        out = render_view(camera, gaussians, PipelineParams(**options), torch.ones(3), scaling_modifier=0.9)
        (out.image * torch.linspace(0, 1, out.image.numel()).view_as(out.image)).sum().backward()
        return out.image.detach(), {name: p.grad.clone() for name, p in gaussians.params.items()}

    image, gradients = picture_and_gradients()
    assert image.std() > 0.05
    for options in ({"convert_SHs_python": True}, {"compute_cov3D_python": True}):
        other, others = picture_and_gradients(**options)
        torch.testing.assert_close(other, image, atol=2e-4, rtol=0)
        for name, expected in gradients.items():
            scale = expected.abs().max().item()
            assert scale > 0
            assert (others[name] - expected).abs().max() < 2e-3 * scale, name


def test_exposures_are_learned_and_test_views_scored_on_the_right_half(colmap, tmp_path):
    dataset = tmp_path / "data"
    tiny_scenes.colmap_scene(dataset)
    for name in ("shot 00.png", "shot 03.png"):  # one test view, one train view, taken at half the exposure
        path = dataset / "images" / name
        Image.fromarray(np.uint8(0.5 * np.array(Image.open(path)))).save(path)
    options = ["-s", dataset, "--eval", *SHORT, "--test_iterations", 1, "--save_iterations", 150]
    plain = in_process(*options, "-m", tmp_path / "plain")["scores"]["test"]["300"]
    ours = in_process(*options, "-m", tmp_path / "exposed", "--train_test_exp")["scores"]["test"]["300"]
    assert ours["psnr"] > plain["psnr"] + 1, (ours, plain)

    exposures = json.loads((tmp_path / "exposed" / "exposure.json").read_text())
    assert len(exposures) == 8  # test views are trained on, too
    dark, light = (np.trace(np.array(exposures[f"shot {i:02d}.png"])[:, :3]) for i in (3, 2))
    assert dark < 0.85 * light
    assert render.main(["-m", str(tmp_path / "exposed"), "--device", "cpu", "--quiet", "--skip_train"]) == 0
    picture = Image.open(tmp_path / "exposed" / "test" / "ours_300" / "renders" / "00000.png")
    assert picture.size == (tiny_scenes.WIDTH // 2, tiny_scenes.HEIGHT)
    assert metrics.main(["-m", str(tmp_path / "exposed"), "--device", "cpu", "--lpips", "none"]) == 0
    score = json.loads((tmp_path / "exposed" / "results.json").read_text())["ours_300"]["PSNR"]
    assert score == pytest.approx(ours["psnr"], abs=0.1)
    # An earlier model comes with the exposures that it had.
    folder = ModelFolder(tmp_path / "exposed")
    first, last = (Exposure.load(folder.ply(i), folder, torch.device("cpu")).values for i in (150, 300))
    assert (first - last).abs().max() > 0.01 and (first - torch.eye(3, 4)).abs().max() > 0.01


def test_depth_maps_are_used(tmp_path):
    dataset = tiny_scenes.colmap_scene(tmp_path / "data")
    tiny_scenes.add_depth_maps(dataset, scale=0.5, offset=0.1)
    params = {f"shot {i:02d}": {"scale": 0.5, "offset": 0.1} for i in range(8)}
    (dataset / "sparse" / "0" / "depth_params.json").write_text(json.dumps(params))

    def depth_error(folder: Path) -> float:
        from arguments import ModelParams, PipelineParams
        from scene import Scene, load_gaussians

        gaussians, _ = load_gaussians(folder, -1, torch.device("cpu"))
        params = ModelParams(source_path=str(dataset), model_path=str(tmp_path / "m"), depths="depths")
        scene = Scene(params, torch.device("cpu"), quiet=True)
        errors = []
        for camera in scene.train_cameras:
            known = camera.inv_depth()
            if known is not None:
                out = render_view(camera, gaussians, PipelineParams(), torch.zeros(3))
                errors.append((out.inv_depth[0] - known[0]).abs().mean().item())
        assert errors
        return sum(errors) / len(errors)

    common = ["-s", dataset, "--iterations", 150, *EAGER]
    in_process(*common, "-m", tmp_path / "without")
    heavy = ["--depth_l1_weight_init", 10, "--depth_l1_weight_final", 10]
    in_process(*common, "-m", tmp_path / "with", "-d", "depths", *heavy)
    assert depth_error(tmp_path / "with") < 0.8 * depth_error(tmp_path / "without")


def test_random_background_makes_surfaces_solid(colmap, tmp_path):
    """Where a Gaussian could let black through for free, it now has to hide a color that changes."""
    from arguments import ModelParams, PipelineParams
    from scene import Scene, load_gaussians

    def hidden(folder: Path) -> float:
        gaussians, _ = load_gaussians(folder, -1, torch.device("cpu"))
        scene = Scene(
            ModelParams(source_path=str(colmap)), torch.device("cpu"), for_training=False, quiet=True
        )
        rendered = [render_view(c, gaussians, PipelineParams(), torch.zeros(3)) for c in scene.train_cameras]
        return torch.stack([out.alpha.mean() for out in rendered]).mean().item()

    common = ["-s", colmap, "--iterations", 100, *EAGER]
    in_process(*common, "-m", tmp_path / "fixed")
    in_process(*common, "-m", tmp_path / "random", "--random_background")
    assert hidden(tmp_path / "random") > hidden(tmp_path / "fixed") + 0.1


@pytest.mark.parametrize(
    "options",
    [["--optimizer_type", "sparse_adam"], ["--antialiasing"], ["--convert_SHs_python"],
     ["--compute_cov3D_python"], ["--sh_degree", "0"], ["--no-fused"], ["--debug"],
     ["-r", "2"], ["--data_device", "cpu"],
     ["--detect_anomaly", "--debug_from", "5"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_option_trains(options, colmap, tmp_path):
    told = in_process(
        "-s", colmap, "-m", tmp_path, "--iterations", 60, "--test_iterations", 1, *EAGER, *options
    )
    train_scores = told["scores"]["train"]
    assert train_scores["60"]["psnr"] > train_scores["1"]["psnr"] + 2, train_scores
    torch.autograd.set_detect_anomaly(False)


# Live viewing


def test_viewer_is_served_while_training(colmap, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["-s", str(colmap), "-m", str(tmp_path), "--iterations", "5000", "--device", "cpu", "--quiet",
                 "--port", str(port), "--disable_viewer"]  # fmt: skip
    arguments.remove("--disable_viewer")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, env=ONE_THREAD
    )
    try:
        client = _connect(port, process)
        view = np.diag([1.0, -1.0, -1.0, 1.0]) @ tiny_scenes.shots(1)[0].world_to_camera
        request = {
            "resolution_x": 56, "resolution_y": 40, "train": True, "keep_alive": False,
            "scaling_modifier": 1.0, "shs_python": False, "rot_scale_python": False,
            "fov_x": 2 * np.arctan(56 / 120), "fov_y": 2 * np.arctan(40 / 120), "z_near": 0.01, "z_far": 100,
            "view_matrix": view.T.ravel().tolist(), "view_projection_matrix": view.T.ravel().tolist(),
        }  # fmt: skip
        body = json.dumps(request).encode()
        expected = np.uint8(tiny_scenes.shots(1)[0].image * 255 + 0.5)
        for _ in range(200):  # until it has learned what this view looks like
            client.sendall(struct.pack("<I", len(body)) + body)
            picture = np.frombuffer(_receive(client, 56 * 40 * 3), np.uint8).reshape(40, 56, 3)
            length = struct.unpack("<I", _receive(client, 4))[0]
            assert _receive(client, length).decode("utf-8") == os.path.abspath(colmap)
            if np.square((picture - 1.0 * expected) / 255).mean() < 10**-1.8:
                break
        else:
            pytest.fail("the viewer never saw the scene")
        client.close()
        time.sleep(0.2)
        assert process.poll() is None, "training ended with its viewer"
    finally:
        process.terminate()
        process.wait(20)


def _connect(port: int, process: subprocess.Popen) -> socket.socket:
    for _ in range(600):
        assert process.poll() is None, "train.py ended early"
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError("train.py opened no port")


def _receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        assert piece, "closed"
        data += piece
    return data

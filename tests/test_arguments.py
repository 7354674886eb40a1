"""Flags: names, defaults and shorthands of the original; files that keep them; messages for mistakes."""

import ast
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from arguments import (
    LAST_SEED,
    ConfigError,
    ConvertParams,
    MetricsParams,
    ModelParams,
    OptimizationParams,
    PipelineParams,
    RenderParams,
    RunParams,
    build,
    format_cfg_args,
    parse_cfg_args,
    parse_metrics,
    parse_render,
    parse_train,
    pick_device,
    saved_options,
)
from scene.folder import ModelFolder
from scene.points import PointCloud, uniform_points
from training.run import seed_everything

# The original's defaults (its README and argument groups), written out a second time on purpose.
ORIGINAL_MODEL = {
    "sh_degree": 3, "source_path": "", "model_path": "", "images": "images", "depths": "", "resolution": -1,
    "white_background": False, "train_test_exp": False, "data_device": "cuda", "eval": False,
}  # fmt: skip
ORIGINAL_PIPELINE = {
    "convert_SHs_python": False, "compute_cov3D_python": False, "debug": False, "antialiasing": False,
}  # fmt: skip
ORIGINAL_OPTIMIZATION = {
    "iterations": 30_000, "position_lr_init": 0.00016, "position_lr_final": 0.0000016,
    "position_lr_delay_mult": 0.01, "position_lr_max_steps": 30_000, "feature_lr": 0.0025,
    "opacity_lr": 0.025, "scaling_lr": 0.005, "rotation_lr": 0.001,
    "exposure_lr_init": 0.01, "exposure_lr_final": 0.001,
    "exposure_lr_delay_steps": 0, "exposure_lr_delay_mult": 0.0, "percent_dense": 0.01, "lambda_dssim": 0.2,
    "densification_interval": 100, "opacity_reset_interval": 3000, "densify_from_iter": 500,
    "densify_until_iter": 15_000, "densify_grad_threshold": 0.0002, "depth_l1_weight_init": 1.0,
    "depth_l1_weight_final": 0.01, "random_background": False, "optimizer_type": "default",
}  # fmt: skip
OURS = {
    "absgrad", "cap_max", "final_count", "strategy", "noise_lr", "opacity_reg", "scale_reg", "opacity_decay",
    "grow_by", "update_every", "rates_final", "coarse_until", "budget", "preset", "feature_rest_div",
    "average_last", "filter_3d", "views_per_step", "visits",
}  # fmt: skip
ORIGINAL_RUN = {
    "ip": "127.0.0.1", "port": 6009, "debug_from": -1, "detect_anomaly": False,
    "test_iterations": [7_000, 30_000], "save_iterations": [7_000, 30_000], "quiet": False,
    "disable_viewer": False, "checkpoint_iterations": [], "start_checkpoint": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "group, original",
    [
        (ModelParams, ORIGINAL_MODEL),
        (PipelineParams, ORIGINAL_PIPELINE),
        (OptimizationParams, ORIGINAL_OPTIMIZATION),
        (RunParams, ORIGINAL_RUN),
    ],
)
def test_names_and_defaults_are_the_originals(group, original):
    ours = vars(group())
    assert {name: ours[name] for name in original} == original
    if group is OptimizationParams or group is PipelineParams:
        assert ours.keys() - OURS == original.keys()


def test_shorthands(tmp_path):
    model, *_ = parse_train(f"-s {tmp_path} -m out -i images_4 -d depths -r 4 -w".split())
    assert (model.source_path, model.model_path, model.images) == (str(tmp_path), "out", "images_4")
    assert (model.depths, model.resolution, model.white_background) == ("depths", 4, True)


def test_switches_go_both_ways_and_lists_and_optional_values_parse():
    model, opt, pipe, run, *_ = parse_train(
        "-s x --eval --no-eval --antialiasing --random_init --save_iterations 10 20 --iterations 50 -r -1 "
        "--test_iterations -1 --device cpu --seed 3 --llffhold 5".split()
    )
    assert not model.eval and pipe.antialiasing
    assert model.random_init == 100_000 and model.llffhold == 5 and model.resolution == -1
    assert parse_train("-s x --random_init 7".split())[0].random_init == 7
    assert run.save_iterations == [10, 20, 50], "the last iteration is always saved"
    assert run.test_iterations == [-1] and (run.device, run.seed) == ("cpu", 3)


def test_source_path_is_absolute_and_model_path_is_made_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (parse_train(["-s", "data"])[0] for _ in range(2))
    assert first.source_path == str(tmp_path / "data")
    assert first.model_path.startswith("output/") and len(first.model_path) == len("output/") + 10
    assert first.model_path != second.model_path
    monkeypatch.setenv("OAR_JOB_ID", "1234567890123")
    assert parse_train(["-s", "data"])[0].model_path == "output/1234567890"


@pytest.mark.parametrize(
    "line, message",
    [
        ("-s x --iteratons 7", "unknown argument --iteratons; did you mean --iterations?"),
        ("-s x --white-background", "did you mean --white_background?"),
        ("-s x stray", "unknown argument stray"),
        ("-s x --sh_degree 4", "sh_degree must be one of 0, 1, 2, 3, got 4"),
        ("-s x --optimizer_type adam", "optimizer_type must be one of default, sparse_adam, got adam"),
        ("-s x --iterations 7k", "--iterations: invalid int value: '7k'"),
        ("-s x --iterations 0", "iterations must be at least 1, got 0"),
        ("-s x --exposure_lr_final 0", "exposure_lr_init and exposure_lr_final must both be 0 or neither"),
        ("--eval", "name the data set folder with -s"),
    ],
)
def test_mistakes_are_named(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_train(line.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


GROUPS = (
    ModelParams, PipelineParams, OptimizationParams, RunParams, RenderParams, ConvertParams, MetricsParams,
)  # fmt: skip
NUMBERS = [
    pytest.param(group, f, id=f"{group.__name__}.{f.name}")
    for group in GROUPS
    for f in fields(group)
    if f.type in (int, float, list[int], list[float]) and not f.metadata["choices"]
]


@pytest.mark.parametrize("group, f", NUMBERS)
def test_every_number_has_a_range(group, f):
    least, most = f.metadata["minimum"], f.metadata["maximum"]
    assert least is not None and most is not None
    below, above = (least - 1, most + 1) if f.type is not float else (least - 1e-3, 1.01 * most)
    infinite = [float("nan"), float("inf"), 10**400] if f.type is float else [10**400]
    for value in (below, above, -(10**400), *infinite):
        given = [value] if f.type == list[int] else value
        with pytest.raises(ConfigError, match=f"{f.name} must be at (least|most) ") as error:
            build((group,), {f.name: given})
        assert len(str(error.value)) < 200
    for value in (least, most):
        build((group,), {f.name: [value] if f.type == list[int] else value})


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e400", "1" * 400, "1" * 5000, "2147483648", "x"])
@pytest.mark.parametrize(
    "flag", ["--iterations", "--lambda_dssim", "--port", "-r", "--test_iterations", "--seed"]
)
def test_numbers_on_the_command_line_get_one_line(flag, value, capsys):
    if (flag, value) in [("-r", "-1"), ("--test_iterations", "-1"), ("--seed", "2147483648")]:
        parse_train(["-s", "x", flag, value])
        return
    with pytest.raises(SystemExit) as exit:
        parse_train(["-s", "x", flag, value])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 2 and len(error) < 500, error
    assert {"-r": "resolution"}.get(flag, flag[2:]) in error


def test_numbers_in_files_get_one_line(tmp_path, capsys):
    path = tmp_path / "c.json"
    for text in ("1" + 400 * "0", "NaN", "Infinity", "1e999", "7"):
        path.write_text(f'{{"lambda_dssim": {text}}}')
        with pytest.raises(SystemExit):
            parse_train(["-s", "x", "--config", str(path)])
        error = capsys.readouterr().err
        assert f"{path}: lambda_dssim must be at " in error and len(error) < 500


def test_other_commands_read_numbers_with_a_range():
    """Their flags are not in a dataclass: none of them takes any int or float."""
    root = Path(__file__).parent.parent
    files = [*root.glob("*.py"), *(p for p in root.glob("*/*.py") if p.parent.name != "tests")]
    kinds = []
    for path in files:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
                kinds += [(path, k.value) for k in call.keywords if k.arg == "type"]
    assert len([kind for _, kind in kinds if isinstance(kind, ast.Call)]) > 10
    for path, kind in kinds:
        assert ast.unparse(kind) not in ("int", "float"), f"{path}:{kind.lineno} needs number(...)"


def test_seeds_up_to_the_last():
    cloud = PointCloud(np.zeros((100, 3)) + np.arange(100)[:, None], np.zeros((100, 3)))
    for seed in (2**32, LAST_SEED):
        seed_everything(seed)
        drawn = [np.random.random(), *uniform_points(3, np.zeros(3), np.ones(3), seed).xyz[:, 0]]
        assert len({*drawn, *cloud.at_most(5, seed).xyz[:, 0]}) == 9
        seed_everything(seed - 1)
        assert np.random.random() != drawn[0]
    np.random.seed(7)
    expected = np.random.random()
    seed_everything(7)
    assert np.random.random() == expected, "seeds of 32 bits draw what they always drew"


def test_config_file_comes_after_defaults_and_before_the_command_line(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"iterations": 100, "sh_degree": 1, "PipelineParams": {"antialiasing": True}}))
    model, opt, pipe, *_ = parse_train(f"-s x --config {path} --sh_degree 2".split())
    assert (opt.iterations, model.sh_degree, pipe.antialiasing) == (100, 2, True)

    for text, message in [
        ('{"iteration": 1}', "unknown option iteration; did you mean iterations?"),
        ('{"iterations": "1"}', "iterations must be an integer, got '1'"),
        ('{"eval": 1}', "eval must be true or false, got 1"),
        ('{"feature_lr": "x"}', "feature_lr must be a number, got 'x'"),
        ('{"test_iterations": 5}', "test_iterations must be a list of integers, got 5"),
        ("[]", "must hold a JSON object, got list"),
        ("{", "is not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse_train(["-s", "x", "--config", str(path)])
        error = capsys.readouterr().err
        assert message in error and str(path) in error
    path.write_text('{"feature_lr": 1}')
    assert type(parse_train(["-s", "x", "--config", str(path)])[1].feature_lr) is float


def test_model_folder_keeps_every_option(tmp_path):
    line = f"-s {tmp_path} -m {tmp_path}/m -w -r 2 --antialiasing --iterations 12 --lambda_dssim 0.3"
    groups = parse_train(line.split())
    ModelFolder(groups[0].model_path).write_options(groups)
    model, pipe, render = parse_render(["-m", f"{tmp_path}/m", "--iteration", "12"])
    assert (model, pipe) == (groups[0], groups[2]), "render.py repeats no flag"
    assert render.iteration == 12

    model, pipe, _ = parse_render(["-m", f"{tmp_path}/m", "--no-antialiasing", "-s", f"{tmp_path}/moved"])
    assert not pipe.antialiasing and model.source_path == f"{tmp_path}/moved" and model.white_background

    (tmp_path / "m").rename(tmp_path / "n")
    assert parse_render(["-m", f"{tmp_path}/n"])[0].model_path == f"{tmp_path}/n"
    assert saved_options(tmp_path / "n", (OptimizationParams,))["lambda_dssim"] == 0.3
    assert parse_train(["--config", f"{tmp_path}/n/config.json"])[1] == groups[1]


def test_a_repeated_run_does_not_land_on_the_first(tmp_path, capsys):
    (tmp_path / "m" / "point_cloud").mkdir(parents=True)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({"source_path": "x", "model_path": str(tmp_path / "m")}))
    with pytest.raises(SystemExit):
        parse_train(["--config", str(config)])
    assert "has a trained model: name the folder to write to with -m" in capsys.readouterr().err
    for folder in ("m", "other"):  # said on the command line, it is meant
        assert parse_train(["--config", str(config), "-m", f"{tmp_path}/{folder}"])[0].model_path.endswith(
            folder
        )


def test_cfg_args_is_what_viewers_search(tmp_path):
    model = ModelParams(source_path="/data/it's here", white_background=True, sh_degree=2)
    text = format_cfg_args(model)
    assert text.startswith("Namespace(") and "\n" not in text
    assert "sh_degree=2," in text and "white_background=True," in text
    assert "source_path='/data/garden'" in format_cfg_args(ModelParams(source_path="/data/garden"))
    assert parse_cfg_args(text) == vars(model)


def test_folder_of_the_original_opens_with_cfg_args_only(tmp_path):
    (tmp_path / "cfg_args").write_text(
        "Namespace(sh_degree=1, source_path='/data/lego', model_path='./output/x', images='images', "
        "depths='', resolution=-1, _white_background=True, white_background=True, train_test_exp=False, "
        "data_device='cuda', eval=True, from_a_fork=(1, 2))"
    )
    model, pipe, _ = parse_render(["-m", str(tmp_path)])
    assert (model.sh_degree, model.source_path, model.white_background, model.eval) == (
        1,
        "/data/lego",
        True,
        True,
    )
    assert model.model_path == str(tmp_path) and pipe == PipelineParams()


@pytest.mark.parametrize(
    "text",
    [
        "Namespace(a=__import__('os').system('true'))",
        "print(1)",
        "Namespace(1)",
        "Namespace(**{'a': 1})",
        "Namespace(a=1) or 2",
        "(" * 5000,
        "Namespace(a=" + "-" * 100_000 + "1)",
        "",
    ],
)
def test_cfg_args_is_never_evaluated(text):
    with pytest.raises(ConfigError, match="must be Namespace"):
        parse_cfg_args(text)


def test_model_folders_that_are_none(tmp_path, capsys):
    for folder, message in [
        (tmp_path, "holds neither config.json nor cfg_args"),
        (tmp_path / "x", "is not there"),
    ]:
        with pytest.raises(SystemExit):
            parse_render(["-m", str(folder)])
        assert message in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes(b"\xff" * 10)
    with pytest.raises(ConfigError, match="cannot read"):
        saved_options(tmp_path, (ModelParams,))
    (tmp_path / "config.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(ConfigError, match="too large"):
        saved_options(tmp_path, (ModelParams,))


def test_metrics_takes_several_folders(capsys):
    metrics = parse_metrics(["-m", "a", "b", "--lpips", "none"])
    assert metrics.model_paths == ["a", "b"] and metrics.lpips == "none"
    with pytest.raises(SystemExit):
        parse_metrics([])
    assert "-m" in capsys.readouterr().err


def test_device_names():
    assert pick_device("cpu") == pick_device("cpu:3") == torch.device("cpu")
    for name in ("gpu", "mps", "meta"):  # no device of PyTorch's, or none that the kernels are for
        with pytest.raises(ConfigError, match=f"device must be cpu, cuda or .* got '{name}'"):
            pick_device(name)


def test_one_of_several_gpus_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert pick_device() == torch.device("cuda") and len(current) == 1
    for name in ("cuda:2", "cuda:127", "cuda:1000"):
        with pytest.raises(ConfigError, match=f"device is {name}, but the GPUs .* are cuda:0 to cuda:1$"):
            pick_device(name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_configurations_saved_by_other_programs(tmp_path, encoding):
    (tmp_path / "mine.json").write_bytes('{"iterations": 70}'.encode(encoding))
    _, opt, *_ = parse_train(["-s", "data", "--config", str(tmp_path / "mine.json")])
    assert opt.iterations == 70

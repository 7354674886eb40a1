"""FAITHFULNESS.md names files, tests and constants that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "submodules" / "diff-gaussian-rasterization"
PAGE = (ROOT / "FAITHFULNESS.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w./:\[\]-]+)`", PAGE)))


def find(path: str) -> Path | None:
    return next((base / path for base in (ROOT, NATIVE) if (base / path).exists()), None)


def test_named_files_and_tests_are_there():
    named = [name for name in NAMED if "/" in name or name.endswith(".py")]
    assert len(named) > 30
    for name in named:
        path, _, test = name.partition("::")
        if path == "reference.py":
            continue
        assert find(path), f"{path} is not there"
        assert not test or f"def {test}(" in find(path).read_text(), f"{name} is not there"


def test_named_constants_are_there():
    constants = (NATIVE / "csrc" / "common" / "constants.h").read_text()
    for name in NAMED:
        if re.fullmatch(r"k[A-Z]\w+", name):
            assert f" {name} = " in constants, name
    density, model = ((ROOT / file).read_text() for file in ("strategies/adc.py", "scene/gaussian_model.py"))
    for name in ("CHILDREN", "SHRINK", "MIN_OPACITY", "MAX_SCALE"):
        assert f"{name} = " in density
    assert "INITIAL_OPACITY = 0.1\n" in model and "RESET_OPACITY = 0.01\n" in model


def test_default_values_are_those_of_the_page():
    from arguments import OptimizationParams

    opt = OptimizationParams()
    assert (opt.lambda_dssim, opt.densify_grad_threshold, opt.percent_dense) == (0.2, 2e-4, 0.01)
    assert (opt.densification_interval, opt.densify_from_iter, opt.densify_until_iter) == (100, 500, 15_000)
    assert (opt.position_lr_init, opt.position_lr_final, opt.feature_lr) == (1.6e-4, 1.6e-6, 0.0025)
    assert (opt.opacity_lr, opt.scaling_lr, opt.rotation_lr) == (0.025, 0.005, 0.001)
    assert (opt.opacity_reset_interval, opt.depth_l1_weight_init, opt.depth_l1_weight_final) == (
        3000,
        1.0,
        0.01,
    )

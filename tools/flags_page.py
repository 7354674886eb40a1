"""Write docs/flags.md from the dataclasses in arguments/.

python -m tools.flags_page
"""

from dataclasses import MISSING, Field, fields
from pathlib import Path

from arguments import (
    ConvertParams,
    ExportParams,
    FieldParams,
    MetricsParams,
    ModelParams,
    OptimizationParams,
    PhotoParams,
    PipelineParams,
    RenderParams,
    ReportParams,
    RunParams,
    ViewParams,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
PROGRAMS = {
    "train.py": (ModelParams, OptimizationParams, PipelineParams, PhotoParams, RunParams, FieldParams),
    "render.py": (RenderParams,),
    "metrics.py": (MetricsParams,),
    "report.py": (ReportParams,),
    "export.py": (ExportParams,),
    "convert.py": (ConvertParams,),
    "view.py": (ViewParams,),
}
HEAD = """# Flags

All flags of the original keep their names, shorthands and defaults. Switches have an off position as well
(`--no-antialiasing`). A misspelled flag is answered with the nearest one. `--help` prints the same lists.

`train.py` also takes `--config FILE.json`: options from a file, such as the `config.json` of an earlier run.
`render.py` also takes the flags of the model and of the picture. It reads them from the model folder, so that
you repeat none.

This page is made by `python -m tools.flags_page`.
"""


def page() -> str:
    parts = [HEAD]
    for program, groups in PROGRAMS.items():
        parts.append(f"\n## {program}\n")
        for group in groups:
            parts.append(f"\n{group.__doc__}:\n\n| Flag | Default | What it does |\n|---|---|---|\n")
            parts += [_row(f) for f in fields(group)]
    return "".join(parts)


def _row(f: Field) -> str:
    names = ", ".join(f"`{name}`" for name in [f.metadata["short"], f"--{f.name}"] if name)
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({', '.join(map(str, f.metadata['choices']))})"
    return f"| {names} | {_default(f)} | {text.replace('|', chr(92) + '|')} |\n"


def _default(f: Field) -> str:
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

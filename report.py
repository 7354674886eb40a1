"""Write one page about a trained model: pictures beside the photos, scores, curves, cameras, options.

    python report.py -m output/x
    python report.py -m output/a output/b --to both.html

The page, output/x/report.html, is one file that opens in any browser, also offline. It shows the test views
that render.py has made, with the scores of metrics.py. Of several models it compares scores and curves.
"""

import shlex
import sys
from pathlib import Path

from arguments import ReportParams, parse_report
from scene.folder import ModelFolder
from utils import commands
from utils.terminal import say
from viewer import report
from viewer.facts import gather


def write_report(options: ReportParams) -> None:
    models = [gather(Path(path)) for path in options.model_paths]
    target = Path(options.to) if options.to else ModelFolder(options.model_paths[0]).report
    command = shlex.join(["python", "report.py", "-m", *options.model_paths])
    left_out = report.write(models, target, options.max_mb, options.splats, command)
    say(f"Report: {target} ({target.stat().st_size / 1e6:.2f} MB)")
    if left_out:
        say(f"To stay below {options.max_mb:g} MB (--max_mb) it has only {left_out}")


def main(argv: list[str] | None = None) -> int:
    options = parse_report(argv)
    return commands.run("report.py", lambda: write_report(options))


if __name__ == "__main__":
    sys.exit(main())

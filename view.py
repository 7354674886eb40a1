"""Look at a model in a browser, while it trains or afterwards.

    python view.py -m output/x
    python view.py model.spz

Prints the address of a page with pictures of our rasterizer or of the browser's own, photos beside them,
depth, normals, errors. From another machine: ssh -L 6080:127.0.0.1:6080 this-one, and open the same address.
"""

import sys
import webbrowser
from pathlib import Path

from arguments import ViewParams, parse_view, pick_device
from scene import formats
from scene.folder import ModelFolder
from utils import commands
from utils.files import DataError, is_file
from utils.terminal import say
from viewer.live import Trainer
from viewer.pictures import Pictures
from viewer.server import Server, Site


def view(options: ViewParams) -> None:
    folder = None if options.file else ModelFolder(options.model_path)
    source, trainer = folder or Path(options.file), Trainer(folder) if folder else None
    _check(source, trainer)
    site = Site(Pictures(source, pick_device(options.device)), trainer)
    server = _server(site, options)
    address = f"http://{options.host}:{server.server_address[1]}/?t={site.token}"
    say(f"{source}: {address}")
    if options.host not in ("127.0.0.1", "localhost"):
        say(f"Warning: whoever reaches {options.host} and knows this address can look, too")
    if options.open:
        webbrowser.open(address)
    with server:
        server.serve_forever(poll_interval=0.2)


def _check(source: ModelFolder | Path, trainer: Trainer | None) -> None:
    """Is there anything to look at?"""
    if isinstance(source, Path):
        formats.ending(source)
        if not is_file(source):
            raise DataError(f"{source}: there is no such file")
    elif not (trainer and trainer.there()):
        source.saved()


def _server(site: Site, options: ViewParams) -> Server:
    try:
        return Server(site, options.host, options.port)
    except (OSError, OverflowError) as error:
        raise DataError(
            f"cannot listen on {options.host}:{options.port} ({error}); --port names another"
        ) from None


def main(argv: list[str] | None = None) -> int:
    options = parse_view(argv)
    return commands.run("view.py", lambda: view(options))


if __name__ == "__main__":
    sys.exit(main())

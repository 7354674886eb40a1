"""What the modules of --appearance share: colors that each photo has of its own.

A view without numbers of its own, such as a test view, is shown with the median of all train photos.
"""

from torch import Tensor

from arguments import Options
from per_view.per_photo import PerPhoto, dimmed
from scene.cameras import Camera
from utils.schedules import log_linear


class Appearance(PerPhoto):
    eases_in = 1 / 60  # part of the run in which the rate rises

    def of(self, camera: Camera) -> Tensor:
        """This view's numbers."""
        row = self.row(camera)
        return self.values.detach().median(0).values if row is None else self.values[row]

    def schedule(self, iteration: int) -> None:
        self.rate = color_rate(self.options, iteration, self.eases_in)


RATES = 0.05, 0.0005  # of a visit, at the start and at the end


def color_rate(options: Options, iteration: int, eases_in: float) -> float:
    """0 while opacities are low."""
    if dimmed(options, iteration):
        return 0.0
    steps = options.opt.iterations
    return log_linear(iteration, *RATES, steps, round(eases_in * steps), 0.01)

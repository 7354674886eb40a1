"""What a strategy is: it decides where Gaussians come and go while training."""

from collections.abc import Callable, Sequence

from diff_gaussian_rasterization import ScreenStats
from torch import Tensor

from arguments import PipelineParams
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from strategies.rows import at_most
from utils.memory import out_of_memory


class Strategy:
    """The defaults leave the Gaussians as they are.

    With several processes, each has some of the rows: statistics have a row for each Gaussian here; what
    decides about rows sees those of all, through GaussianModel.from_all(), and decides alike everywhere.
    Rows move through GaussianModel.reindex() alone. They may also move without the strategy, when memory runs
    out or numbers are not finite: forget() tells it.
    """

    say: Callable[[str], None] = print  # takes lines for the log
    for_many = False  # can it take several processes, each with some of the rows?

    def start(self, gaussians: GaussianModel) -> None:
        """Once, before the first step of a run that starts from points."""

    def see(self, cameras: Sequence[Camera], pipe: PipelineParams, background: Tensor) -> None:
        """Before that: the train views, and how they are rendered."""

    def stats(self, gaussians: GaussianModel, iteration: int) -> ScreenStats | None:
        """What this iteration's backward is to add to, if anything."""
        return None

    def after_step(self, gaussians: GaussianModel, iteration: int) -> None:
        """After the optimizer's step: the rows may move now, and gradients do not move with them."""

    def loss_terms(self) -> list[Callable]:
        """Regularizers, as in training/losses.py."""
        return []

    def forget(self) -> None:
        """Rows have moved without the strategy: what it keeps for each row is void."""

    def limit(self, count: int) -> None:
        """Memory has run out: from now on there may be so many Gaussians, and no more."""

    def if_it_fits(self, gaussians: GaussianModel, what: str, move: Callable[[], None]) -> None:
        """Let move() change the rows. If memory for that is lacking, they stay, and limit() is told."""
        try:
            with gaussians.ranks.together():
                move()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.limit(gaussians.total)
            self.say(f"out of memory: {what} undone; {at_most(gaussians.total)}")

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def check(self, gaussians: GaussianModel) -> None:
        """Raise ValueError if what load_state_dict() took does not have a row for each Gaussian."""

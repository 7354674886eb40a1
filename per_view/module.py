"""What a per-view module is."""

from collections.abc import Callable

from diff_gaussian_rasterization import Rendered
from torch import Tensor

from scene.cameras import Camera
from scene.folder import ModelFolder


class PerView:
    """The defaults do nothing."""

    name = ""  # of its part in checkpoints
    views = 1  # of a step
    sees_depth = False  # does picture() look at inverse depths?

    def cameras(self, camera: Camera) -> list[Camera]:
        """From where the scene is seen to make the picture of this view."""
        return [camera]

    def sharp_camera(self, camera: Camera) -> Camera:
        """The one camera that shows this view without blur."""
        return camera

    def picture(self, camera: Camera, pictures: list[Rendered]) -> Rendered:
        """The view's picture, made of those of its cameras()."""
        return pictures[0]

    def loss_terms(self) -> list[Callable]:
        """As in training/losses.py."""
        return []

    def parameters(self) -> list[Tensor]:
        """What is optimized."""
        return []

    def schedule(self, iteration: int) -> None:
        """Learning rates of this step (counted from 1)."""

    def forget_gradients(self) -> None:
        """Of a step that was not taken."""
        for value in self.parameters():
            value.grad = None

    def average_gradients(self, views: int) -> None:
        """They are sums over so many views, and become means."""
        if views > 1:
            for value in self.parameters():
                if value.grad is not None:
                    value.grad /= views

    def prepare(self) -> None:
        """Take the memory that step() needs: if it is lacking, the step fails here, before anything moved."""

    def step(self) -> None:
        """Move the parameters along their gradients, and drop the gradients. It must not fail."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def save(self, folder: ModelFolder, iteration: int) -> None:
        """Write what was learned beside the model of this iteration."""

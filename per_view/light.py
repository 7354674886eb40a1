"""How much of a photo's light came from each part of its camera's path (--blur_weights).

A shutter opens and closes, a flash fires, a hand stops for a moment: then the mean along the path is not an
even one. Each photo has five logits, from the start of the exposure to its end, with straight lines between
them. The softmax of what they are at the pictures' times are the pictures' weights.
"""

import torch
from torch import Tensor

from per_view.per_photo import PerPhoto

PLACES = 5
RATES = 0.05, 0.0005  # of a visit, at the start and at the end
EVEN = 1e-4  # of the loss: the mean square of the logits


class Light(PerPhoto):
    name = "light"

    def weights(self, row: int, times: Tensor) -> Tensor:
        """At times [n] in [0, 1]; their sum is one. [n]"""
        places = torch.arange(PLACES).to(times)
        near = (1 - ((PLACES - 1) * times[:, None] - places).abs()).clamp_min(0)
        return (near @ self.values[row]).softmax(0)

    def restraint(self, row: int) -> Tensor:
        """What photos do not tell stays even."""
        return EVEN * self.values[row].square().mean()

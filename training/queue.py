"""In which order the training views are shown."""

import random
from collections.abc import Sequence


class ViewQueue:
    """Uniform draws without replacement from `count` views; when all were shown, the next round begins.

    The queue has a generator of its own, so that nothing else that draws random numbers changes the order.
    """

    def __init__(self, count: int, seed: int = 0):
        if count < 1:
            raise ValueError(f"count must be at least 1 view, got {count}")
        self.count = count
        self._random = random.Random(seed)
        self._waiting: list[int] = []  # of this round, but for the upcoming one
        self._upcoming: list[int] = []

    def next(self) -> int:
        self.peek()
        return self._upcoming.pop(0)

    def peek(self, ahead: int = 0) -> int:
        """The view that next() will return, or so many after it: its picture can be fetched while another one
        is worked on."""
        while len(self._upcoming) <= ahead:
            self._upcoming.append(self._draw())
        return self._upcoming[ahead]

    def _draw(self) -> int:
        if not self._waiting:
            self._waiting = list(range(self.count))
        return self._waiting.pop(self._random.randrange(len(self._waiting)))

    def state_dict(self) -> dict:
        """Plain values, so that a checkpoint of them loads safely."""
        version, words, gauss = self._random.getstate()
        return {
            "count": self.count,
            "waiting": list(self._waiting),
            "upcoming": list(self._upcoming) if len(self._upcoming) > 1 else next(iter(self._upcoming), None),
            "random": [version, list(words), gauss],
        }

    def load_state_dict(self, state: dict) -> None:
        if type(state["count"]) is not int or state["count"] != self.count:
            raise ValueError(
                f"the view queue must be over {self.count} views, got one over {str(state['count'])[:20]}"
            )
        upcoming = state["upcoming"]  # several views, one or none
        upcoming = upcoming if isinstance(upcoming, list) else [upcoming] * (upcoming is not None)
        drawn = [*state["waiting"], *upcoming]
        if not all(type(view) is int and 0 <= view < self.count for view in drawn):
            raise ValueError(f"the view queue must hold views from 0 to {self.count - 1}")
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        self._waiting, self._upcoming = list(state["waiting"]), list(upcoming)


def spread(views: Sequence, wanted: Sequence[int] = range(5, 30, 5)) -> list:
    """The views 5, 10, 15, 20, 25 (modulo the count): the sample by which training progress is judged."""
    return [views[i % len(views)] for i in wanted] if views else []

"""By what a run knows its data set again: names, sizes, cameras and roles of the views, wherever it lies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scene.frame import OF_DATA, Similarity

if TYPE_CHECKING:
    from scene.readers.views import View

TOLERANCE = 1e-4  # of lengths, relative to the spread of the cameras; of rotations; of focal lengths
ROLES = ("of no use", "for training", "for testing", "for both")


@dataclass
class Fingerprint:
    """All lists and arrays have one entry for each view."""

    names: list[str]
    roles: list[int]  # index of ROLES
    cameras: np.ndarray  # [V, 6] width, height, fx, fy, cx, cy
    poses: np.ndarray  # [V, 3, 4] world to camera, in the frame of training
    frame: Similarity

    @classmethod
    def of(
        cls, views: "list[View]", train: "list[View]", test: "list[View]", frame: Similarity
    ) -> "Fingerprint":
        trains, tests = set(train), set(test)
        k = [view.intrinsics for view in views]
        return cls(
            names=[view.name for view in views],
            roles=[(view in trains) + 2 * (view in tests) for view in views],
            cameras=np.array([(v.width, v.height, *m[[0, 1, 0, 1], [0, 1, 2, 2]]) for v, m in zip(views, k)]),
            poses=np.array([view.world_to_camera[:3] for view in views]),
            frame=frame,
        )

    def state_dict(self) -> dict:
        """Plain values and tensors."""
        return {
            "names": self.names,
            "roles": self.roles,
            "cameras": torch.from_numpy(self.cameras),
            "poses": torch.from_numpy(self.poses),
            "frame": [*self.frame.center, self.frame.unit],
        }

    def difference(self, state: dict | None) -> str:
        """What of another data set, as state_dict() has it, is not as here; "" if it is the same.

        Files of the original, and older ones of ours, say nothing about theirs. A model that is elsewhere,
        because of --normalize, is an error for any run.
        """
        center_and_unit = state["frame"] if state else [*OF_DATA.center, OF_DATA.unit]
        own = [*self.frame.center, self.frame.unit]
        if not np.allclose(center_and_unit, own, rtol=TOLERANCE, atol=TOLERANCE * self.frame.unit):
            raise ValueError("it has another --normalize than this run; --start_checkpoint takes its PLY")
        return next(self._differences(state), "") if state else ""

    def _differences(self, state: dict) -> Iterator[str]:
        names, roles = state["names"], state["roles"]
        if len(names) != len(self.names):
            yield f"it is of a data set with {len(names)} views, here are {len(self.names)}"
        for there, here in zip(names, self.names):
            if there != here:
                yield f"it is of a data set with the view {there!r:.99}, here is {here!r:.99} in its place"
        cameras, poses = (state[key].double().numpy() for key in ("cameras", "poses"))
        if cameras.shape != self.cameras.shape or poses.shape != self.poses.shape:
            yield "it is of a data set with other cameras"
        same = np.isclose(cameras, self.cameras, rtol=TOLERANCE, atol=0.01).all(axis=1)
        for i in np.flatnonzero(~same):
            was, now = _lens(cameras[i]), _lens(self.cameras[i])
            yield f"the camera of {self.names[i]} was {was}, here it is {now}"
        for i in np.flatnonzero(~self._near(poses)):
            yield f"the camera of {self.names[i]} was at another place, or looked elsewhere"
        for name, there, here in zip(self.names, roles, self.roles):
            if there != here:
                yield f"the view {name} was {ROLES[there]}, here it is {ROLES[here]}"

    def _near(self, poses: np.ndarray) -> np.ndarray:
        """Which poses are ours, bool [V]."""
        (centers, turns), (others, turned) = _centers(self.poses), _centers(poses)
        spread = np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()
        allowed = TOLERANCE * spread + 1e-6 * np.abs(centers).max() + 1e-12
        moved = np.linalg.norm(centers - others, axis=1)
        return (moved <= allowed) & (np.abs(turns - turned).max(axis=(1, 2)) <= TOLERANCE)


def _centers(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [V, 3] and rotations [V, 3, 3]."""
    turns = poses[:, :, :3]
    return -np.einsum("vji,vj->vi", turns, poses[:, :, 3]), turns


def _lens(camera: np.ndarray) -> str:
    width, height, fx, *_ = camera
    return f"{width:.0f}x{height:.0f} with a focal length of {fx:.6g}"

"""Schedules: numbers that change over the course of a run.

All are log-linear, as in Plenoxels and Kerbl et al. 2023: the logarithm goes straight from the initial to the
final value, so that every decade of the value takes equally long.
"""

import math


def log_linear(
    step: int, initial: float, final: float, max_steps: int, delay_steps: int = 0, delay_mult: float = 1.0
) -> float:
    """initial^(1-t) * final^t at t = step / max_steps, held at `final` afterwards.

    With `delay_steps`, the first steps are scaled by a factor that rises along a quarter sine from
    `delay_mult` to 1. A zero at both ends means "off"; a negative step (before the run) is off too.
    """
    if step < 0 or (initial == 0.0 and final == 0.0):
        return 0.0
    if initial <= 0.0 or final <= 0.0:
        raise ValueError(f"a log-linear schedule must run between positive values, got {initial} to {final}")
    t = min(step / max_steps, 1.0) if max_steps > 0 else 1.0
    value = math.exp((1.0 - t) * math.log(initial) + t * math.log(final))
    if delay_steps > 0:
        rise = math.sin(0.5 * math.pi * min(step / delay_steps, 1.0))
        value *= delay_mult + (1.0 - delay_mult) * rise
    return value


def reaches(every: int, iteration: int, views: int = 1) -> bool:
    """Is a multiple of `every` among the last `views` iterations, those of one step?"""
    return iteration // every != (iteration - views) // every


def for_views(views: float, rate: float, betas: tuple[float, float], eps: float) -> dict:
    """Adam's options for the mean gradient of so many views, from those for one: it then goes about as far
    in a step as it would in that many, and forgets as much (the square-root rule)."""
    root = math.sqrt(views)
    return {"lr": rate * root, "betas": tuple(beta**views for beta in betas), "eps": eps / root}


def sh_degree_at(iteration: int, max_degree: int, every: int = 1000) -> int:
    """Bands of spherical harmonics in use: one more each `every` iterations, so base color settles first."""
    return min(iteration // every, max_degree)

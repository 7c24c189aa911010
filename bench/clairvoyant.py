"""What nobody can beat: deadlines that one could keep who knows all requests beforehand.

A linear programme (Horn's condition, Naval Research Logistics Quarterly 21, 1974, on least work):
of every window of time, the requests that arrive and are due inside of it and are kept take no
more GPU-seconds than there are. A request's least work is that of the two degrees, one after the
other, which end it between its arrival and its deadline. Steps are taken as divisible and blocks
as if they always fitted, so that the bound is above what can be reached.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from autoscaling.simulated_cluster import Job

CUTS_AT_ONCE = 64
TOLERANCE_S = 1e-3
Array = NDArray[np.float64]


def least_work_s(job: Job, gpus: int) -> float | None:
    """GPU-seconds that end it in time, if it is alone; None if nothing does."""
    steps, window_s = job.asked.kind.num_steps, job.task.deadline_s - job.asked.arrived_s
    sizes = [(degree, steps * step_s) for degree, step_s in job.task.sizes if degree <= gpus]
    found = [degree * seconds for degree, seconds in sizes if seconds <= window_s]
    for (few, slow_s), (many, quick_s) in itertools.permutations(sizes, 2):
        if quick_s <= window_s < slow_s:
            share = (window_s - quick_s) / (slow_s - quick_s)  # of the steps, by the few
            found.append(share * few * slow_s + (1 - share) * many * quick_s)
    return min(found, default=None)


def clairvoyant_bound(jobs: Sequence[Job], gpus: int, weight: Callable[[Job], float]) -> float:
    """The largest sum of the weights of those in time, by cutting planes."""
    able = [(job, work_s) for job in jobs if (work_s := least_work_s(job, gpus)) is not None]
    able.sort(key=lambda entry: entry[0].task.deadline_s)
    arrived = np.array([job.asked.arrived_s for job, _ in able])
    due = np.array([job.task.deadline_s for job, _ in able])
    work = np.array([work_s for _, work_s in able])
    weights = np.array([weight(job) for job, _ in able])
    rows, room = csr_matrix((0, len(able))), np.zeros(0)
    while True:
        solved = linprog(
            -weights, A_ub=rows if len(room) else None, b_ub=room if len(room) else None,
            bounds=(0, 1), method="highs",
        )  # fmt: skip
        cuts = _violated(arrived, due, work * solved.x, gpus)
        if not cuts:
            return float(-solved.fun)
        for start_s, end_s in cuts:
            inside = (arrived >= start_s) & (due <= end_s)
            rows = vstack([rows, csr_matrix(work * inside)], format="csr")
            room = np.append(room, gpus * (end_s - start_s))


def _violated(arrived: Array, due: Array, kept_s: Array, gpus: int) -> list[tuple[float, float]]:
    """The windows that hold most more than they can, one of each beginning; due is ascending."""
    load = np.zeros(len(due))
    found: list[tuple[float, float, float]] = []
    for index in np.argsort(-arrived, kind="stable"):
        load[index] = kept_s[index]
        over = np.cumsum(load) - gpus * (due - arrived[index])
        over[due < arrived[index]] = -np.inf
        worst = int(np.argmax(over))
        if over[worst] > TOLERANCE_S:
            found.append((float(over[worst]), float(arrived[index]), float(due[worst])))
    found.sort(reverse=True)
    return [(start_s, end_s) for _, start_s, end_s in found[:CUTS_AT_ONCE]]

"""How others decide on the number of nodes, for the simulator: what ours is compared with."""

import math
from collections import deque
from dataclasses import dataclass, field

from autoscaling.simulated_cluster import Fleet
from autoscaling.simulated_scaling import ServeDelays


@dataclass
class RayServe:
    """Ray Serve's own policy: so many requests, queued and running, to a replica, as a mean over
    its look-back period; its default delays.
    """

    target: float
    look_back_s: float = 30.0
    delays: ServeDelays = field(default_factory=lambda: ServeDelays(30.0, 600.0))
    seen: deque[tuple[float, int]] = field(default_factory=deque)

    def nodes(self, fleet: Fleet) -> int:
        """At least one replica for whoever waits for the first one."""
        self.seen.append((fleet.now_s, len(fleet.open_jobs)))
        while self.seen[0][0] < fleet.now_s - self.look_back_s:
            self.seen.popleft()
        ongoing = sum(count for _, count in self.seen) / len(self.seen)
        now = fleet.ready + len(fleet.coming_s)
        wanted = math.ceil(ongoing / self.target)
        if now == 0:
            return min(1, len(fleet.open_jobs))
        return self.delays.apply(wanted, now, fleet.now_s)


@dataclass
class Keda:
    """KEDA's queue length over a threshold, polled every 30 s, through a HorizontalPodAutoscaler,
    which lowers to the most that it wanted in 300 s.
    """

    threshold: float
    poll_s: float = 30.0
    window_s: float = 300.0
    wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def nodes(self, fleet: Fleet) -> int:
        """Never below one."""
        if not self.wanted or fleet.now_s - self.wanted[-1][0] >= self.poll_s:
            length = math.ceil(len(fleet.open_jobs) / self.threshold)
            self.wanted.append((fleet.now_s, max(1, length)))
        while self.wanted[0][0] < fleet.now_s - self.window_s:
            self.wanted.popleft()
        now = fleet.ready + len(fleet.coming_s)
        latest = self.wanted[-1][1]
        return latest if latest >= now else max(count for _, count in self.wanted)


@dataclass
class DisagFusion:
    """LightX2V's controller (`lightx2v/disagg/services/controller.py`; arXiv:2605.25550): one more
    when the GPUs are used to over 80 % or more than two wait, one less under 20 %, 30 s apart.
    """

    cooldown_s: float = 30.0
    changed_s: float = -math.inf

    def nodes(self, fleet: Fleet) -> int:
        """One at a time."""
        now = fleet.ready + len(fleet.coming_s)
        if fleet.now_s - self.changed_s < self.cooldown_s:
            return now
        wanted = now
        if fleet.utilisation > 0.8 or len(fleet.queued) > 2:
            wanted = now + 1
        elif fleet.utilisation < 0.2 and now > 1:
            wanted = now - 1
        if wanted != now:
            self.changed_s = fleet.now_s
        return wanted


@dataclass(frozen=True)
class Static:
    """As many as the peak takes, always."""

    count: int

    def nodes(self, fleet: Fleet) -> int:
        """The same."""
        return self.count

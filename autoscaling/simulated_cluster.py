"""What a simulated cluster is made of: its configuration, nodes, requests and history."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autoscaling.tasks import Step, Task
from autoscaling.urgency import UrgencyConfig
from autoscaling.workloads import Asked
from credits.plans import PlanTable
from credits.pricing import Passes, PriceTable, WorkWeights, charge, quote, share_done


class NodePolicy(Protocol):
    """Says how many nodes there are to be."""

    def nodes(self, fleet: "Fleet") -> int:
        """Asked every `scale_every_s`; those that are coming count."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a NodePolicy is asked about.

    coming_s: in how many seconds each node that was asked for will be ready. jobs: all of them, the
    oldest first; queued: those that no node has taken.
    """

    now_s: float
    ready: int
    coming_s: tuple[float, ...]
    jobs: Sequence["Job"]
    open_jobs: Collection["Job"]
    queued: Collection["Job"]
    utilisation: float


class StepPolicy(Protocol):
    """Says which steps begin on the ranks of one node."""

    def next_steps(
        self,
        now_s: float,
        num_ranks: int,
        tasks: Collection[Task],
        under_way: Sequence[Step],
    ) -> list[Step]:
        """As `step_scheduler.next_steps`; called at every event of the node."""


@dataclass(frozen=True, slots=True)
class Reclaim:
    """A node that goes away: told notice_s before; 0: it dies unforeseen."""

    node: int
    gone_s: float
    notice_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Hang:
    """A step that is under way on a node never ends: the oldest, if there is one."""

    node: int
    at_s: float


@dataclass(frozen=True, slots=True)
class NodeStart:
    """What lies between asking for a node and its first step, in seconds."""

    machine_s: float = 100.0
    image_s: float = 120.0
    ray_s: float = 30.0
    weights_s: float = 60.0
    warm_up_s: float = 50.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.machine_s + self.image_s + self.ray_s + self.weights_s + self.warm_up_s


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """num_nodes of gpus_per_node A100s each, to begin with.

    slots: so many requests a node takes, running and parked, the others wait in the cluster's
    queue; None: any number. start: of a node that is asked for. card_gb: memory of each GPU; None:
    everything fits at any degree. ageing_s: see `jobs.order`. switch_s: what it costs to go on with
    a request on other ranks than before; cost_error: how far the true step times are from those
    that are expected, as the standard deviation of their logarithm, drawn for every request;
    checkpoint_s: a request is saved when it has run for so long since it was saved last, and what
    it made since is lost if its node dies without notice. A step that hangs is found by taking
    hang_factor times as long as it should, and hang_least_s at least; its node's ranks then form
    again within form_s. dollars_per_node_hour: of a p4d.24xlarge on demand; prices: of a video.
    """

    num_nodes: int = 1
    gpus_per_node: int = 8
    slots: int | None = None
    start: NodeStart = NodeStart()
    card_gb: float | None = None
    scale_every_s: float = 10.0
    ageing_s: float = 600.0
    switch_s: float = 0.1
    cost_error: float = 0.0
    checkpoint_s: float = 30.0
    reclaims: tuple[Reclaim, ...] = ()
    hangs: tuple[Hang, ...] = ()
    hang_factor: float = 3.0
    hang_least_s: float = 5.0
    form_s: float = 60.0
    dollars_per_node_hour: float = 21.96
    prices: PriceTable = field(default_factory=PriceTable)
    urgency: UrgencyConfig = field(default_factory=UrgencyConfig)
    plans: PlanTable = field(default_factory=PlanTable)


@dataclass(eq=False, slots=True)
class Job:
    """A request in the simulated cluster.

    task.steps_left is what it will be when the step under way has ended. turn: in the queue, 0
    before it came there. slowness: by which its steps take longer than expected. saved_left: steps
    left at the last checkpoint, made when it had run for saved_ran_s. gpu_s: what its steps took;
    lost_steps: made again.
    """

    asked: Asked
    task: Task
    slowness: float
    saved_left: int
    turn: int = 0
    finished_s: float | None = None
    ran_s: float = 0.0
    saved_ran_s: float = 0.0
    gpu_s: float = 0.0
    lost_steps: int = 0
    num_moves: int = 0

    @property
    def in_time(self) -> bool:
        """It ended by its deadline."""
        return self.finished_s is not None and self.finished_s <= self.task.deadline_s + 1e-6

    @property
    def latency_s(self) -> float:
        """From its arrival to its end. ValueError if it has none."""
        if self.finished_s is None:
            raise ValueError(f"request {self.task.id} has not ended")
        return self.finished_s - self.asked.arrived_s

    def charged(self, prices: PriceTable) -> int:
        """Credits, for what was done of it; of the stages after denoising, all if that ended."""
        kind = self.asked.kind
        ended = self.finished_s is not None
        planned = Passes(1, kind.num_steps, kind.num_frames, 1)
        made = kind.num_steps - math.ceil(self.task.steps_left)
        done = planned if ended else Passes(1, made, 0, 0)
        price = quote(
            prices, kind.family, num_frames=kind.num_frames, width=kind.width, height=kind.height
        )
        return charge(price.exact, price.credits, share_done(WorkWeights(), planned, done))


@dataclass(eq=False, slots=True)
class Node:
    """GPUs that share steps, and the requests that were handed to them.

    load_s: GPU-seconds of all of them, on one GPU each; wasted_gpus: since seen_s. It is paid for
    from asked_s on. hung: a step that will not end.
    """

    num_gpus: int
    policy: StepPolicy
    jobs: dict[str, Job] = field(default_factory=dict)
    under_way: dict[str, Step] = field(default_factory=dict)
    load_s: float = 0.0
    is_leaving: bool = False
    is_ready: bool = True
    is_forming: bool = False
    hung: Step | None = None
    seen_s: float = 0.0
    wasted_gpus: int = 0
    asked_s: float = 0.0

    def idle_gpus(self) -> int:
        """Those without a step."""
        return self.num_gpus - sum(step.block.size for step in self.under_way.values())


@dataclass(slots=True)
class History:
    """What happened. busy_s: GPU-seconds of steps; waste_s: of idle GPUs while somebody waited;
    node_s: node-seconds that were paid for.
    """

    jobs: list[Job] = field(default_factory=list)
    end_s: float = 0.0
    busy_s: float = 0.0
    waste_s: float = 0.0
    node_s: float = 0.0
    decisions: list[tuple[int, float]] = field(default_factory=list)
    """Of every question to a policy while a GPU was idle: the requests at the node, and seconds."""

"""How many GPUs work on a request, and on what: the smallest number that meets its deadline.

No torch here: admission, autoscaling and the simulator choose by the same function. Traffic by the
formulas of DSP (arXiv:2403.10266), Ulysses (arXiv:2309.14509) and ring attention
(arXiv:2310.01889), which the tests hold against the bytes that are really sent.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """GPUs by what they share: guidance's texts, then frames or tokens (Ulysses times ring).

    ValueError if both frames and tokens are shared.
    """

    guidance: int = 1
    frames: int = 1
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        if min(self.guidance, self.frames, self.ulysses, self.ring) < 1:
            raise ValueError(f"a plan shares by at least 1: {self}")
        if self.frames > 1 and self.ulysses * self.ring > 1:
            raise ValueError(f"either frames or tokens are shared: {self}")

    @property
    def degree(self) -> int:
        """GPUs in all."""
        return self.guidance * self.frames * self.ulysses * self.ring

    def __str__(self) -> str:
        parts = {
            "guidance": self.guidance,
            "frames": self.frames,
            "ulysses": self.ulysses,
            "ring": self.ring,
        }
        shared = [f"{name} {count}" for name, count in parts.items() if count > 1]
        return " x ".join(shared) or "one GPU"


@dataclass(frozen=True, slots=True)
class FrameShape:
    """A step of a UNet whose attention over time is apart from that over space.

    flops: of all texts. temporal_bytes: the activations that enter runs of temporal blocks, summed,
    of all texts; halo_bytes: what one neighbour is sent; num_collectives: a step's, inside a text.
    """

    num_texts: int
    num_frames: int
    flops: float
    temporal_bytes: float
    halo_bytes: float
    num_collectives: int
    latent_bytes: float


@dataclass(frozen=True, slots=True)
class TokenShape:
    """A step of a transformer that attends over all tokens at once.

    linear_flops and attention_flops: of all texts. activation_bytes: tokens times width times
    bytes a value, of one text.
    """

    num_texts: int
    num_tokens: int
    num_heads: int
    num_layers: int
    linear_flops: float
    attention_flops: float
    activation_bytes: float
    latent_bytes: float


StepShape = FrameShape | TokenShape


@dataclass(frozen=True, slots=True)
class Topology:
    """GPUs in nodes: flops a second each, as reached in practice; bytes a second out of each GPU.

    latency_s and network_latency_s: of one collective inside a node and across nodes.
    """

    gpus_per_node: int
    flops_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float
    network_latency_s: float


# 312 TFLOP/s in bf16 at 45 %; NVLink; 400 Gb/s of EFA a node, shared by 8, at 80 %.
P4D = Topology(8, 0.45 * 312e12, 250e9, 0.8 * 6.25e9, 25e-6, 60e-6)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicted seconds of a step on the slowest rank, and the bytes that it sends."""

    compute_s: float
    communication_s: float
    bytes_sent: float

    @property
    def step_s(self) -> float:
        """Both together."""
        return self.compute_s + self.communication_s


def choose_plan(
    shape: StepShape, gpus: int, topology: Topology, num_steps: int, deadline_s: float
) -> ParallelPlan:
    """The least GPUs whose num_steps end within deadline_s, or the fastest plan if none do."""
    ranked = sorted(
        plans(shape, gpus, topology),
        key=lambda plan: (plan.degree, predict_step(shape, plan, topology).step_s),
    )
    for plan in ranked:
        if num_steps * predict_step(shape, plan, topology).step_s <= deadline_s:
            return plan
    return min(ranked, key=lambda plan: predict_step(shape, plan, topology).step_s)


def quickest_plans(
    shape: StepShape, gpus: int, topology: Topology, degrees: Collection[int] | None = None
) -> dict[int, ParallelPlan]:
    """The quickest plan of every degree, or of those named; ValueError if there is none."""
    quickest: dict[int, ParallelPlan] = {}
    for plan in plans(shape, gpus, topology):
        if degrees is not None and plan.degree not in degrees:
            continue
        best = quickest.get(plan.degree, plan)
        quickest[plan.degree] = min(
            (best, plan), key=lambda plan: predict_step(shape, plan, topology).step_s
        )
    if not quickest:
        raise ValueError(f"no plan for {gpus} ranks has a degree of {degrees}")
    return quickest


def plans(shape: StepShape, gpus: int, topology: Topology) -> Iterator[ParallelPlan]:
    """Every plan for up to that many GPUs.

    Guidance's texts are shared before anything else, since they meet only once a step. All-to-alls
    stay inside a node; a ring goes across nodes, or stands in where heads do not divide, since
    nobody has measured here how much of its traffic the attention hides.
    """
    node = topology.gpus_per_node
    texts = min(shape.num_texts, gpus)
    if texts > 1:
        yield ParallelPlan()  # sharing the texts is what the others begin with
    if isinstance(shape, FrameShape):
        for frames in range(1, min(node, shape.num_frames, gpus // texts) + 1):
            if node % frames == 0:
                yield ParallelPlan(guidance=texts, frames=frames)
        return
    for ulysses, ring in itertools.product(range(1, node + 1), range(1, gpus // texts + 1)):
        ranks = ulysses * ring
        if texts * ranks > gpus or ulysses > shape.num_heads or node % ulysses:
            continue
        fills_nodes = node % ranks == 0 or ranks % node == 0
        ring_needed = ring == 1 or ranks > node or shape.num_heads % ranks
        if fills_nodes and ring_needed:
            yield ParallelPlan(guidance=texts, ulysses=ulysses, ring=ring)


def predict_step(shape: StepShape, plan: ParallelPlan, topology: Topology) -> StepCost:
    """Seconds of one step, from the work of the rank that has most and what it sends."""
    inside = (
        _predict_frames(shape, plan, topology)
        if isinstance(shape, FrameShape)
        else _predict_tokens(shape, plan, topology)
    )
    if plan.guidance == 1:
        return inside
    crosses = plan.degree > topology.gpus_per_node
    bandwidth = topology.network_bytes_per_s if crosses else topology.node_bytes_per_s
    latency_s = topology.network_latency_s if crosses else topology.latency_s
    sent = shape.latent_bytes * shape.num_texts / plan.guidance * (plan.guidance - 1)
    return StepCost(
        inside.compute_s,
        inside.communication_s + sent / bandwidth + latency_s,
        inside.bytes_sent + sent,
    )


def all_to_all_bytes(activation_bytes: float, num_frames: int, frames: int, ranks: int) -> float:
    """What a rank with `frames` of the frames sends, to space and back, of one activation."""
    to_space = activation_bytes * frames / num_frames * (ranks - 1) / ranks
    back = activation_bytes / ranks * (num_frames - frames) / num_frames
    return to_space + back


def ulysses_bytes(activation_bytes: float, ulysses: int, ranks: int) -> float:
    """What a rank sends for one attention: query, key, value and the result."""
    return 4 * activation_bytes / ranks * (ulysses - 1) / ulysses


def ring_bytes(activation_bytes: float, ring: int, ranks: int) -> float:
    """What a rank passes on for one attention: key and value, at each turn but the last."""
    return 2 * activation_bytes / ranks * (ring - 1)


def _predict_frames(shape: FrameShape, plan: ParallelPlan, topology: Topology) -> StepCost:
    frames = -(-shape.num_frames // plan.frames)
    share = frames / shape.num_frames / plan.guidance
    compute_s = shape.flops * share / topology.flops_per_s
    if plan.frames == 1:
        return StepCost(compute_s, 0.0, 0.0)
    neighbours = 1 if plan.frames == 2 else 2
    of_texts = 1 / plan.guidance
    sent = of_texts * (
        all_to_all_bytes(shape.temporal_bytes, shape.num_frames, frames, plan.frames)
        + neighbours * shape.halo_bytes
    )
    communication_s = sent / topology.node_bytes_per_s + shape.num_collectives * topology.latency_s
    return StepCost(compute_s, communication_s, sent)


def _predict_tokens(shape: TokenShape, plan: ParallelPlan, topology: Topology) -> StepCost:
    """What goes round the ring is hidden behind the attention, as far as that lasts."""
    ranks = plan.ulysses * plan.ring
    texts = shape.num_texts / plan.guidance
    tokens = -(-shape.num_tokens // ranks) / shape.num_tokens
    heads = -(-shape.num_heads // plan.ulysses) / shape.num_heads
    per_s = topology.flops_per_s * plan.guidance
    attention_s = shape.attention_flops * heads / plan.ring / per_s
    compute_s = shape.linear_flops * tokens / per_s + attention_s
    if ranks == 1:
        return StepCost(compute_s, 0.0, 0.0)
    attentions = texts * shape.num_layers
    inside = attentions * ulysses_bytes(shape.activation_bytes, plan.ulysses, ranks)
    across = attentions * ring_bytes(shape.activation_bytes, plan.ring, ranks)
    crosses = ranks > topology.gpus_per_node
    bandwidth = topology.network_bytes_per_s if crosses else topology.node_bytes_per_s
    latency_s = topology.network_latency_s if crosses else topology.latency_s
    hidden_s = attention_s * (plan.ring - 1) / plan.ring
    communication_s = (
        inside / topology.node_bytes_per_s
        + (2 * attentions * topology.latency_s if plan.ulysses > 1 else 0.0)
        + max(0.0, across / bandwidth - hidden_s)
        + attentions * (plan.ring - 1) * latency_s
    )
    return StepCost(compute_s, communication_s, inside + across)

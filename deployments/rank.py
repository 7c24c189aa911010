"""One process of a denoiser's group: its GPU, its copy of the weights, its part of every step."""

import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray

from deployments.worker_log import log_choices
from models.catalog import Model
from models.conditioning import Conditioning
from models.memory import within_memory
from models.request import VideoRequest
from models.tensors import DenoiseState, ParkedState
from parallel.plan import ParallelPlan, StepShape
from parallel.traffic import Traffic

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from models.pausing import PausableStep


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs."""

    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class _Paused:
    """A step of which some sections were made; is_first: whether this rank has to tell of it."""

    model: str
    is_first: bool
    step: "PausableStep[list[DenoiseState]]"


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_group(name: str) -> Callable[[Method], Method]:
    """`ray.method`, whose annotations make methods uncallable outside of an actor."""
    return cast("Callable[[Method], Method]", ray.method(concurrency_group=name))


class Rank:
    """An actor without memory of requests: whatever a step needs comes with the call.

    So any rank can go on with any request, and one that dies takes nothing with it. Only a step
    that has paused is here, and nowhere else, until it has ended or is abandoned.
    """

    def __init__(self, models: list[Model], torch_threads: int | None) -> None:
        import torch

        from models.stages import load_denoiser

        log_choices()
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.denoisers = {model.id: load_denoiser(model) for model in models}
        self.paused: _Paused | None = None

    def load(self, model: Model) -> None:
        """Read a model's weights from local safetensors; OutOfMemory."""
        from models.stages import load_denoiser

        self.denoisers[model.id] = within_memory(model.id, lambda: load_denoiser(model))

    def unload(self, model_id: str) -> None:
        """Give back the memory of a model's weights, if they were read."""
        import torch

        self.denoisers.pop(model_id, None)
        torch.cuda.empty_cache()

    def seat(self) -> Seat:
        """The node and the process."""
        return Seat(ray.get_runtime_context().get_node_id(), os.getpid())

    @_in_group("watch")
    def wait(self) -> None:
        """Never return: whoever waits for this hears at once when the process dies."""
        threading.Event().wait()

    def open_store(self, num_ranks: int) -> tuple[str, int]:
        """Rank 0's: where the others meet it."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()
        self.store: Store = TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def join(
        self, rank: int, num_ranks: int, meeting: tuple[str, int], generation: int, timeout_s: float
    ) -> None:
        """Become a rank of the group's generation; returns when all have.

        meeting: what rank 0's open_store told; of no use where there is only one rank.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        from parallel.mesh import MeshBuilder

        self.rank = rank
        if num_ranks > 1:
            timeout = timedelta(seconds=timeout_s)
            store = self.store if rank == 0 else TCPStore(*meeting, num_ranks, timeout=timeout)
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore(f"generation-{generation}", store),
                rank=rank,
                world_size=num_ranks,
                timeout=timeout,
            )
        self.meshes = MeshBuilder(rank, num_ranks)

    @_in_group("aside")
    def shape(self, request: VideoRequest, num_texts: int) -> StepShape:
        """What a step of the request costs."""
        return self.denoisers[request.model].shape(request, num_texts)

    @_in_group("aside")
    def start(self, request: VideoRequest, conditioning: Conditioning) -> ParkedState:
        """The state before the first step."""
        from models.denoise import park

        denoiser = self.denoisers[request.model]
        return within_memory(request.model, lambda: park(denoiser.start(request, conditioning)))

    @_in_group("aside")
    def batch(self, request: VideoRequest) -> Hashable | None:
        """What requests have in common that may make a step in one."""
        return self.denoisers[request.model].batch(request)

    def step(
        self,
        plan: ParallelPlan,
        ranks: tuple[int, ...],
        num_sections: int,
        requests: list[VideoRequest],
        *held: Conditioning | ParkedState,
    ) -> "tuple[Traffic | ParkedState | None, ...]":
        """One step of each request, shared by these ranks, which are all called alike; or the first
        section of one, which then pauses.

        held: the requests' conditionings, then their states. Answers what was sent, then the new
        states, which only the first of the ranks has, and nobody if it has paused. OutOfMemory:
        what the step had taken is free again.
        """
        from models.denoise import resume
        from models.pausing import PausableStep
        from models.weights import choose_device

        model = requests[0].model
        if self.paused is not None and (self.paused.model == model or num_sections > 1):
            raise RuntimeError(f"a step of {self.paused.model} has paused here")
        denoiser = self.denoisers[model]
        denoiser.use(self.meshes.mesh(plan, ranks))
        conditionings: Any = held[: len(requests)]
        parked: Any = held[len(requests) :]
        is_first = self.rank == ranks[0]

        def make() -> list[DenoiseState]:
            states = [resume(state, choose_device()) for state in parked]
            return denoiser.step_all(requests, conditionings, states)

        if num_sections == 1:
            return self._told(within_memory(model, make), is_first)
        skips = requests[0].skips_guidance(parked[0].step)
        num_blocks = denoiser.num_blocks(requests[0], 1 if skips else conditionings[0].num_texts)
        step = PausableStep(lambda: within_memory(model, make), num_blocks, num_sections)
        self.paused = _Paused(model, is_first, step)
        return self.go_on()

    def go_on(self) -> "tuple[Traffic | ParkedState | None, ...]":
        """The next section of the step that has paused; answers as `step` does."""
        assert self.paused is not None
        paused = self.paused
        if not paused.step.go_on():
            return self.meshes.traffic.take(), None
        self.paused = None
        return self._told(paused.step.result(), paused.is_first)

    def abandon(self) -> None:
        """The rest of the step that has paused is not wanted."""
        paused, self.paused = self.paused, None
        if paused is not None:
            paused.step.abandon()

    def _told(
        self, made: list[DenoiseState], is_first: bool
    ) -> "tuple[Traffic | ParkedState | None, ...]":
        from models.denoise import park

        return self.meshes.traffic.take(), *[park(state) if is_first else None for state in made]

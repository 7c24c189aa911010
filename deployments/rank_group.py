"""The rank actors of one denoiser replica: formed together, ended together, numbered by node."""

import asyncio
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from autoscaling.rank_blocks import Block
from deployments.rank import Rank, Seat
from models.catalog import Model
from models.memory import OutOfMemory
from models.request import VideoRequest
from models.tensors import ParkedState
from parallel.plan import ParallelPlan, StepShape
from parallel.traffic import Traffic

# How long the fellows of a rank that failed may take to fail too.
FELLOWS_S = 2.0
# For what takes a rank no time, however busy its GPU is.
ANSWER_S = 60.0
AGAIN_S = 1.0


class GroupBroken(Exception):
    """A rank died, hung or fell out of step: none of the group can go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the denoiser's ranks cannot go on: {self.reason}"


class SeatsUneven(Exception):
    """The placement group's nodes hold different numbers of ranks."""


@dataclass(frozen=True, slots=True)
class Part:
    """One request's part in a step; the references are to a Conditioning and a ParkedState."""

    request: VideoRequest
    conditioning: "ray.ObjectRef[Any]"
    state: "ray.ObjectRef[Any]"


@dataclass(frozen=True, slots=True)
class Begun:
    """A request before its first step: what a step costs, and one of a single text, whom it may
    share one with, its state.
    """

    shape: StepShape
    of_one_text: StepShape
    batch: Hashable | None
    state: ParkedState


@dataclass(frozen=True, slots=True)
class Made:
    """A step: its parts' states, read and as references, and what every rank sent for it; or one of
    its sections, without a state.
    """

    states: list[ParkedState]
    references: "list[ray.ObjectRef[Any]]"
    traffic: Traffic


class RankGroup:
    """One rank in each bundle of the replica's placement group but the first, which is its own.

    A broken group is never mended: all of its processes end and a new generation forms.
    """

    def __init__(
        self,
        name: str,
        placement_group: PlacementGroup,
        torch_threads: int | None,
        form_timeout_s: float,
    ) -> None:
        # A class of its own shows in `ps` and in Ray's lists whose rank a process is.
        options: dict[str, Any] = {
            "max_restarts": 0,
            "concurrency_groups": {"watch": 1, "aside": 1},
        }
        self.rank_class: Any = ray.remote(**options)(type(f"Rank_{name}", (Rank,), {}))
        self.placement_group = placement_group
        self.bundles = placement_group.bundle_specs[1:]
        if not self.bundles:
            raise ValueError("placement_group_bundles needs one bundle for each rank after the own")
        self.models: dict[str, Model] = {}
        self.torch_threads = torch_threads
        self.form_timeout_s = form_timeout_s
        self.generation = 0
        self.ranks: list[Any] = []
        self.seats: list[Seat] = []

    @property
    def size(self) -> int:
        """Ranks in all."""
        return len(self.bundles)

    @property
    def ranks_per_node(self) -> int:
        """The same on every node."""
        return self.size // len({seat.node for seat in self.seats})

    async def form(self) -> None:
        """End what there is and start a new generation; GroupBroken says why it does not form."""
        self.end()
        hindrance: Exception | None = None
        try:
            async with asyncio.timeout(self.form_timeout_s):
                while (hindrance := await self._form_once()) is not None:
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError as error:
            self.end()
            state = placement_group_table(self.placement_group)["state"]
            reason = f"after {self.form_timeout_s:g} s its placement group is {state}"
            if hindrance is not None:
                reason += f", and at last {hindrance!r}"
            raise GroupBroken(f"generation {self.generation} did not form: {reason}") from error
        except (RayError, SeatsUneven) as error:
            self.end()
            raise GroupBroken(f"generation {self.generation} did not form: {error!r}") from error

    async def _form_once(self) -> RayActorError | None:
        """What hindered it, if that may pass: a node is lost, and Ray has yet to notice."""
        self.generation += 1
        self.ranks = [self._spawn(index) for index in range(self.size)]
        try:
            await self._take_seats()
            await self._meet()
        except RayActorError as error:
            if error.actor_init_failed:
                raise
            self.end()
            return error
        return None

    def end(self) -> None:
        """Kill every rank."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def _spawn(self, index: int) -> Any:
        bundle = dict(self.bundles[index])
        strategy = PlacementGroupSchedulingStrategy(
            self.placement_group, placement_group_bundle_index=index + 1
        )
        return self.rank_class.options(
            num_cpus=bundle.pop("CPU", 0),
            num_gpus=bundle.pop("GPU", 0),
            resources=bundle,
            scheduling_strategy=strategy,
        ).remote(list(self.models.values()), self.torch_threads)

    async def _take_seats(self) -> None:
        """Number the ranks by node: neighbours share one, as Ulysses and every small block need."""
        seats = await asyncio.gather(*[rank.seat.remote() for rank in self.ranks])
        order = sorted(range(self.size), key=lambda index: (seats[index].node, index))
        self.ranks = [self.ranks[index] for index in order]
        self.seats = [seats[index] for index in order]
        on_nodes = Counter(seat.node for seat in self.seats)
        if len(set(on_nodes.values())) > 1:
            raise SeatsUneven(on_nodes)

    async def _meet(self) -> None:
        meeting = await self.ranks[0].open_store.remote(self.size) if self.size > 1 else ("", 0)
        joined = [
            rank.join.remote(number, self.size, meeting, self.generation, self.form_timeout_s)
            for number, rank in enumerate(self.ranks)
        ]
        await asyncio.gather(*joined)

    async def death(self) -> set[int]:
        """Return when ranks have died, with their numbers."""
        waits = {asyncio.ensure_future(rank.wait.remote()): n for n, rank in enumerate(self.ranks)}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return {waits[future] for future in done if future.exception()}
        finally:
            for future in waits:
                future.cancel()

    async def load(self, model: Model) -> None:
        """Have every rank read a model's weights, between steps. GroupBroken if some do not."""
        await self._answers(self.form_timeout_s, *[rank.load.remote(model) for rank in self.ranks])
        self.models[model.id] = model

    async def unload(self, model_id: str) -> None:
        """Have every rank forget a model."""
        self.models.pop(model_id, None)  # whoever joins from now on does not read it either
        forget = [rank.unload.remote(model_id) for rank in self.ranks]
        await self._answers(ANSWER_S, *forget)

    async def begin(
        self, request: VideoRequest, num_texts: int, conditioning: "ray.ObjectRef[Any]"
    ) -> Begun:
        """What there is to know before a request's first step; GroupBroken."""
        first = self.ranks[:1]
        asked = [rank.shape.remote(request, num_texts) for rank in first]
        asked += [rank.shape.remote(request, 1) for rank in first]
        asked += [rank.batch.remote(request) for rank in first]
        asked += [rank.start.remote(request, conditioning) for rank in first]
        return Begun(*await self._answers(ANSWER_S, *asked))

    async def _answers(self, timeout_s: float, *asked: "ray.ObjectRef[Any]") -> list[Any]:
        """Of ranks, outside of steps; what they raised, or GroupBroken if there is no answer."""
        if not asked:
            raise GroupBroken("it is forming again")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*asked)
        except TimeoutError as error:
            raise GroupBroken(f"a rank has not answered for {timeout_s:g} s") from error
        except RayActorError as error:
            raise GroupBroken("a rank died") from error

    async def step(
        self,
        parts: list[Part],
        plan: ParallelPlan,
        block: Block,
        timeout_s: float,
        num_sections: int = 1,
    ) -> Made:
        """One step of each part by a block of ranks; or the first section of a step, after which
        it has no state yet.

        OutOfMemory if every rank of the block lacked it. GroupBroken for anything else: a rank
        that has raised what it does not know is not trusted with another step.
        """
        requests = [part.request for part in parts]
        held = [*[part.conditioning for part in parts], *[part.state for part in parts]]
        calls = []
        for number in block.ranks:
            step = self.ranks[number].step.options(num_returns=1 + len(parts))
            calls.append(step.remote(plan, block.ranks, num_sections, requests, *held))
        return await self._made(calls, block, timeout_s)

    async def go_on(self, block: Block, timeout_s: float) -> Made:
        """The next section of the step that has paused there; as `step`."""
        step = [self.ranks[number].go_on.options(num_returns=2) for number in block.ranks]
        return await self._made([call.remote() for call in step], block, timeout_s)

    def abandon(self, block: Block) -> None:
        """Forget the step that has paused there, before anything else is asked of these ranks."""
        for number in block.ranks:
            self.ranks[number].abandon.remote()

    async def _made(
        self, calls: "list[list[ray.ObjectRef[Any]]]", block: Block, timeout_s: float
    ) -> Made:
        total = Traffic()
        for traffic in await self._agree([call[0] for call in calls], block, timeout_s):
            total.calls.update(traffic.calls)
            total.bytes_sent.update(traffic.bytes_sent)
        references = calls[0][1:]
        try:
            async with asyncio.timeout(timeout_s):
                told = await asyncio.gather(*references)
        except (TimeoutError, RayError) as error:  # the node where they were made is lost
            raise GroupBroken(f"what {block} made is lost") from error
        return Made([state for state in told if state is not None], references, total)

    async def _agree(
        self, calls: "list[ray.ObjectRef[Any]]", block: Block, timeout_s: float
    ) -> list[Traffic]:
        """What every rank answers. If some fail and others don't, the group is out of step."""
        told = [asyncio.ensure_future(call) for call in calls]
        done, late = await asyncio.wait(
            told, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        if late and any(future.exception() for future in done):
            # The others fail alike, or wait for ever for the one that has.
            done, late = await asyncio.wait(told, timeout=FELLOWS_S)
        for future in late:
            future.cancel()
        errors = [error for future in done if (error := future.exception())]
        if dead := [error for error in errors if isinstance(error, RayActorError)]:
            raise GroupBroken(f"a rank of {block} died") from dead[0]
        causes = [getattr(error, "cause", None) for error in errors]
        lacks = [cause for cause in causes if isinstance(cause, OutOfMemory)]
        if len(lacks) == len(told):
            raise lacks[0]
        if errors:
            raise GroupBroken(f"{block} is out of step: {errors[0]!r}") from errors[0]
        if late:
            raise GroupBroken(f"{len(late)} of {block} hang: no end after {timeout_s:.1f} s")
        return [future.result() for future in told]

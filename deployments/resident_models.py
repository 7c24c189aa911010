"""Which models' weights a denoiser's ranks hold: as many as fit, by Serve's multiplexing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol

from ray import serve

from deployments.rank_group import GroupBroken
from models.catalog import Model


class ModelTooLarge(Exception):
    """A model's weights alone exceed the memory that models may take."""

    def __init__(self, model: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(model, size_bytes, limit_bytes)
        self.model, self.size_bytes, self.limit_bytes = model, size_bytes, limit_bytes

    def __str__(self) -> str:
        return (
            f"{self.model}: its denoiser takes {self.size_bytes} bytes, "
            f"denoiser.model_memory_bytes allows {self.limit_bytes}"
        )


def how_many_fit(models: list[Model], limit_bytes: int | None) -> int:
    """So many of the models fit whichever they are; ModelTooLarge if one alone does not."""
    if limit_bytes is None or not models:
        return len(models)
    sizes = sorted(((model.denoiser_bytes, model.id) for model in models), reverse=True)
    if sizes[0][0] > limit_bytes:
        raise ModelTooLarge(sizes[0][1], sizes[0][0], limit_bytes)
    total = count = 0
    for size_bytes, _ in sizes:
        total += size_bytes
        count += total <= limit_bytes
    return count


class Resident:
    """One model on the ranks. Serve awaits `__del__` when the model is to make room.

    As an attribute, since Python's own garbage collection must not call it.
    """

    def __init__(self, leave: Callable[["Resident"], Awaitable[None]]) -> None:
        self.leave = leave
        self.num_users = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.__del__ = self._leave

    async def _leave(self) -> None:
        await self.leave(self)


class Ranks(Protocol):
    """What holds the weights."""

    async def load(self, model: Model) -> None:
        """Read a model's."""

    async def unload(self, model_id: str) -> None:
        """Forget a model's."""


class ResidentModels:
    """The least recently used model makes room, once none of its requests is here any more.

    Whoever waits for the change may leave: Serve then forgets both models, but the change goes on
    to its end and the next one waits for it. So memory holds what Serve says, or less.
    """

    def __init__(self, ranks: Ranks, models: list[Model], limit_bytes: int | None) -> None:
        self.ranks = ranks
        self.leaving: set[asyncio.Task[None]] = set()
        by_id = {model.id: model for model in models}
        self.preloaded = [model.id for model in models[: how_many_fit(models, limit_bytes)]]

        async def load(model_id: str) -> Resident:
            return await self._load(by_id[model_id])

        self.load: Any = serve.multiplexed(max_num_models_per_replica=len(self.preloaded))(load)

    async def _load(self, model: Model) -> Resident:
        while self.leaving:
            await asyncio.wait(self.leaving)
        resident = Resident(lambda leaver: self._see_off(model.id, leaver.idle.wait()))
        loading = asyncio.create_task(self.ranks.load(model))
        try:
            await asyncio.shield(loading)
        except BaseException:
            # Some ranks have it, or will have it, and Serve does not count it.
            self._spawn(self._unload(model.id, asyncio.wait([loading])))
            raise
        return resident

    async def _see_off(self, model_id: str, when: Awaitable[Any]) -> None:
        await asyncio.shield(self._spawn(self._unload(model_id, when)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self.leaving.add(task)
        task.add_done_callback(self.leaving.discard)
        return task

    async def _unload(self, model_id: str, when: Awaitable[Any]) -> None:
        await when
        with contextlib.suppress(GroupBroken):  # the next generation does not read it any more
            await self.ranks.unload(model_id)

    async def preload(self) -> None:
        """As many as fit, in the configuration's order."""
        for model_id in self.preloaded:
            await self.load(model_id)

    @contextlib.asynccontextmanager
    async def use(self, model_id: str) -> AsyncIterator[None]:
        """Have the model on the ranks until the block is left."""
        resident: Resident = await self.load(model_id)
        resident.num_users += 1
        resident.idle.clear()
        try:
            yield
        finally:
            resident.num_users -= 1
            if not resident.num_users:
                resident.idle.set()

"""A step that pauses between two blocks of its model, so that another model's step is made first.

The step has a thread of its own, which stands still meanwhile: it goes on with all that it had, to
the same bits. What it changed of its model's modules stays changed, so that nothing else may be
made with that model until it has ended.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import nn

from models.attention import attention_kernels, use_attention_kernels
from models.compute import StepAbandoned

T = TypeVar("T")

_here = threading.local()


def let_pause(blocks: Iterable[nn.Module]) -> None:
    """After each of these modules a PausableStep that runs through it may pause."""
    for block in blocks:
        block.register_forward_hook(_pass)


def _pass(_block: nn.Module, _args: object, _output: object) -> None:
    step: PausableStep[object] | None = getattr(_here, "step", None)
    if step is not None:
        step.pass_block()


class PausableStep(Generic[T]):
    """An act in so many sections, each of which is made by `go_on`."""

    def __init__(self, act: Callable[[], T], num_blocks: int, num_sections: int) -> None:
        """num_blocks: how many of those given to `let_pause` the act runs through."""
        self.act = act
        self.num_blocks, self.num_sections = num_blocks, num_sections
        self.num_passed = 0
        self.is_abandoned = False
        self.may_go_on, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name="step", daemon=True)
        self.made: list[T] = []
        self.error: BaseException | None = None
        self.has_ended = False
        self.kernels = attention_kernels()

    def go_on(self) -> bool:
        """Run to the next pause, or to the end; whether that was the end."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.may_go_on.release()
        self.stands.acquire()
        return self.has_ended

    def result(self) -> T:
        """What the act returned, or raised; once."""
        self.thread.join()
        error, self.error = self.error, None
        if error is None:
            return self.made.pop()
        try:
            raise error
        finally:
            del error  # whose traceback has this frame, and so would keep all that the act had

    def abandon(self) -> None:
        """End it where it stands; all that it had taken is free again."""
        if not self.has_ended:
            self.is_abandoned = True
            self.go_on()
        self.thread.join()
        self.error = None
        self.made.clear()

    def pass_block(self) -> None:
        """Called in its own thread, behind a block: pause, if a section ends here."""
        sections = self.num_passed * self.num_sections // self.num_blocks
        self.num_passed += 1
        ends = self.num_passed * self.num_sections // self.num_blocks > sections
        if ends and self.num_passed < self.num_blocks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # else its kernels would still be queued before another's
            within = attention_kernels()
            use_attention_kernels(self.kernels)  # they are the process's, not the thread's
            self.stands.release()
            self.may_go_on.acquire()
            use_attention_kernels(within)
            if self.is_abandoned:
                raise StepAbandoned

    def _run(self) -> None:
        _here.step = self
        try:
            self.made.append(self.act())
        except BaseException as error:  # result() raises it where it is asked for
            self.error = error
        finally:
            del self.act, _here.step
            self.has_ended = True
            self.stands.release()

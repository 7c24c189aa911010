"""LoRAs on a text encoder: for the texts of one request at a time, whichever thread asks."""

import contextlib
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence

from torch import nn

from models.lora import Lora
from models.lora_layers import Half, LoraLayers
from models.request import LoraUse


class TextLoras:
    """Those of a model's LoRAs that have layers of its text encoder."""

    def __init__(self, text_encoder: nn.Module, loras: Iterable[Lora]) -> None:
        """LoraDoesNotFit."""
        self.layers = LoraLayers(text_encoder, loras, Half.TEXT)
        self.lock = threading.Lock()

    def key(self, wanted: Sequence[LoraUse]) -> Hashable:
        """What else than the text tells two encoded texts apart."""
        return tuple(use for use in wanted if use.name in self.layers.changed_by)

    @contextlib.contextmanager
    def used(self, wanted: Sequence[LoraUse]) -> Iterator[None]:
        """Until the block is left; others wait, if there are any to be told apart."""
        if not self.layers.changed_by:
            yield
            return
        with self.lock:
            self.layers.use(wanted)
            yield

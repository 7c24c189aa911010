"""Which tiers have the memory for a request, asked before anything is reserved for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoscaling.tiers import GpuTier, ServedOn
from models.catalog import Model
from models.compute import Compute
from models.cost import VideoShape
from models.fit import Gpus, decode_footprint, denoise_footprint
from models.request import InvalidRequest, VideoRequest
from parallel.plan import P4D, plans


@dataclass(frozen=True, slots=True)
class TierRoom:
    """A tier's GPUs; degrees: those allowed, None: any; resident: what the weights of its other
    models' denoisers may take of each GPU, decoders: those of their decoders; decoder_beside:
    whether a decoder shares a GPU with a denoiser; max_batch: how many requests may share a step;
    tiled_above: frames of more pixels are decoded in tiles, None: those that fit no other way.
    """

    gpus: Gpus
    degrees: tuple[int, ...] | None = None
    resident: float = 0.0
    decoders: float = 0.0
    decoder_beside: bool = False
    max_batch: int = 1
    tiled_above: int | None = None

    def degrees_for(self, model: Model, request: VideoRequest) -> list[int]:
        """Those at which a step fits."""
        allowed = [
            degree
            for degree in _degrees(model, request, self.gpus.count)
            if self.degrees is None or degree in self.degrees
        ]
        left, dtype = self.gpus.usable - self.resident, self.gpus.dtype
        if self.decoder_beside:
            left -= self._decode(model, request)
        return [
            degree
            for degree in allowed
            if denoise_footprint(model, request, degree, dtype, self.max_batch).total <= left
        ]

    def decodes(self, model: Model, request: VideoRequest) -> bool:
        """Whether the frames can be decoded."""
        return self._decode(model, request) <= self.gpus.usable

    def tiles(self, model: Model, request: VideoRequest) -> bool:
        """Whether its frames are decoded in tiles."""
        if not model.spec.in_tiles:
            return False
        if self.tiled_above is not None:
            return request.width * request.height > self.tiled_above
        return self._decoding(model, request, in_tiles=False) > self.gpus.usable

    def _decode(self, model: Model, request: VideoRequest) -> float:
        """Bytes of a decoder at work."""
        return self._decoding(model, request, in_tiles=self.tiles(model, request))

    def _decoding(self, model: Model, request: VideoRequest, *, in_tiles: bool) -> float:
        own = decode_footprint(model, request, self.gpus.dtype, in_tiles=in_tiles)
        return own.total + self.decoders


@dataclass(frozen=True, slots=True)
class Room:
    """Of one model, on the tiers whose memory is known; the others have room for everything."""

    model: Model
    tiers: Mapping[GpuTier, TierRoom]

    def fits(self, request: VideoRequest, served: ServedOn) -> bool:
        """Whether that tier's ranks and decoders can make it."""
        tier = self.tiers.get(served.tier)
        if tier is None:
            return True
        model = replace(self.model, compute=Compute(weights=served.storage))
        return bool(tier.degrees_for(model, request)) and tier.decodes(model, request)

    def refuse(self, request: VideoRequest, served_on: Iterable[ServedOn]) -> InvalidRequest:
        """Why none of these tiers makes it, and the largest like it that one would."""
        tiers = list(served_on)
        size, frames = f"{request.width}x{request.height}", request.num_frames

        def fits(**changes: int) -> bool:
            smaller = request.model_copy(update=changes)
            area = smaller.width * smaller.height
            takers = [t for t in tiers if t.max_area is None or area <= t.max_area]
            return any(self.fits(smaller, served) for served in takers)

        message = f"{frames} frames of {size} do not fit into the memory of a GPU that is for them"
        multiple = self.model.spec.size_multiple
        for sixteenth in range(15, 0, -1):
            width, height = (
                side * sixteenth // 16 // multiple * multiple
                for side in (request.width, request.height)
            )
            if min(width, height) >= multiple and fits(width=width, height=height):
                message += f"; so many of {width}x{height} would"
                break
        least, most = self.model.min_frames(request), frames
        if not fits(num_frames=least):
            return InvalidRequest("size", message)
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(num_frames=middle) else (least, middle)
        return InvalidRequest("num_frames", f"{message}; of {size} the most are {least} frames")


def _degrees(model: Model, request: VideoRequest, count: int) -> list[int]:
    """Of the plans that so many GPUs have for a request of its family."""
    if count == 1:
        return [1]
    shape = VideoShape.of(request).step(request.family, model.spec)
    topology = replace(P4D, gpus_per_node=count)
    return sorted({plan.degree for plan in plans(shape, count, topology)})

"""Where each of several texts has a say: regions of the picture, runs of frames, or both.

As InvokeAI's regional prompting has it: an image token sees all of the image and its own texts, a
text itself and its own image tokens; the first text has what no other has. So it is in every other
layer; in those between, all see all.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.catalog import TOKENS_PADDED_TO
from models.conditioning import TextPlaces
from models.request import Region, VideoRequest
from models.spec import FamilySpec
from models.start_image import pad_pixels
from parallel.restriction import Restriction, Sight


def token_places(
    spec: FamilySpec, request: VideoRequest, masks: NDArray[np.bool_] | None, patch_size: int
) -> NDArray[np.bool_]:
    """bool [R, f, h, w]: which of the transformer's tokens are in which region of the request.

    masks: [M, F or 1, H, W] in pixels of the video, of the regions that have one, in order. A token
    is in a region if the pixel in its middle is, in any frame that it is of.
    """
    latent_frames, latent_height, latent_width = spec.latent_size(request)
    height, width = latent_height // patch_size, latent_width // patch_size
    rows = _middles(height, request.height, spec.generated_size(request.width, request.height)[1])
    columns = _middles(width, request.width, spec.generated_size(request.width, request.height)[0])
    frames = _first_frames(spec, request, latent_frames, request.f_patch_size)
    places = np.zeros((len(request.regions), len(frames), height, width), bool)
    left = list(() if masks is None else masks)
    for place, region in zip(places, request.regions, strict=True):
        inside = _pixels_of(region, request, left.pop(0) if region.has_mask else None)
        inside = inside[:, rows][:, :, columns]
        for token, (first, last) in enumerate(frames):
            place[token] = inside[first:last].any(axis=0)
    return places


def latent_mask(
    spec: FamilySpec, request: VideoRequest, pictures: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """uint8 [F or 1, H, W, 3] -> [f, h, w] in 0..1, the greatest of what each latent is of."""
    latent_frames, latent_height, latent_width = spec.latent_size(request)
    light = pad_pixels(pictures, spec.generated_size(request.width, request.height)).max(axis=3)
    frames, height, width = len(light), light.shape[1], light.shape[2]
    cells = light.reshape(
        frames, latent_height, height // latent_height, latent_width, width // latent_width
    ).max(axis=(2, 4))
    if frames == 1:
        cells = np.repeat(cells, request.num_frames, axis=0)
    runs = _first_frames(spec, request, latent_frames, f_patch_size=1)
    by_latent = np.stack([cells[first:last].max(axis=0) for first, last in runs])
    return by_latent.astype(np.float32) / 255.0


def each_frame(places: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A region for each token's frames but the first, which the first text has."""
    _, frames, height, width = places.shape
    by_frame = np.eye(frames, dtype=bool)[1:, :, None, None]
    return np.broadcast_to(by_frame, (frames - 1, frames, height, width)).copy()


def restrict(places: TextPlaces, num_text: int, device: torch.device) -> Restriction:
    """Who sees whom in Z-Image's sequence: the image's tokens, then num_text of the texts'."""
    num_image = places.tokens[0].size
    padded = -(-num_image // TOKENS_PADDED_TO) * TOKENS_PADDED_TO
    end = padded + -(-num_text // TOKENS_PADDED_TO) * TOKENS_PADDED_TO
    starts = padded + np.cumsum([0, *places.lengths])
    texts = [np.arange(start, stop) for start, stop in pairwise(starts)]
    # the padding of the texts goes with the first, that of the image with what is in no region
    texts[0] = np.concatenate([texts[0], np.arange(starts[-1], end)])
    regions = [np.flatnonzero(tokens) for tokens in places.tokens]
    in_none = ~places.tokens.any(axis=0)
    background = np.concatenate([np.flatnonzero(in_none), np.arange(num_image, padded)])
    image = np.arange(padded)
    sights = [(image, image)]
    for seen, text in zip([background, *regions], texts, strict=True):
        sights += [(seen, text), (text, np.concatenate([seen, text]))]
    return Restriction([Sight(_tensor(q, device), _tensor(k, device)) for q, k in sights])


def _tensor(places: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(places).to(device)


def _pixels_of(
    region: Region, request: VideoRequest, mask: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """[F, H, W]"""
    shape = (request.num_frames, request.height, request.width)
    inside = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    if region.box is not None:
        x, y, width, height = region.box
        outside = np.ones(shape[1:], bool)
        outside[y : y + height, x : x + width] = False
        inside[:, outside] = False
    if region.frames is not None:
        first, last = region.frames
        inside[:first], inside[last + 1 :] = False, False
    return inside


def _middles(count: int, asked: int, generated: int) -> NDArray[np.int64]:
    """The asked pixels in the middle of each token; what is generated beyond them is their edge."""
    size = generated // count
    middles = np.arange(count) * size + size // 2 - (generated - asked) // 2
    return np.clip(middles, 0, asked - 1)


def _first_frames(
    spec: FamilySpec, request: VideoRequest, latent_frames: int, f_patch_size: int
) -> list[tuple[int, int]]:
    """The frames first..last-1 that each patch is of; those beyond the last frame are as that."""
    found = []
    for token in range(latent_frames // f_patch_size):
        first_latent = token * f_patch_size
        first = max(0, (first_latent - 1) * spec.frame_stride + 1)
        last = (first_latent + f_patch_size - 1) * spec.frame_stride + 1
        first = min(first, request.num_frames - 1)
        found.append((first, max(first + 1, min(last, request.num_frames))))
    return found

"""What skipped passes cost in quality: the same videos with all passes and without, compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.catalog import MeasuredSkipping, Model, add_to_manifest, read_manifest, way_of
from models.denoise import denoise
from models.request import InvalidRequest
from models.stages import load_decoder, load_denoiser, load_encoder

# Frames that are the same to the last bit have no noise to speak of.
MOST_DB = 100.0


class SkippingQuality:
    """The stages of a model in this process."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.encoder = load_encoder(model)
        self.denoiser = load_denoiser(model)
        self.decoder = load_decoder(model)

    def measure(
        self, requests: Sequence[dict[str, Any]], way: dict[str, Any], image: bytes | None = None
    ) -> MeasuredSkipping:
        """requests: fields of as many steps each, the seed among them; way: how passes are skipped.

        image: the start image of all, a PNG of the size. InvalidRequest.
        """
        if not requests or not way:
            raise InvalidRequest(None, "nothing to measure: no requests, or nothing is skipped")
        found, skipped = [], 0
        for fields in requests:
            whole, _ = self._make(fields, image)
            pixels, without = self._make({**fields, **way}, image)
            found.append(psnr_db(pixels, whole))
            skipped += without
        request = self.model.resolve({**requests[0], **way})
        planned = len(requests) * request.planned_passes
        return MeasuredSkipping(
            step_cache=request.step_cache,
            cfg_skip_ratio=request.cfg_skip_ratio,
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
            f_patch_size=request.f_patch_size,
            scheduler=request.scheduler,
            num_videos=len(found),
            psnr_db=round(float(np.mean(found)), 2),
            min_psnr_db=round(min(found), 2),
            passes_made=round(1 - skipped / planned, 4),
        )

    def _make(self, fields: dict[str, Any], image: bytes | None) -> tuple[NDArray[np.uint8], int]:
        """Frames [F, H, W, 3], and how many passes were skipped."""
        request = self.model.resolve(fields)
        self.model.check_inputs(start_image=image is not None)
        conditioning = self.encoder.encode(request, image)
        *_, last = denoise(self.denoiser, request, conditioning)
        runs = self.decoder.decode(request, last.latents.cpu().numpy())
        return np.concatenate([run.pixels for run in runs]), last.skipped


def psnr_db(pixels: NDArray[np.uint8], whole: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all frames, at most MOST_DB."""
    difference = pixels.astype(np.float64) - whole
    mean_square = float(np.mean(difference**2))
    return MOST_DB if mean_square == 0 else min(MOST_DB, 10 * np.log10(255.0**2 / mean_square))


def write_measured(folder: Path, measured: MeasuredSkipping) -> None:
    """Put it into the folder's manifest, in place of what was measured of the same way before."""
    kept = [old for old in read_manifest(folder).skipping if way_of(old) != way_of(measured)]
    rows = [row.model_dump(mode="json", exclude_none=True) for row in (*kept, measured)]
    add_to_manifest(folder, skipping=rows)

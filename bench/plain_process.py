"""The other side of `bench.cluster_tax`: the same videos in one plain process.

It makes one video for each line that it is sent, and answers with what that one cost.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from media.encode import Mp4Encoder
from models.catalog import load_model
from models.denoise import denoise
from models.stages import load_decoder, load_denoiser, load_encoder


def cpu_s() -> float:
    """User + system seconds of this process and of ffmpeg."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    folder, fields, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    given = {**json.loads(fields)}
    given.pop("model", None)
    if "size" in given:
        given["width"], given["height"] = map(int, given.pop("size").split("x"))
    model = load_model(Path(folder))
    request = model.resolve(given)
    encoder, denoiser, decoder = load_encoder(model), load_denoiser(model), load_decoder(model)
    with tempfile.TemporaryDirectory() as out:
        for index, _ in enumerate(sys.stdin):
            before_cpu_s, before_s = cpu_s(), time.monotonic()
            conditioning = encoder.encode(request, None)
            *_, last = denoise(denoiser, request, conditioning)
            size = {"width": request.width, "height": request.height}
            path = Path(out) / f"{index}.mp4"
            with Mp4Encoder(path, **size, fps=request.fps, threads=1) as mp4:
                for frames in decoder.decode(request, last.latents.numpy()):
                    mp4.write(frames)
                mp4.finish()
            cost = {"cpu_s": cpu_s() - before_cpu_s, "wall_s": time.monotonic() - before_s}
            print(json.dumps(cost), flush=True)


if __name__ == "__main__":
    main()

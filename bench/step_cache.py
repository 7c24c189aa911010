"""What skipped passes save and cost, on the demo model: by way and threshold.

Every row makes the same videos (held-out prompts, both seeds and words fixed) in one process, all
ways in turns; PSNR is of the frames against those with all passes. `right`: the videos whose
colour, motion and shape are right in every frame.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.generator import Generator, make_prompts
from bench.machine import describe_machine
from models.skipping_quality import psnr_db
from training.attributes import score

NOTHING: dict[str, Any] = {}
WAYS: dict[str, dict[str, Any]] = {
    "all passes": NOTHING,
    **{
        f"{by}, {threshold:g}": {"step_cache": {"by": by, "threshold": threshold}}
        for by, thresholds in (
            ("prediction", (0.02, 0.05, 0.1, 0.2)),
            ("first_block", (0.05, 0.1, 0.2, 0.4)),
        )
        for threshold in thresholds
    },
    "prediction, 0.1, warm_up 2": {
        "step_cache": {"by": "prediction", "threshold": 0.1, "warm_up": 2}
    },
    "cfg_skip_ratio, 0.25": {"cfg_skip_ratio": 0.25},
    "cfg_skip_ratio, 0.5": {"cfg_skip_ratio": 0.5},
    "prediction, 0.1 and 0.25": {
        "step_cache": {"by": "prediction", "threshold": 0.1},
        "cfg_skip_ratio": 0.25,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_cache", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(describe_machine())
    generator = Generator(arguments.model)
    prompts = make_prompts(True, arguments.prompts, 1)
    rows: dict[str, dict[str, list[float]]] = {
        name: {"made": [], "seconds": [], "psnr_db": [], "right": []} for name in WAYS
    }
    for prompt in prompts:
        whole = None
        for name, way in WAYS.items():
            began_s = time.process_time()
            made = generator.make({**prompt.fields, "num_steps": arguments.steps, **way})
            row = rows[name]
            row["seconds"].append(time.process_time() - began_s)
            whole = made.pixels if whole is None else whole
            row["made"].append(1 - made.skipped / made.planned)
            row["psnr_db"].append(psnr_db(made.pixels, whole))
            wanted = prompt.combination
            found = score(made.pixels, wanted.colour, wanted.shape, wanted.motion)
            row["right"].append(float(found.colour and found.motion and found.shape))
    header = f"{'':26}{'passes':>8}{'CPU-s':>8}{'PSNR':>8}{'least':>8}{'right':>8}"
    print(f"{header}   ({arguments.prompts} videos of {arguments.steps} steps)")
    result = {}
    for name, row in rows.items():
        figures = {
            "passes_made": round(float(np.mean(row["made"])), 3),
            "cpu_s": round(float(np.median(row["seconds"])), 3),
            "psnr_db": round(float(np.mean(row["psnr_db"])), 1),
            "min_psnr_db": round(min(row["psnr_db"]), 1),
            "right": round(float(np.mean(row["right"])), 3),
        }
        result[name] = figures
        print(
            f"{name:26}{figures['passes_made']:8.1%}{figures['cpu_s']:8.2f}"
            f"{figures['psnr_db']:8.1f}{figures['min_psnr_db']:8.1f}{figures['right']:8.1%}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The tables of `bench.scheduling` as pictures: `python -m bench.scheduling_plots FILE...`.

Each file holds what that command printed; its last line is read.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

OURS, OTHERS = "#1f6f5c", "#b9b4a7"
WORKLOADS = ("W1", "W2", "W5", "W5-bursts", "W7", "W1-40GB")


def plot_nodes(result: dict[str, Any], folder: str) -> None:
    """In time, by policy, one panel a workload: `scheduling.png`."""
    workloads = [name for name in WORKLOADS if name in result]
    if not workloads:
        return
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(3.6 * len(workloads), 4.6), squeeze=False
    )
    for panel, workload in zip(panels[0], workloads, strict=True):
        rows = result[workload]
        policies = sorted(rows, key=lambda policy: rows[policy]["weighted"])
        shares = [rows[policy]["weighted"] for policy in policies]
        colours = [OURS if policy.startswith("guaranteed") else OTHERS for policy in policies]
        panel.barh(range(len(policies)), shares, color=colours)
        panel.set_yticks(range(len(policies)), policies)
        panel.tick_params(labelsize=7)
        panel.set_xlim(0, 1.14)
        panel.set_title(f"{workload}: in time, by plan", fontsize=9)
        for position, share in enumerate(shares):
            panel.text(share + 0.01, position, f"{share:.2f}", va="center", fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(folder) / "scheduling.png", dpi=110)
    plt.close(figure)


def plot_days(result: dict[str, Any], folder: str) -> None:
    """Node-hours over those of the work, against the share in time: `scaling.png`."""
    days = result.get("days", {})
    if not days:
        return
    figure, panels = plt.subplots(1, len(days), figsize=(5.4 * len(days), 3.8), squeeze=False)
    for panel, (day, rows) in zip(panels[0], days.items(), strict=True):
        by_cost = sorted(rows.items(), key=lambda entry: entry[1]["over_bound"])
        for number, (scaler, row) in enumerate(by_cost):
            colour = OURS if scaler == "by-demand" else OTHERS
            panel.scatter(row["over_bound"], row["attainment"], color=colour, zorder=3)
            panel.annotate(
                scaler, (row["over_bound"], row["attainment"]), fontsize=7,
                xytext=(4, (-8, 5)[number % 2]), textcoords="offset points",
            )  # fmt: skip
        panel.set_xlabel("node-hours over those of the work", fontsize=8)
        panel.set_ylabel("in time", fontsize=8)
        panel.set_title(day, fontsize=9)
        panel.margins(x=0.22, y=0.1)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(folder) / "scaling.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling_plots", description=__doc__)
    parser.add_argument("printed", nargs="+", type=Path)
    parser.add_argument("--folder", default="docs")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for path in arguments.printed:
        printed = json.loads(path.read_text().strip().splitlines()[-1])
        days = result.get("days", {}) | printed.get("days", {})
        result |= printed | ({"days": days} if days else {})
    plot_nodes(result, arguments.folder)
    plot_days(result, arguments.folder)


if __name__ == "__main__":
    main()

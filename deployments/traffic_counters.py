"""What the ranks of a denoiser send each other, as metrics."""

from ray.serve import metrics

from parallel.traffic import Traffic


class TrafficCounters:
    """What the ranks send each other, on Ray's metrics port."""

    def __init__(self) -> None:
        tags = ("collective",)
        self.calls = metrics.Counter(
            "mutoscope_collective_calls", "Collectives of denoise steps, by every rank.", tags
        )
        self.bytes_sent = metrics.Counter(
            "mutoscope_collective_bytes", "Bytes that ranks have sent in denoise steps.", tags
        )

    def add(self, traffic: Traffic) -> None:
        """Count one step's."""
        for collective, calls in traffic.calls.items():
            self.calls.inc(calls, {"collective": collective})
        for collective, sent in traffic.bytes_sent.items():
            self.bytes_sent.inc(sent, {"collective": collective})

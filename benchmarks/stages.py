"""Where time goes: seconds inside named stages, measured by wrapping the functions they consist of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import cotam.codec
import cotam.models.codec_model
from cotam.codec import Codec
from cotam.entropy.rans import RansDecoder

Clock = Callable[[], float]


class Stages:
    """Seconds by stage. Of functions that run in several threads at once, the seconds of all threads add up."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock, self.seconds = clock, dict[str, float]()
        self._lock = threading.Lock()

    def wrap(self, stage: str, owner: object, name: str) -> None:
        """Count the time in ``owner.name`` towards ``stage`` from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.clock() - start
                with self._lock:
                    self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds of every stage since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def watch(codec: Codec, clock: Clock = time.perf_counter) -> Stages:
    """Stages of this codec's encoding and decoding."""
    stages = Stages(clock)
    for model in (model for tier in codec.tiers for model in tier.models.values()):
        stages.wrap("g_a", model.g_a, "of_pixels")
        stages.wrap("h_a", model.h_a, "forward")
        stages.wrap("gains and g_s", model, "reconstruct")
        for name in ("hyper", "first_params", "second_params"):
            stages.wrap("integer network", model.entropy_parameters, name)
    for tier in codec.tiers:
        stages.wrap("rANS", tier.coder, "encode")
    stages.wrap("rANS", RansDecoder, "decode")
    stages.wrap("rANS", cotam.codec, "coded_segment")
    stages.wrap("rANS", cotam.codec, "decode_levels")
    stages.wrap("trellis search", cotam.models.codec_model, "quantise")
    stages.wrap("container", cotam.codec, "pack")
    stages.wrap("container", cotam.codec, "unpack")
    return stages

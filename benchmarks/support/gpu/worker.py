"""The process that measures kernels, and whoever asks it: it is started anew when it is gone.

A request is ``{"section", "number"}``; the answer is a row, ``{"lost": row}`` from a process that
can do no more, or ``{"error"}``. The first answer, to no request, has the peaks.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch

from support.gpu import peaks as peaks_of
from support.gpu import process
from support.gpu.clock import Clock, GpuClock, HostClock
from support.gpu.entry import Place
from support.gpu.measure import Lost, alive, measure, one_line, versions_of
from support.gpu.peaks import Peaks
from support.gpu.process import Line, Process
from support.gpu.registry import entries

SEED = 20_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to measure: on which device, at which sizes, which versions, against which peaks."""

    device: str
    size: Any
    slow: bool = False
    tune: bool = False
    peaks: Line | None = None


def serve(setting: Setting) -> None:
    """Measure what standard input asks for."""
    device = torch.device(setting.device)
    gpu = device.type == "cuda"
    if not gpu:
        # Shapes are small, and threads that wait for each other on a busy machine are not measured.
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    clock: Clock = GpuClock(device) if gpu else HostClock()
    place = Place(device, torch.bfloat16 if gpu else torch.float32)
    peaks = Peaks(**setting.peaks) if setting.peaks else peaks_of.measure(device, clock)
    process.say(dataclasses.asdict(peaks))
    gc.freeze()  # what libraries hold is not looked through again after every version

    def answer(asked: Line) -> Line:
        try:
            entry = entries(asked["section"], place, setting.size)[asked["number"]]
            versions = versions_of(entry, place, slow=setting.slow, tune=setting.tune)
            return measure(entry, versions, place, clock, peaks, SEED + asked["number"])
        except Lost as lost:
            return {"lost": lost.row}
        except Exception as error:
            row = {"error": one_line(error)}
            return row if alive(device) else {"lost": row}

    process.serve(answer)


class Worker:
    """Asks the process."""

    def __init__(self, script: str, setting: Setting) -> None:
        self.script, self.setting = script, setting
        self._process: Process | None = None

    def start(self, seconds: float) -> Peaks:
        """Start the process; return the peaks, measured by the first one. Raises Gone."""
        self._process = Process("the process", self.script, dataclasses.asdict(self.setting))
        peaks = self._process.answer(seconds)
        self.setting = dataclasses.replace(self.setting, peaks=peaks)
        return Peaks(**peaks)

    def ask(self, section: str, number: int, seconds: float) -> Line:
        """Measure one entry. Raises Gone."""
        try:
            if self._process is None:
                self.start(seconds)
            assert self._process is not None
            answer = self._process.ask({"section": section, "number": number}, seconds)
        except process.Gone:
            self.close()
            raise
        if "lost" in answer:
            self.close()
            row: Line = answer["lost"]
            return row
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

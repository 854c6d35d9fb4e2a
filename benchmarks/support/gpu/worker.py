"""The process that touches the device, and whoever asks it: a kernel may hang, or end it.

A request is a line of JSON, ``{"section", "number"}``; the answer is a row, ``{"lost": row}`` from
a process that can do no more, or ``{"error"}``. The first answer has the peaks.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
from typing import Any

import torch

from support.gpu import peaks as peaks_of
from support.gpu.clock import Clock, GpuClock, HostClock
from support.gpu.entry import Place
from support.gpu.measure import Lost, alive, measure, one_line, versions_of
from support.gpu.peaks import Peaks
from support.gpu.registry import entries

SEED = 20_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to measure: on which device, at which sizes, which versions, against which peaks."""

    device: str
    size: Any
    slow: bool = False
    tune: bool = False
    peaks: dict[str, Any] | None = None


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
    _say(dataclasses.asdict(peaks))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            entry = entries(asked["section"], place, setting.size)[asked["number"]]
            versions = versions_of(entry, place, slow=setting.slow, tune=setting.tune)
            _say(measure(entry, versions, place, clock, peaks, SEED + asked["number"]))
        except Lost as lost:
            _say({"lost": lost.row})
            return
        except Exception as error:
            row = {"error": one_line(error)}
            if not alive(device):
                _say({"lost": row})
                return
            _say(row)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


class Gone(Exception):
    """The process has ended or does not answer; it has been ended."""


class Worker:
    """Asks a process, which is started anew when it is gone."""

    def __init__(self, script: str, setting: Setting) -> None:
        self.script, self.setting = script, setting
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def start(self, seconds: float) -> Peaks:
        """Start the process; return the peaks, measured by the first one. Raises Gone."""
        what = json.dumps(dataclasses.asdict(self.setting))
        command = [sys.executable, self.script, "--worker", what]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        peaks = self._answer(seconds)
        self.setting = dataclasses.replace(self.setting, peaks=peaks)
        return Peaks(**peaks)

    def ask(self, section: str, number: int, seconds: float) -> dict[str, Any]:
        """Measure one entry. Raises Gone."""
        if self._process is None:
            self.start(seconds)
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"section": section, "number": number}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone("has ended") from None
        answer = self._answer(seconds)
        if "lost" in answer:
            self.close()
            row: dict[str, Any] = answer["lost"]
            return row
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise self._gone(f"has not answered for {seconds:.0f} s") from None
        if not line:
            raise self._gone(f"has ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _gone(self, why: str) -> Gone:
        self.close()
        return Gone(f"the process {why}")


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Bring lines over; an empty one is the end. Others than JSON go to standard error."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            lines.put(line)
        else:
            print(line, end="", file=sys.stderr)
    lines.put("")

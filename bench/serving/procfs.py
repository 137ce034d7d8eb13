"""CPU time and memory of processes, from Linux' /proc. Knows nothing of what they do."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat after the name, which may contain spaces; proc(5) counts from 1.
_PARENT, _USER, _SYSTEM = (field - 3 for field in (4, 14, 15))


@dataclass(frozen=True)
class Memory:
    """Resident memory of processes, MiB: now, at most so far, and the part of now that no file backs."""

    resident: float
    peak: float
    anonymous: float


def cpu_seconds(process_ids: Iterable[int]) -> float:
    """CPU time of processes and their descendants, all threads, in user and system mode."""
    ticks = 0
    for process_id in with_descendants(process_ids):
        fields = _stat(process_id)
        ticks += int(fields[_USER]) + int(fields[_SYSTEM]) if fields else 0
    return ticks / _TICKS


def busy_seconds() -> float:
    """CPU time of all processes of the machine so far, and what its hypervisor took from it."""
    fields = (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, interrupts, soft_interrupts, steal = map(int, fields[:8])
    return (user + nice + system + interrupts + soft_interrupts + steal) / _TICKS


def runnable_threads(process_ids: Iterable[int]) -> int:
    """How many threads of processes and their descendants run, wait for a processor, or wait for a disk."""
    count = 0
    for process_id in with_descendants(process_ids):
        try:
            threads = list((_PROC / str(process_id) / "task").iterdir())
        except OSError:
            continue
        for thread in threads:
            try:
                count += (thread / "stat").read_text().rpartition(")")[2].split()[0] in "RD"
            except OSError:
                continue
    return count


def memory(process_ids: Iterable[int]) -> Memory:
    """The memory of processes and their descendants; pages that they share count for each."""
    kilobytes = {"VmRSS": 0, "VmHWM": 0, "RssAnon": 0}
    for process_id in with_descendants(process_ids):
        try:
            lines = (_PROC / str(process_id) / "status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in kilobytes:
                kilobytes[name] += int(value.split()[0])
    resident, peak, anonymous = (kilobytes[name] / 1024 for name in ("VmRSS", "VmHWM", "RssAnon"))
    return Memory(resident, peak, anonymous)


def with_descendants(process_ids: Iterable[int]) -> list[int]:
    """Processes and all that they started, without duplicates."""
    children: dict[int, list[int]] = {}
    for path in _PROC.iterdir():
        if path.name.isdecimal() and (fields := _stat(int(path.name))):
            children.setdefault(int(fields[_PARENT]), []).append(int(path.name))
    found: dict[int, None] = {}
    waiting = list(process_ids)
    while waiting:
        process_id = waiting.pop()
        if process_id not in found:
            found[process_id] = None
            waiting += children.get(process_id, [])
    return list(found)


def _stat(process_id: int) -> list[str]:
    """The fields of a process after its name; empty if it has ended."""
    try:
        return (_PROC / str(process_id) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []

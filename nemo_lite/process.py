"""Who is at work: a process's number and start, written where others can read them, so that they can tell its death."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import psutil

PROCESS_FILE = "process.json"  # in a RUN_DIR while it is trained; what a run leaves behind that did not end in order


def facts(pid: int | None = None) -> dict[str, Any]:
    """The process (this one by default), and which boot of which machine it belongs to, without the machine's name."""
    started = psutil.Process(pid).create_time()
    return {"pid": pid or os.getpid(), "started": started, "machine": _machine(), "boot": _boot()}


def alive(process: dict[str, Any] | None) -> bool | None:
    """Whether the process of :func:`facts` still runs; None where that cannot be seen, as from another machine."""
    if not process:
        return False
    if process.get("machine") != _machine():
        return None
    if process.get("boot") != _boot():
        return False
    try:
        found = psutil.Process(process["pid"])
        # Another process may have got its number since; a clock that was set moves the start by little.
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - process["started"]) < 2
    except psutil.Error:
        return False


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return str(int(psutil.boot_time()))

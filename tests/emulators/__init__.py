"""Emulated control planes for the tests: DGX Cloud Lepton and DGX Cloud run:AI, on loopback, with real pods.

    from tests.emulators import LeptonEmulator, RunaiEmulator

    with LeptonEmulator(root=tmp_path) as server: ...

Standard library only; `python -m tests.emulators lepton` starts one by hand.

    server.py   strict HTTP, the log of requests, faults         rules.py   unknown fields, sizes, $(NAME) rewriting
    fields.py   the APIs' fields                                 jobs.py    phases, retries
    plane.py    what both planes have: volumes, timers, logs     pods.py, podinit.py   processes with their own root
    lepton*.py, runai*.py   the two planes
"""

from .lepton import LeptonEmulator
from .pods import Image
from .pods import why_not as no_pods_because
from .runai import RunaiEmulator

__all__ = ["Image", "LeptonEmulator", "RunaiEmulator", "no_pods_because"]

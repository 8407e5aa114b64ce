"""Start an emulated control plane by hand, to try the real commands without an account.

    python -m tests.emulators lepton        (or runai; as root: its pods are real processes with a root of their own)

It listens on 127.0.0.1 only, prints what to export in another shell, shows each request, and ends with Ctrl-C: with
every pod, and without leaving anything but the files under --root.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from . import LeptonEmulator, RunaiEmulator, no_pods_because
from .plane import Plane


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulators", description="Start an emulated control plane.")
    parser.add_argument("plane", choices=["lepton", "runai"])
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1 (default: a free one)")
    parser.add_argument("--path", help="PATH of the containers (default: this Python's, then the system's)")
    parser.add_argument("--root", type=Path, help="where volumes and logs are kept (default: a temporary folder)")
    return parser.parse_args()


def describe(server: Plane) -> str:
    """What a person needs to know."""
    lines = [f"export {name}='{value}'" for name, value in server.env().items()]
    if isinstance(server, LeptonEmulator):
        groups = ", ".join(f"{name} ({len(server.nodes[group])} nodes)" for group, name in server.groups.items())
        lines += ["", f"node groups: {groups}"]
        lines += [f'volume: from = "{name}", kept in {folder}' for name, folder in server.volumes.items()]
    if isinstance(server, RunaiEmulator):
        lines += ["", "projects: " + ", ".join(f"{name} ({quota} GPUs)" for name, quota in server.quotas.items())]
        lines += [f'claim: claimName = "{name}", kept in {folder}' for name, folder in server.claims.items()]
    return "\n".join([*lines, "", "Ctrl-C ends it, and every pod with it."])


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM is as good as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Serve until somebody stops it."""
    options = arguments()
    reason = no_pods_because()
    if reason is not None:
        print(f"cannot start: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, stop)
    kinds: dict[str, type[Plane]] = {"lepton": LeptonEmulator, "runai": RunaiEmulator}
    if options.root is not None:
        options.root.mkdir(parents=True, exist_ok=True)
    # As profiles/dgxcloud.toml has it: its claim, and no address for the logs but the platform's own.
    more: dict[str, Any] = {"claims": ("shared-storage",), "cluster_logs": True} if options.plane == "runai" else {}
    with kinds[options.plane](options.root, port=options.port, path=options.path, **more) as server:
        shown = 0
        try:
            print(describe(server), flush=True)
            while True:
                time.sleep(0.2)
                for method, path, status in server.requests[shown:]:
                    shown += 1
                    print(f"{time.strftime('%H:%M:%S')}  {method} {path}  {status}", flush=True)
        except KeyboardInterrupt:
            print("ending …", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

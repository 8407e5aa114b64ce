"""How long a dry run takes: python benchmarks/dry_run.py [CHECKOUT]

Wall time of whole processes, the least of RUNS, against that of a Python that does nothing: the starter recipes, a
checkout's, and NVIDIA's own command line where the checkout is set up (its .venv has bin/nemotron).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
RUNS = 7


def seconds(*command, cwd=HERE):
    """The least wall time of a command that succeeds."""
    took = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        subprocess.run([str(word) for word in command], cwd=cwd, check=True, capture_output=True)
        took.append(time.perf_counter() - begun)
    return min(took)


def main():
    python, launcher = sys.executable, HERE / "launch.py"
    bare = seconds(python, "-c", "pass")
    rows = [("python -c pass", bare),
            ("starter nano3/sft", seconds(python, launcher, "nano3", "sft", "lepton", "--dry-run"))]
    if len(sys.argv) > 1:
        root = Path(sys.argv[1]).resolve()
        for family, stage in (("nano3", "sft"), ("super3", "data/prep/rl")):
            rows.append(("%s/%s of the checkout" % (family, stage), seconds(
                python, launcher, family, stage, "lepton", "--dry-run", "--repo-root", root)))
        theirs = root / ".venv/bin/nemotron"
        if theirs.exists():
            rows.append(("NVIDIA's nano3 sft", seconds(theirs, "nano3", "sft", "--dry-run", cwd=root)))
        else:
            print("NVIDIA's command line is not set up in %s" % root)
    for name, took in rows:
        print("%-36s %6.3f s   x %5.1f" % (name, took, took / bare))
    print("load %.1f on %d cores" % (os.getloadavg()[0], os.cpu_count()))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""data/prep/rl against the split step of NVIDIA's super3/data/prep/rl, on one generated file.

    NEMOTRON_ROOT=/path/to/Nemotron python benchmarks/data_prep.py [--mib 512] [--rounds 5] [--workers N]

Theirs: the function _create_train_val_splits of their data_prep.py, called in a process of its own and timed without
start-up and imports. Their module imports a pipeline engine and the rest of their packages, which this function does
not use: cosmos_xenna, nemotron and nemo_runspec are empty stand-ins here, for the import alone. It reads the shard as
text, writes all but the last 100 lines and then those; it does not look into a row, hash, or bring anything to the disk.

Ours: the recipe as the launcher starts it, timed from the start of its process to its end: imports, JSON check of each
row, holdout by hash, both files brought to the disk, SHA-256 and manifest.

The rounds alternate, each into a fresh folder, so that both meet the same machine. The peak of theirs is its process';
of ours, the sum over all its processes, looked at every 5 ms, with memory that they share counted in each of them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
RECIPE = HERE / "src/starter/recipes/super3/data_prep_rl/prep.py"
THEIRS = "src/nemotron/recipes/super3/stage2_rl/data_prep.py"

RUN_THEIRS = """
import importlib.abc, importlib.machinery, importlib.util, json, resource, sys, time, types
from pathlib import Path

class StandIn(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cosmos_xenna", "nemotron", "nemo_runspec"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
spec = importlib.util.spec_from_file_location("their_data_prep", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["their_data_prep"] = module
spec.loader.exec_module(module)
began = time.perf_counter()
module._create_train_val_splits({"train": sys.argv[2]}, Path(sys.argv[3]), val_holdout=100)
seconds = time.perf_counter() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def generate(path: Path, size: int) -> int:
    """Rows like those of the blend: a question of a few hundred words, twice, with escapes, and what goes with it."""
    dice = random.Random(1)
    words = [*"let $x$ be prime and \\frac{1}{2} of the sum ; find it modulo".split(" "), "integer", "theorem", "positive"]
    written = rows = 0
    with path.open("w") as file:
        while written < size:
            text = " ".join(dice.choices(words, k=dice.randint(60, 300)))
            text = text[:80] + "\n\n" + text[80:]
            prompt = {"input": [{"role": "user", "content": "Solve it.\n\n" + text + "\n"}]}
            row = {"id": rows, "dataset": "math", "question": text, "expected_answer": str(dice.randint(0, 999)),
                   "responses_create_params": prompt, "pass_rate": dice.random(), "agent_ref": {"name": "math"}}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def theirs(script: Path, shard: Path, folder: Path) -> tuple[float, int]:
    command = [sys.executable, "-c", RUN_THEIRS, str(script), str(shard), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("their split step ended with exit code %d" % done.returncode)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def ours(shard: Path, folder: Path, workers: int | None) -> tuple[float, int]:
    folder.mkdir()
    (folder / "blend.json").write_text(json.dumps({"datasets": [{"name": "math", "path": str(shard)}]}))
    (folder / "config.yaml").write_text("output: %s/out\nblend: %s/blend.json\nholdout: 100\n" % (folder, folder))
    command = [sys.executable, str(RECIPE), "--config", str(folder / "config.yaml")]
    command += ["workers=%d" % workers] if workers else []
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE / "src")}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_rss(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit("our data prep ended with exit code %d" % process.returncode)
    return seconds, peak


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        total = int(Path("/proc/%d/statm" % pid).read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for child in Path("/proc/%d/task/%d/children" % (pid, pid)).read_text().split():
            total += tree_rss(int(child))
    except (OSError, IndexError):
        pass  # it has just ended
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes of ours; by default the cores of this machine")
    options = parser.parse_args()
    script = Path(os.environ.get("NEMOTRON_ROOT", ""), THEIRS)
    if not script.is_file():
        raise SystemExit("set NEMOTRON_ROOT to a checkout of NVIDIA's Nemotron: there is no %s" % script)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shard = place / "shard.jsonl"
        rows = generate(shard, options.mib << 20)
        mib = shard.stat().st_size / 2**20
        print("%d rows, %.0f MiB, %d cores, load %.1f" % (rows, mib, len(os.sched_getaffinity(0)), os.getloadavg()[0]))
        results: dict[str, list[tuple[float, int]]] = {"theirs": [], "ours": []}
        for number in range(options.rounds):
            for who, run in (("theirs", lambda f: theirs(script, shard, f)),
                             ("ours", lambda f: ours(shard, f, options.workers))):
                results[who].append(run(place / "run"))
                shutil.rmtree(place / "run")
                print("round %d  %-6s  %5.2f s  %5.0f MiB" % (
                    number + 1, who, results[who][-1][0], results[who][-1][1] / 2**20), flush=True)
    middle = {who: statistics.median(seconds for seconds, _ in found) for who, found in results.items()}
    best = {who: min(seconds for seconds, _ in found) for who, found in results.items()}
    peak = {who: max(peak for _, peak in found) for who, found in results.items()}
    for who in results:
        print("%-6s  median %.2f s (%.0f MiB/s), best %.2f s, peak %.0f MiB" % (
            who, middle[who], mib / middle[who], best[who], peak[who] / 2**20))
    print("rate: %.1f times theirs (medians), %.1f (best); memory: 1/%.0f of theirs" % (
        middle["theirs"] / middle["ours"], best["theirs"] / best["ours"], peak["theirs"] / peak["ours"]))


if __name__ == "__main__":
    main()

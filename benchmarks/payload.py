"""What ships, against NVIDIA's launcher, on the same checkout: python benchmarks/payload.py CHECKOUT

Theirs is what its own SourcePackager writes, the gzip that its plan_for cuts into variables; ours the plan for Lepton.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import closure  # noqa: E402
import recipes  # noqa: E402
import transport  # noqa: E402

RECIPES = ("nano3/sft", "super3/data/prep/rl")
TARGETS = {"family": 0.62, "imports": 0.36}
THEIRS = """
import json, sys, tempfile
from pathlib import Path
from nemo_runspec.data_mover import SourcePackager
sizes = {}
for script in sys.argv[2:]:
    with tempfile.TemporaryDirectory() as folder:
        packager = SourcePackager(repo_root=sys.argv[1], script_path=script)
        sizes[script] = Path(packager.package(None, folder, "source")).stat().st_size
print(json.dumps(sizes))
"""


def theirs(root, scripts):
    """Bytes of each script's tarball, by NVIDIA's own code in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin", "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, "-c", THEIRS, str(root), *scripts], check=True, capture_output=True,
                              text=True, env=env)
    return json.loads(done.stdout)


def ours(root, recipe, scope):
    """(files, bytes) of the tree as it travels."""
    tree = transport.collect(root, recipe.script)
    if scope == "imports":
        tree = closure.collect(root, recipe.script, (), (recipe.config_dir,), "")
    return len(tree.entries), len(transport.packed(tree, "xz").data)


def measure(root):
    """(recipe, scope, their bytes, our files, our bytes) of each pair."""
    found = [recipes.find(root, name) for name in RECIPES]
    sizes = theirs(root, [recipe.script for recipe in found])
    return [(recipe.name, scope, sizes[recipe.script], *ours(root, recipe, scope))
            for recipe in found for scope in TARGETS]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    missed = 0
    for name, scope, their, files, size in measure(Path(sys.argv[1]).resolve()):
        missed += size > TARGETS[scope] * their
        print("%-20s %-8s theirs %7d bytes   ours %7d bytes in %3d files   ratio %.3f (at most %.2f)" % (
            name, scope, their, size, files, size / their, TARGETS[scope]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

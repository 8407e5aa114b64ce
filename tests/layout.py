"""Small source trees for the tests of the launcher: recipes with runspec headers, laid out as in a real checkout."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FLAT = (*sorted(path.name for path in REPO.glob("*.py")), "pod", "backends", "profiles")


def header(name="nano3/sft", *, launch=None, cmd=None, workdir=None, image=None, nodes=None, gpus=None, config_dir=None,
           default=None, env=None, dependencies=None, extra=""):
    """A script's runspec block; only what is given stands in it. `extra` is TOML put at its end."""
    tables = {"": {"schema": "1", "name": name, "image": image},
              ".run": {"launch": launch, "cmd": cmd, "workdir": workdir},
              ".config": {"dir": config_dir, "default": default},
              ".resources": {"nodes": nodes, "gpus_per_node": gpus}, ".env": env or {}}
    lines = ['requires-python = ">=3.10"', *["dependencies = " + json.dumps(dependencies)] * bool(dependencies)]
    for table, fields in tables.items():
        given = {key: value for key, value in fields.items() if value is not None}
        if given:
            lines += ["", "[tool.runspec%s]" % table] + ["%s = %s" % (k, json.dumps(v)) for k, v in given.items()]
    lines += extra.splitlines()
    return "".join("# %s\n" % line if line else "#\n" for line in ["/// script", *lines, "///"])


def recipe(root, name="nano3/sft", body="", *, path=None, yaml="{}\n", **fields):
    """Write the script of a recipe and its config/default.yaml; returns the script's path."""
    script = root / (path or "src/nemotron/recipes/%s/train.py" % name)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(header(name, **fields) + textwrap.dedent(body))
    write(script.parent / "config/default.yaml", yaml)
    return script


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def nemotron(root):
    """The bones of NVIDIA's checkout: two families, helper packages, steps, a folder that .gitignore would hide."""
    recipe(root, "nano3/sft", path="src/nemotron/recipes/nano3/stage1_sft/train.py", nodes=1,
           image="nvcr.io/nemo:25.11", yaml="""\
            run:
              env:
                container_image: nvcr.io/nemo:26.02
                mounts: ["${auto_mount:git+https://github.com/NVIDIA/Megatron-LM.git@main,/opt/megatron}"]
              wandb: {project: nano3, entity: null}
              data: nano3-sft-data:latest
            output_dir: ${oc.env:PWD}/../output/sft
            save: /nemo_run/nano3-sft-model
            logger: {project: "${run.wandb.project}", entity: "${run.wandb.entity}"}
            dataset: ${art:data,path}
            """)
    recipe(root, "nano3/data/prep/rl", path="src/nemotron/recipes/nano3/stage2_rl/data_prep.py", launch="ray", gpus=0,
           cmd="uv run --extra xenna python {script} --config {config}", yaml="output_dir: ${oc.env:PWD}/../output\n")
    recipe(root, "nano3/rl", path="src/nemotron/recipes/nano3/stage2_rl/train.py", launch="ray", workdir="/opt/nemo-rl",
           cmd="uv run python {script} --config {config}")
    recipe(root, "super3/rl/stage1_rlvr", path="src/nemotron/recipes/super3/stage2_rl/stage1_rlvr/train.py",
           launch="ray", nodes=109, cmd="uv run python {script} --config {config}", workdir="/opt/nemo-rl")
    recipe(root, "steps/eval", path="src/nemotron/steps/eval/step.py", launch="python")
    for place in ("src/nemotron/__init__.py", "src/nemotron/kit/io.py", "src/nemo_runspec/__init__.py",
                  "src/nemotron/recipes/nano3/README.md", "src/nemotron/recipes/_shared/util.py",
                  "src/nemotron/steps/env/profile.py"):
        write(root / place, "# %s\n" % place)
    return root


def flat_folder(folder):
    """A copy of what a person copies: the flat scripts, with no virtual environment and no source tree beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FLAT:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, folder / name)
    return folder


def launcher(folder, *words, python=sys.executable, timeout=60, **options):
    """Run launch.py of `folder` as a process of its own, standing in it."""
    options.setdefault("cwd", folder)
    return subprocess.run([python, str(folder / "launch.py"), *map(str, words)], capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=timeout, **{"text": True, **options})

"""A real Nemotron checkout: configs as NVIDIA's own functions make them, payloads, and what its scripts meet in a pod.

Runs where NEMOTRON_ROOT names a checkout. Its functions run in a process of their own, on stand-ins for the libraries
that they import and that have no part in it.
"""

import ast
import contextlib
import functools
import io
import itertools
import json
import lzma
import os
import posixpath
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import PATH, base

import configs
import jobs
import launch
import prepare
import profiles
import recipes
import start
import transport

ROOT = Path(os.environ.get("NEMOTRON_ROOT", "/nowhere")).resolve()
pytestmark = pytest.mark.skipif("NEMOTRON_ROOT" not in os.environ,
                                reason="NEMOTRON_ROOT names no Nemotron checkout; CI has none")
EXECUTORS = ("local", "docker", "slurm", "lepton", "dgxcloud")

ENV_TOML = """
[lepton]
executor = "lepton"
node_group = "group"
resource_shape = "gpu.8xh100-80gb"
container_image = "registry.test/from-profile:1"
nodes = 3
gpus_per_node = 2
workspace = "/shared"
startup_commands = ["export FROM_SETUP=1"]
mounts = [{ path = "/", mount_path = "/shared", from = "node-nfs:shared" }]
env_vars = { FROM_PROFILE = "1", NCCL_DEBUG = "WARN" }
[local]
executor = "local"
workspace = "/shared"
[docker]
executor = "docker"
container_image = "registry.test/from-profile:1"
[slurm]
executor = "slurm"
account = "a"
partition = "p"
remote_job_dir = "/lustre/jobs"
container_image = "registry.test/from-profile:1"
[dgxcloud]
executor = "dgxcloud"
base_url = "https://runai.test"
client_id = "id"
client_secret = "secret"
project_name = "team"
container_image = "registry.test/from-profile:1"
pvcs = [{ claimName = "workspace", path = "/shared", existingPvc = true }]
"""
SHARED_TOML = """
[wandb]
project = "a-project"
entity = "an-entity"
[artifacts]
wandb = true
[artifacts.manifest]
root = "/lustre/artifacts"
"""
OVERRIDES = ["run.env.nodes=2", "run.env.env_vars.ADDED=yes", "run.data=other-data:v3", "added.deep.list=[1,two]",
             "added.out=${oc.env:PWD}/../output/x", "added.root=${oc.env:NEMO_RUN_DIR,.}/y",
             "added.w=${run.wandb.project}"]
VARIANTS = {  # name -> (profile, [wandb] and [artifacts], overrides)
    "plain": ("", False, []), "profile": ("lepton", False, []), "shared": ("lepton", True, []),
    "overrides": ("", False, OVERRIDES), "all": ("lepton", True, OVERRIDES),
}

# Where ours is meant to differ: (reason, whether this pair of leaves is such a case).
REASONS = {
    "`..` above the code root is taken out here: our code root is elsewhere, and what was meant is the run root":
        lambda theirs, ours: "/nemo_run/code/.." in theirs and ours == re.sub(
            r"/nemo_run/code/\.\.[^\s:,]*", lambda found: posixpath.normpath(found.group()), theirs),
    "NEMO_RUN_DIR whose default names PWD: they map the default only; in the pod it is set, to our /nemo_run":
        lambda theirs, ours: ours == re.sub(r"^\$\{oc\.env:NEMO_RUN_DIR,/nemo_run/code[^}]*\}", "/nemo_run", theirs),
    "a place that ${run.…} brings: they map before they replace it, so the launcher's own PWD stays in the text":
        lambda theirs, ours: ours == theirs.replace("${oc.env:PWD}", "/nemo_run/code"),
}

THEIRS = '''
import json, os, sys
from pathlib import Path
from nemo_runspec.cli_context import GlobalContext
from nemo_runspec.config.loader import build_job_config, extract_train_config, parse_config
from nemo_runspec.env import parse_env
from omegaconf import OmegaConf
for line in sys.stdin:
    case = json.loads(line)
    os.environ["NEMOTRON_ENV_FILE"] = case["env_file"]
    try:
        context = GlobalContext(config=case["config"], run=case["profile"] or None, dotlist=case["overrides"])
        config = parse_config(context, Path(case["folder"]), "default")
        job = build_job_config(config, context, case["name"], case["script"], [], env_profile=parse_env(context))
        train = OmegaConf.to_container(extract_train_config(job, for_remote=True), resolve=False)
        env = OmegaConf.to_container(job.run.env, resolve=False)
        print(json.dumps({"train": train, "env": {k: v for k, v in env.items() if k != "mounts"}}), flush=True)
    except Exception as error:
        print(json.dumps({"error": repr(error)[:300]}), flush=True)
'''
STAND_INS = {  # what nemo_runspec's packages import on the way
    "pydantic_settings.py": "class BaseSettings: pass\nclass CliSettingsSource: pass\n",
}


@functools.cache
def scanned():
    found, problems = recipes.scan(ROOT)
    assert problems == []
    return found


def own_python(folder):
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
    return [sys.executable, "-c"], {"PYTHONPATH": "%s:%s" % (ROOT / "src", folder), "PATH": PATH, "HOME": str(folder)}


def cases(folder):
    """One for each script, each YAML of its config folder, and each variant."""
    for shared in (False, True):
        (folder / ("shared.toml" if shared else "plain.toml")).write_text(ENV_TOML + SHARED_TOML * shared)
    for recipe in scanned().values():
        for path in sorted([*recipe.config_dir.rglob("*.yaml"), *recipe.config_dir.rglob("*.yml")]):
            for variant, (profile, shared, overrides) in VARIANTS.items():
                yield {"name": recipe.name, "script": recipe.script, "folder": str(recipe.config_dir),
                       "config": str(path), "variant": variant, "profile": profile, "overrides": overrides,
                       "env_file": str(folder / ("shared.toml" if shared else "plain.toml"))}


def ours(case, monkeypatch):
    monkeypatch.setenv("NEMOTRON_ENV_FILE", case["env_file"])
    profile = profiles.load(case["profile"]) if case["profile"] else None

    def settle(recipe, yaml, forced):
        return jobs.settings_for(recipe, profile, None, yaml, forced, []) if profile else yaml

    config = configs.compile_config(scanned()[case["name"]], case["config"], case["overrides"], settle,
                                    profiles.section("wandb"), profiles.section("artifacts"))
    train = OmegaConf.to_container(OmegaConf.load(io.StringIO(config.text)), resolve=False)
    return {"train": train, "env": config.run["env"]}


def leaves(value, path=""):
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in leaves(item, "%s.%s" % (path, key)).items()}
    return {path: value}


def differences(theirs, found):
    """(path, their leaf, our leaf) of two configs; numbers that YAML writes in two ways are one."""
    left, right = leaves(theirs), leaves(found)
    for path in sorted(set(left) | set(right)):
        one, other = left.get(path, "<absent>"), right.get(path, "<absent>")
        if one != other or type(one) is not type(other):
            yield path, one, other


def read(text):
    """As OmegaConf reads an attribute of run.env; what is for the pod stays."""
    try:
        return OmegaConf.create({"text": text}).text
    except Exception:
        return text


def env_differences(theirs, found):
    """Of run.env: the image, counts, variables, commands. `container` is the image's other name."""
    theirs = {key: {name: read(item) for name, item in value.items()} if isinstance(value, dict) else read(value)
              for key, value in theirs.items()}
    theirs = theirs | {"container_image": theirs.get("container_image") or theirs.get("container")}
    for key in ("container_image", "nodes", "gpus_per_node"):
        if theirs.get(key) is not None and str(theirs[key]) != str(found[key]):
            yield key, theirs[key], found[key]
    nproc = theirs.get("nproc_per_node") or theirs.get("ntasks_per_node") or theirs.get("nprocs_per_node")
    if nproc is not None and str(nproc) != str(found["nproc_per_node"]):
        yield "nproc", nproc, found["nproc_per_node"]
    variables = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in (theirs.get("env_vars") or {}).items()}
    if any(found["env_vars"].get(name) != value for name, value in variables.items()):
        yield "env_vars", variables, found["env_vars"]
    if theirs.get("startup_commands") and list(theirs["startup_commands"]) != found["startup_commands"]:
        yield "startup_commands", theirs["startup_commands"], found["startup_commands"]


def test_configs_are_those_of_nvidias_functions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("USER", "someone")
    every = list(cases(tmp_path))
    command, env = own_python(tmp_path)
    done = subprocess.run([*command, THEIRS], input="".join(json.dumps(case) + "\n" for case in every), env=env,
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(every) > 0, done.stderr[-2000:]
    counts, odd, settled = Counter(), [], 0
    for case, theirs in zip(every, answers, strict=True):
        try:
            found = ours(case, monkeypatch)
        except transport.Refusal as refusal:
            found = {"error": refusal.what}
        if "error" in theirs or "error" in found:
            if ("error" in theirs) != ("error" in found):
                odd.append((case["name"], case["config"], case["variant"], theirs.get("error"), found.get("error")))
            continue
        reasons = set()
        for path, one, other in differences(theirs["train"], found["train"]):
            why = next((why for why, is_it in REASONS.items() if isinstance(one, str) and isinstance(other, str)
                        and is_it(one, other)), None)
            reasons.add(why)
            if why is None:
                odd.append((case["name"], case["config"], case["variant"], path, one, other))
        if case["profile"]:
            settled += 1
            odd += [(case["name"], case["config"], case["variant"], *difference)
                    for difference in env_differences(theirs["env"], found["env"])]
        counts.update(reasons)
    with capsys.disabled():
        print("\n%d scripts, %d YAMLs, %d variants: %d configs, %d run.env; differing: %s; unexplained: %d" % (
            len(scanned()), len({case["config"] for case in every}), len(VARIANTS), len(every), settled,
            "; ".join("%d: %s" % (number, why) for why, number in counts.items()) or "none", len(odd)))
    assert odd == [], "\n".join(map(str, odd[:20]))
    assert set(counts) == set(REASONS)  # a reason that no config needs any more goes


# ---------------------------------------------------------------- payload


def test_payloads_are_within_the_targets(capsys):
    from benchmarks import payload

    rows = payload.measure(ROOT)
    with capsys.disabled():
        print("".join("\n%s, %s: theirs %d, ours %d in %d files, %.3f" % (
            name, scope, their, size, files, size / their) for name, scope, their, files, size in rows))
    assert [row for row in rows if row[4] > payload.TARGETS[row[1]] * row[2]] == []


def planned(monkeypatch, tmp_path, executor, recipe, scope="family", *words):
    """The launch of one recipe, resolved as a dry run is."""
    text = ENV_TOML.replace("[%s]\n" % executor, '[%s]\nscope = "%s"\nauto_mount = "image"\n' % (executor, scope)
                            if executor not in ("local", "slurm") else '[%s]\nscope = "%s"\n' % (executor, scope))
    (tmp_path / "env.toml").write_text(text)
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(tmp_path / "env.toml"))
    monkeypatch.setenv("USER", "someone")
    _, options = launch.parse([recipe.family, recipe.stage, executor, "--repo-root", str(ROOT), *words])
    named = prepare.words_of([recipe.family, recipe.stage, executor])
    return prepare.Launch(named, recipe.stage, options, True)


def test_every_recipe_plans_on_every_executor(monkeypatch, tmp_path):
    """All fit, packed worse than they are in fact."""
    monkeypatch.setattr(transport, "compress", lambda data, method: lzma.compress(data, preset=1))
    count = 0
    for recipe in scanned().values():
        for executor in EXECUTORS:
            found = planned(monkeypatch, tmp_path, executor, recipe)
            assert found.plan.fits, (recipe.name, executor, found.plan.budgets)
            assert (found.job.description["script"], found.job.description["launch"]) == (recipe.script, recipe.launch)
            count += 1
    assert count == len(scanned()) * len(EXECUTORS) >= 84 * 5


# ---------------------------------------------------------------- in a pod

STAND_IN = """#!/usr/bin/env python3
import json, os, sys
seen = {"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "env": dict(os.environ), "cwd": os.getcwd()}
json.dump(seen, open(os.environ.get("SEEN", "/scratch/seen.json"), "w"))
"""


def holes(code):
    """Imports of a package of the tree that lead to no file of it. The command line and its steps stay here: no
    recipe imports them."""
    have = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.suffix == ".py"}
    folders = {str(parent) for path in have for parent in Path(path).parents}
    tops = {path.name for path in (code / "src").iterdir() if path.is_dir()}
    real = {path.relative_to(ROOT / "src").with_suffix("").as_posix().removesuffix("/__init__")
            for path in (ROOT / "src").rglob("*.py")}
    for path in sorted(have):
        package = path.split("/")[1:-1]
        if package[:2] == ["nemotron", "cli"]:
            continue
        for node in ast.walk(ast.parse((code / path).read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                base = [*(package[: len(package) - node.level + 1] if node.level else []), *filter(None, [node.module])]
                names = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names
                                           if "/".join([*base, alias.name]) in real)]
            for name in names:
                place = "src/" + name.replace(".", "/")
                there = {place + ".py", place + "/__init__.py"} & have or place in folders
                if name.split(".")[0] in tops and not there:
                    yield path, name


def expected(recipe, code, config, nodes, uv=True):
    """The command line that a header asks for, in a pod with uv, which can install all there, or without."""
    script = "%s/%s" % (code, recipe.script)
    wrapper = script.rpartition("/")[0] + "/run_uv.py"
    script = wrapper if uv and (recipe.root / recipe.script).with_name("run_uv.py").is_file() and (
        recipe.root / recipe.script).with_name("pyproject.toml").is_file() else script
    if recipe.cmd and (uv or not recipe.cmd.startswith("uv run")):
        return recipe.cmd.format(script=script, config=config).split()
    if recipe.launch == "torchrun":
        return ["torchrun", "--nnodes", str(nodes), "--node-rank", "0", "--nproc-per-node", "<n>", "--rdzv-backend",
                "static", "--rdzv-endpoint", "rank-0:<port>", "--rdzv-conf", "timeout=1800", script, "--config", config]
    return ["python", script, "--config", config]


@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("executor", ["local", "slurm", "lepton"])
def test_every_header_is_started_as_it_says_with_uv_and_without(executor, uv, monkeypatch, tmp_path):
    tools, kinds = tmp_path / "tools", Counter()
    tools.mkdir()
    for name in ("torchrun", "python", "ray", "bash", *["uv"] * uv):
        (tools / name).write_text(STAND_IN.replace("/usr/bin/env python3", sys.executable))
        (tools / name).chmod(0o755)
    for name in ("mkdir", "ln", "rm", "cp"):
        (tools / name).symlink_to("/bin/" + name)
    for recipe in scanned().values():
        words = ["--nodes", "1"] if recipe.launch == "ray" else []
        found = planned(monkeypatch, tmp_path, executor, recipe, "family", *words)
        sent = found.job.description
        (tmp_path / "base").mkdir(exist_ok=True)
        env = {"PATH": str(tools), "AIRLIFT_CODE": str(ROOT), "AIRLIFT_CONFIG": str(tmp_path / "base/config.yaml"),
               "SEEN": str(tmp_path / "seen.json"), "NODE_RANK": "0", "MASTER_ADDR": "rank-0", "MASTER_PORT": "<port>"}
        lines = [*("eval %s || exit 86" % start.shlex.quote(each) for each in sent["setup"]), sent["command"]]
        done = subprocess.run(["/bin/bash", "-c", "\n".join(lines)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, (recipe.name, done.stderr)
        seen = json.loads((tmp_path / "seen.json").read_text())["argv"]
        argv = ["<n>" if before == "--nproc-per-node" else word for before, word in zip(["", *seen], seen, strict=False)]
        assert argv == expected(recipe, ROOT, env["AIRLIFT_CONFIG"], found.job.nodes, uv), recipe.name
        kinds[argv[0] + (" run_uv" if "run_uv" in " ".join(argv) else "")] += 1
    assert sum(kinds.values()) == len(scanned()) and (not uv or kinds["uv"] == 37), kinds


@pytest.mark.parametrize("scope", ["family", "imports"])
@pytest.mark.parametrize("executor", ["lepton", "dgxcloud"])
def test_what_a_script_meets_in_a_pod(executor, scope, monkeypatch, tmp_path, capsys):
    from tests.emulators import Image, no_pods_because
    from tests.emulators.pods import SYSTEM_PATH, Bind, Pod, PodSpec

    if no_pods_because():
        pytest.skip(no_pods_because())
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("torchrun", "uv", "python", "ray"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    chosen = [recipe for recipe in scanned().values() if recipe.family in ("nano3", "super3")]
    for number, recipe in enumerate(chosen):
        nodes = ["--nodes", "1"] if recipe.launch == "ray" else []
        found = planned(monkeypatch, tmp_path, executor, recipe, scope, *nodes)
        scratch = tmp_path / ("scratch-%d" % number)
        for folder in ("shared", "workdir", "scratch-%d" % number):
            (tmp_path / folder).mkdir(exist_ok=True)
        binds = [Bind(tools, "/tools"), Bind(scratch, "/scratch"), Bind(tmp_path / "shared", "/shared")]
        if recipe.workdir:
            binds.append(Bind(tmp_path / "workdir", recipe.workdir))
        env = found.plan.env | {"TMPDIR": "/scratch", "NODE_RANK": "0", "MASTER_ADDR": "rank-0"}
        image = Image(path="/tools:%s/bin:%s" % (sys.prefix, SYSTEM_PATH))
        pod = Pod(PodSpec("pod", "pod-0", found.plan.argv, env, image, binds), tmp_path / ("pod-%d" % number), None,
                  lambda pod: None)
        pod.start()
        try:
            assert pod.wait(60) == 0, (recipe.name, pod.output)
        finally:
            pod.close()
        here = base(scratch, found.plan.digest)
        inside = "/scratch/" + str(here.relative_to(scratch))
        seen = json.loads((scratch / "seen.json").read_text())
        argv = [re.sub(r"^rank-0:\d+$", "rank-0:<port>", "<n>" if word == "--nproc-per-node" else after)
                for word, after in zip(["", *seen["argv"]], seen["argv"], strict=False)]
        assert argv == expected(recipe, inside + "/code", inside + "/config.yaml", found.job.nodes), recipe.name
        assert seen["cwd"] == (recipe.workdir or "/shared/%s/work" % recipe.family)
        assert seen["env"]["PYTHONPATH"].split(":")[0] == inside + "/code/src"
        assert seen["env"]["NEMO_RUN_DIR"] == "/shared/" + recipe.family
        assert {name: seen["env"].get(name) for name in recipe.env} == {n: str(v) for n, v in recipe.env.items()}
        assert seen["env"]["NCCL_DEBUG" if executor == "lepton" else "HOME"] in ("WARN", "/root")
        config = (here / "config.yaml").read_text()
        assert OmegaConf.is_dict(OmegaConf.load(io.StringIO(config))) and "/nemo_run" not in config
        named = re.findall(re.escape(inside) + r"/code/(src/[\w./-]+\.\w+)", config)
        assert [path for path in named if not (here / "code" / path).is_file()] == [], recipe.name
        assert list(holes(here / "code")) == [], recipe.name
        if executor == "lepton":
            done = subprocess.run([sys.executable, "-m", "compileall", "-q", str(here / "code")], capture_output=True)
            assert done.returncode == 0, done.stdout
    with capsys.disabled():
        print("\n%s, %s: %d pods" % (executor, scope, len(chosen)))


@pytest.mark.parametrize("name, nodes", [("nano3/sft", 2), ("super3/data/prep/rl", 1), ("super3/rl/stage1_rlvr", 1)])
@pytest.mark.parametrize("kind", ["lepton", "dgxcloud"])
def test_a_script_launched_through_the_platforms_api(kind, name, nodes, tmp_path, monkeypatch, capsys):
    from cloud import cloud

    from tests.emulators import Image, no_pods_because
    from tests.emulators.pods import SYSTEM_PATH

    if no_pods_because():
        pytest.skip(no_pods_because())
    recipe = scanned()[name]
    image = Image(path="/shared/tools:%s/bin:%s" % (sys.prefix, SYSTEM_PATH))
    for here in cloud(kind, tmp_path, monkeypatch, capsys, image=image):
        place = recipe.workdir or "/opt/elsewhere"  # what the real image has there
        volumes = {"mounts": [{"path": "/", "mount_path": at, "from": "node-nfs:shared"} for at in ("/shared", place)],
                   "pvcs": [{"claimName": "workspace", "path": at, "existingPvc": True} for at in ("/shared", place)]}
        key = "mounts" if kind == "lepton" else "pvcs"
        here.profile('[env_vars]\nSEEN = "/shared/seen.json"\n', gpus_per_node=2, auto_mount="image",
                     **{key: volumes[key]})
        (here.volume / "tools").mkdir()
        for tool in ("torchrun", "uv", "python", "ray"):
            (here.volume / "tools" / tool).write_text(STAND_IN)
            (here.volume / "tools" / tool).chmod(0o755)
        monkeypatch.setenv("USER", "someone")
        result = here.main(recipe.family, recipe.stage, kind, "--repo-root", ROOT, "--nodes", nodes)
        assert result.code == 0 and len(here.posts) == 1, result.out + result.err
        seen = json.loads((here.volume / "seen.json").read_text())
        assert recipe.script in " ".join(seen["argv"]) and len(here.job.pods) == nodes
        assert seen["env"]["NEMO_RUN_DIR"] == "/shared/airlift/" + recipe.family


def test_the_lock_files_of_embed_and_rerank_are_in_the_budget_or_named(monkeypatch, tmp_path):
    """Each lock file lies beside its script, so that it travels, and all of them together still fit."""
    locks = 0
    for recipe in scanned().values():
        if recipe.family in ("embed", "rerank"):
            for executor in ("lepton", "dgxcloud"):
                found = planned(monkeypatch, tmp_path, executor, recipe)
                locks += sum(entry.path.endswith("uv.lock") for entry in found.tree.entries)
                assert found.plan.fits
    assert locks


# ---------------------------------------------------------------- chat, as its own data prep renders it

WORDS = st.text("aé <\n", max_size=4)
STEP = st.fixed_dictionaries({"content": WORDS, "thought": WORDS, "answers": st.lists(WORDS, min_size=1, max_size=2)})
TURN = st.fixed_dictionaries({"question": WORDS, "steps": st.lists(STEP, max_size=2), "thought": WORDS,
                              "answer": WORDS})
TOOLS = [{"type": "function", "function": {"name": "add", "description": "sum", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}]


def dialogue_of(turns, tools):
    """Messages: each turn a question, steps with one tool call for each answer of a tool, and the assistant's answer."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        for step in turn["steps"] if tools else []:
            call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": ["é", {"z": None}]}}}
            messages.append({"role": "assistant", "content": step["content"], "reasoning_content": step["thought"],
                             "tool_calls": [call] * len(step["answers"])})
            messages += [{"role": "tool", "content": answer} for answer in step["answers"]]
        messages.append({"role": "assistant", "content": turn["answer"], "reasoning_content": turn["thought"]})
    return messages


@settings(deadline=None, max_examples=300)
@given(st.lists(TURN, min_size=1, max_size=3), st.booleans(), st.sampled_from(["", "be brief"]),
       st.sampled_from(["nano3", "lightning35"]))
def test_each_answer_is_learned_behind_what_nvidias_data_prep_puts_before_it(turns, tools, system, template):
    """Their sequences repeat the turns before; ours hold several answers where the template lets them."""
    sys.path.insert(0, str(prepare.HERE / "src"))
    from starter import chat
    from starter.dialogue import parse_dialogue

    prep = ROOT / "src/nemotron/data_prep"
    theirs = runpy.run_path(str(prep / "core/chat_template.py"))
    tokenizer = chat.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [chat.START, "<think>", "</think>"]})
    tokenizer.chat_template = (prep / "templates" / (template + ".jinja")).read_text()
    tools = TOOLS if tools else None
    messages = [{"role": "system", "content": system}] * bool(system) + dialogue_of(turns, tools)

    wanted = []
    for chunks, _ in theirs["create_masked_messages"](messages, tokenizer, tools):
        before = ""
        for chunk in chunks:
            if chunk["role"] == "assistant":
                wanted.append((before, chunk["content"].removesuffix("\n")))  # what the model never has to write
            before += chunk["content"]
    found = []
    for one in chat.encode(parse_dialogue(json.dumps({"messages": messages, "tools": tools}).encode()), tokenizer):
        edges = [i for i in range(1, len(one.ids)) if one.mask[i] != one.mask[i - 1]] + [len(one.ids)]
        found += [(tokenizer.decode(one.ids[:start]), tokenizer.decode(one.ids[start:end]))
                  for start, end in itertools.pairwise(edges) if one.mask[start]]
    assert found == wanted


# Profiles of its documentation that are refused, and why.
STAY_REFUSED = {
    r"packager is not supported": "what is packed is said in other words here, and passing over it would send other files",
    r"profile \S+ extends '\w+', which does not exist": "its parent is in another block",
}


def documented():
    """(a TOML block of NVIDIA's documentation, the names of its profiles)."""
    for page in sorted(ROOT.rglob("*.md")):
        for block in re.finditer(r"(?ms)^[ \t]*```toml[^\n]*\n(.*?)^[ \t]*```", page.read_text(errors="replace")):
            text = textwrap.dedent(block.group(1))
            with contextlib.suppress(tomllib.TOMLDecodeError):
                names = [name for name, keys in tomllib.loads(text).items() if name not in profiles.NOT_PROFILES
                         and isinstance(keys, dict) and {"executor", "extends"} & set(keys)]
                yield from [(text, names)] * bool(names)


def test_the_profiles_of_the_documentation_load(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON_ENV_FILE", str(tmp_path / "env.toml"))
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "home"))
    loaded, refused = 0, Counter()
    for text, names in documented():
        (tmp_path / "env.toml").write_text(text)
        for name in names:
            try:
                found = profiles.load(name)
                loaded += 1
                assert found.settings.get("workspace") or found.executor != "local", "there are outputs to keep"
            except transport.Refusal as refusal:
                refused[next((why for why in STAY_REFUSED if re.search(why, refusal.what)), refusal.what)] += 1
    print(loaded, "of", loaded + refused.total(), "load; refused:", dict(refused))
    assert set(refused) <= set(STAY_REFUSED) and loaded > 8 * refused.total() > 0

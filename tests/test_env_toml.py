"""env.toml, as NVIDIA's launcher has it: where it is found, its sections as profiles, its [wandb] and [artifacts], the
keys that NVIDIA's documentation uses; and mounts, executor by executor."""

import json
from pathlib import Path

import inside
import layout
import pytest
from layout import recipe, write

import jobs
import launch
import profiles
from transport import Refusal


class World:
    """A checkout with a recipe, a folder of profiles, and a working directory below a project."""

    def __init__(self, place, monkeypatch, capsys):
        self.place, self.monkeypatch, self.capsys = place, monkeypatch, capsys
        self.profiles, self.project = place / "airlift/profiles", place / "project"
        self.profiles.mkdir(parents=True)
        self.here = self.project / "deep/er"
        self.here.mkdir(parents=True)
        self.yaml("{}\n")
        monkeypatch.setattr(profiles, "FOLDER", self.profiles)
        monkeypatch.chdir(self.here)
        monkeypatch.setenv("AIRLIFT_HOME", str(place / "home"))
        for name in (*jobs.TOKENS, "NEMOTRON_ENV_FILE", "GONE"):
            monkeypatch.delenv(name, raising=False)

    def yaml(self, text, **fields):
        recipe(self.project, yaml=text, **({"nodes": 1, "gpus": 1} | fields))

    def env(self, text, folder=None):
        path = write((folder or self.project) / "env.toml", text)
        inside.allow(path)
        return path

    def plan(self, profile, *words):
        code, out, err = self.say("nano3", "sft", profile, "--json", "--repo-root", self.project, *words)
        assert (code, err) == (0, ""), err
        return json.loads(out)

    def say(self, *words):
        self.capsys.readouterr()
        code = launch.main([str(word) for word in words])
        said = self.capsys.readouterr()
        assert "a bug" not in said.err
        return code, said.out, said.err


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    return World(tmp_path, monkeypatch, capsys)


def refusal(call, *args):
    with pytest.raises(Refusal) as caught:
        call(*args)
    assert caught.value.code == 2
    return str(caught.value)


LOCAL = 'executor = "local"\n'


# ---------------------------------------------------------------- where it is found


def test_it_is_looked_for_upwards_to_the_first_project(world):
    assert profiles.env_file() is None and profiles.sections() == {}
    top = world.env("[a]\n" + LOCAL, world.place)
    assert profiles.env_file() == top
    (world.project / "pyproject.toml").touch()
    assert profiles.env_file() is None  # it lies above the project
    beside = world.env("[b]\n" + LOCAL)
    assert profiles.env_file() == beside and profiles.names() == ["b"]  # beside the pyproject.toml counts
    nearest = world.env("[c]\n" + LOCAL, world.here)
    assert profiles.env_file() == nearest
    nearest.unlink()
    nearest.mkdir()  # a folder of that name is none
    assert profiles.env_file() == beside


def test_the_variable_names_it(world):
    world.env("[found]\n" + LOCAL)
    named = write(world.place / "elsewhere/my.toml", "[named]\n" + LOCAL)
    world.monkeypatch.setenv("NEMOTRON_ENV_FILE", str(named))
    assert profiles.names() == ["named"] and profiles.load("named").files == (str(named),)
    world.monkeypatch.setenv("HOME", str(world.place))
    world.monkeypatch.setenv("NEMOTRON_ENV_FILE", "~/elsewhere/my.toml")
    assert profiles.env_file() == named
    world.monkeypatch.chdir(named.parent)
    world.monkeypatch.setenv("NEMOTRON_ENV_FILE", "my.toml")
    assert profiles.env_file() == named
    world.monkeypatch.setenv("NEMOTRON_ENV_FILE", "")  # as if it were not set
    world.monkeypatch.chdir(world.here)
    assert profiles.names() == ["found"]


@pytest.mark.parametrize("named", ["/nowhere/env.toml", "~nobody-of-that-name/env.toml", "."])
def test_a_file_that_is_named_and_not_there_is_refused(world, named):
    world.env("[found]\n" + LOCAL)
    world.monkeypatch.setenv("NEMOTRON_ENV_FILE", named)
    want = "NEMOTRON_ENV_FILE names %s, which does not exist\ncorrect it, or unset it" % named
    for call in (profiles.env_file, profiles.names, profiles.sections):
        assert refusal(call) == want
    assert world.say("profiles") == (2, "", "airlift: %s\n" % want)


def test_a_working_directory_that_was_removed_has_none(world):
    world.env("[found]\n" + LOCAL)
    write(world.profiles / "local.toml", LOCAL)
    world.here.rmdir()
    assert profiles.names() == ["local"]
    assert world.plan("local")["recipe"]["name"] == "nano3/sft"


# ---------------------------------------------------------------- its sections


def test_a_section_wins_over_a_file_of_its_name(world):
    write(world.profiles / "mine.toml", LOCAL + 'nodes = 1\nworkspace = "of-the-file"\n')
    path = world.env("[mine]\n" + LOCAL + "nodes = 3\n")
    mine = profiles.load("mine")
    assert mine.keys == {"executor": "local", "nodes": 3} and mine.files == (str(path),)


def test_extends_across_sections_and_files(world):
    write(world.profiles / "base.toml", LOCAL + "nodes = 2\n[env_vars]\nA = 'file'\nB = 'file'\n")
    write(world.profiles / "leaf.toml", "extends = 'middle'\n[env_vars]\nC = 'leaf'\n")
    path = world.env("[middle]\nextends = 'base'\n[middle.env_vars]\nB = 'env.toml'\n[middle.stages.sft]\nnodes = 5\n")
    leaf = profiles.load("leaf", "sft")
    assert leaf.keys == {"executor": "local", "nodes": 2, "env_vars": {"A": "file", "B": "env.toml", "C": "leaf"}}
    assert leaf.stage == {"nodes": 5}
    assert leaf.files == (str(world.profiles / "leaf.toml"), str(path), str(world.profiles / "base.toml"))
    world.env("[base]\nextends = 'leaf'\n[middle]\nextends = 'base'\n")
    assert refusal(profiles.load,
                   "leaf").startswith("profiles extend each other in a cycle: leaf -> middle -> base -> leaf")
    world.env("[middle]\nextends = 'bass'\n")
    assert refusal(profiles.load, "leaf") == (
        "profile middle extends 'bass', which does not exist\ndid you mean base? (read: %s/*.toml, %s)" % (world.profiles, path))


def test_a_path_begins_where_it_is_written(world):
    world.monkeypatch.setenv("HOME", "/home/me")
    write(world.profiles / "file.toml", LOCAL + "repo_root = '../of-the-file'\nworkspace = 'out'\n")
    world.env("[inherits]\nextends = 'file'\n[own]\nextends = 'file'\nrepo_root = '.'\nworkspace = '~/w'\n"
              "[staged]\nextends = 'file'\n[staged.stages.sft]\nworkspace = 'sft-out'\n")
    airlift = world.profiles.parent
    assert profiles.load("inherits").keys["repo_root"] == str(airlift.parent / "of-the-file")
    assert profiles.load("inherits").keys["workspace"] == str(airlift / "out")
    assert profiles.load("own").keys["repo_root"] == str(world.project)
    assert profiles.load("own").keys["workspace"] == "/home/me/w"
    assert profiles.load("staged", "sft").stage == {"workspace": str(world.project / "sft-out")}
    write(world.profiles / "below.toml", "extends = 'own'\n")
    assert profiles.load("below").keys["repo_root"] == str(world.project)
    code, out, err = world.say("nano3", "sft", "own", "--json")  # without --repo-root
    assert (code, err) == (0, "") and json.loads(out)["recipe"]["name"] == "nano3/sft"


def test_an_alias_and_its_name_across_layers(world):
    world.env('[a]\nexecutor = "docker"\ncontainer_image = "a"\n[a.stages.sft]\ncontainer_image = "a-sft"\n'
              '[b]\nextends = "a"\ncontainer = "b"\n[b.stages.sft]\ncontainer = "b-sft"\n')
    found = profiles.load("b", "sft")
    assert (found.keys["container_image"], found.stage["container_image"]) == ("b", "b-sft")


def test_what_is_no_profile(world):
    write(world.profiles / "local.toml", "# Here.\n" + LOCAL)
    path = world.env("[wandb]\nproject = 'p'\n[artifacts]\nroot = '/a'\n[cache]\ngit_dir = '/c'\n[cli]\ntheme = 't'\n"
                     "[mine]\n" + LOCAL + "[broken]\nexecutor = 'lokal'\n")
    assert profiles.names() == ["broken", "local", "mine"]
    code, out, err = world.say("profiles", "--json")
    assert (code, err) == (0, "") and json.loads(out) == [
        {"name": "broken", "executor": "?", "about": "from %s" % path},
        {"name": "local", "executor": "local", "about": "Here."},
        {"name": "mine", "executor": "local", "about": "from %s" % path}]
    for name in profiles.NOT_PROFILES:
        assert refusal(profiles.load, name).startswith(
            "profile %r does not exist\ndid you mean broken or local or mine? (read: " % name)
    write(world.profiles / "cache.toml", LOCAL)  # a file of that name is one
    assert profiles.load("cache").executor == "local"


@pytest.mark.parametrize(("text", "said"), [
    ("nodes = 3\n[a]\n" + LOCAL, "the key nodes is in no section\nmove it below the [name] of a profile"),
    ("[a]\nexecutor = \n", "is not TOML: Invalid value (at line 2, column 12)\nfix the file"),
    ("[[a]]\n" + LOCAL, "the key a is in no section\nmove it below the [name] of a profile"),
])
def test_a_file_that_cannot_be_used(world, text, said):
    path = world.env(text)
    write(world.profiles / "local.toml", LOCAL)
    for words in (["profiles"], ["nano3", "sft", "local", "--dry-run", "--repo-root", world.project]):
        code, out, err = world.say(*words)
        assert (code, out) == (2, "") and err.startswith("airlift: %s" % path) and err.endswith(said + "\n")


# ---------------------------------------------------------------- variables


@pytest.mark.parametrize(("text", "read"), [
    ("${env:SET}", "here"), ("${oc.env:SET}", "here"), ("a ${env:SET}/${oc.env:SET} b", "a here/here b"),
    ("${oc.env:SET,no}", "here"), ("${oc.env:GONE,yes}", "yes"), ("${oc.env:GONE,}", ""),
    ("${oc.env:GONE, x y }", "x y"),
    ("${oc.env:GONE,''}", ""), ('${oc.env:GONE,"a b"}', "a b"), ("${oc.env:GONE,a,b}", "a,b"),
    ("${oc.env:GONE,https://host/api/v1}", "https://host/api/v1"),
    ("${oc.env:GONE,${oc.env:SET}/x}", "here/x"), ("${oc.env:GONE,${oc.env:GONE,/w}/x}/y", "/w/x/y"),
    ("${oc.env:SET,${oc.env:GONE}}", "here"),  # what is not needed is not asked for
    ("${oc.env:GONE}", "<unset GONE>"), ("${oc.env:GONE,${env:GONE}}", "<unset GONE>"),
    ("${oc.env:REFERS}", "${env:SET}"),  # what was read is not read again
    ("${HOME} ${other:SET} $SET ${oc.env:}", "${HOME} ${other:SET} $SET ${oc.env:}"),
    ("${oc.env:GONE,never ends", "${oc.env:GONE,never ends"), ("${oc.env:GONE,{a}}", "{a}"),
])
def test_variables(world, text, read):
    world.monkeypatch.setenv("SET", "here")
    world.monkeypatch.setenv("REFERS", "${env:SET}")
    world.env("[a]\n" + LOCAL + "run_command = %s\nstartup_commands = [%s]\n" % (json.dumps(text), json.dumps(text)))
    found = profiles.load("a")
    assert found.keys["run_command"] == read and found.keys["startup_commands"] == [read]
    assert found.unset == (("GONE",) if "<unset" in read else ())


def test_a_variable_that_a_child_replaces_need_not_be_set(world):
    world.env("[a]\n" + LOCAL + "run_dir = '${env:GONE}'\n[b]\nextends = 'a'\nrun_dir = 'x'\n")
    assert profiles.load("a").unset == ("GONE",) and profiles.load("b").unset == ()


def test_too_many_variables_in_one_value(world):
    world.env("[a]\n" + LOCAL + "run_dir = '%s'\n" % ("${env:X,${" * 2000))
    assert refusal(profiles.load, "a").endswith("\nwrite the text itself")


# ---------------------------------------------------------------- [wandb] and [artifacts]


def config_of(plan):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(plan["config"]["text"]), resolve=False)


def test_wandb_replaces_the_yamls(world):
    write(world.profiles / "local.toml", LOCAL)
    world.yaml("run: {wandb: {project: yaml, group: yaml}}\nlogger: ${run.wandb.project}/${run.wandb.group}\n")
    assert config_of(world.plan("local"))["logger"] == "yaml/yaml"
    world.monkeypatch.setenv("TEAM", "us")
    world.env("[wandb]\nproject = 'env.toml'\nentity = '${oc.env:TEAM}'\ntags = ['a', 'b']\n")
    plan = world.plan("local")
    assert config_of(plan)["logger"] == "env.toml/${run.wandb.group}"  # replaced, not merged
    assert "the config refers to ${run.wandb.group}, which is not set anywhere" in plan["notes"]
    assert {name: value for name, value in plan["env"].items() if name.startswith("WANDB_")} == {
        "WANDB_PROJECT": "env.toml", "WANDB_ENTITY": "us", "WANDB_TAGS": "a,b", "WANDB_ENABLED": "true",
        "WANDB_NAME": "nano3-sft", "WANDB_JOB_TYPE": "nano3/sft", "WANDB_DIR": str(world.profiles.parent / "output/nano3")}
    plan = world.plan("local", "run.wandb.project=mine", "run.wandb.group=g")
    assert config_of(plan)["logger"] == "mine/g" and plan["env"]["WANDB_ENTITY"] == "us"
    world.yaml("{}\n")
    for bad in ("run.wandb=x", "run.wandb=[1]"):
        code, _, err = world.say("nano3", "sft", "local", bad, "--dry-run", "--repo-root", world.project)
        assert code == 2 and ": run.wandb is " in err and err.endswith("not a table\nfix the config's run section\n")
    assert world.plan("local", "run.wandb.tags=one")["env"]["WANDB_TAGS"] == "one"
    assert world.plan("local", "run.wandb.tags=3")["env"]["WANDB_TAGS"] == "3"


def test_artifacts_go_below_the_yamls(world):
    write(world.profiles / "local.toml", LOCAL)
    world.yaml("artifacts: {backend: wandb}\n")
    world.env("[artifacts]\nbackend = 'file'\nroot = '/shared/artifacts'\n")
    assert config_of(world.plan("local"))["artifacts"] == {"backend": "wandb", "root": "/shared/artifacts"}
    assert config_of(world.plan("local", "artifacts.root=/x"))["artifacts"] == {"backend": "wandb", "root": "/x"}
    world.yaml("a: 1\n")
    assert config_of(world.plan("local"))["artifacts"] == {"backend": "file", "root": "/shared/artifacts"}
    world.yaml("artifacts: [1]\n")
    code, _, err = world.say("nano3", "sft", "local", "--dry-run", "--repo-root", world.project)
    assert code == 2 and ": artifacts is [1], not a table\n" in err


def test_a_variable_of_theirs_that_is_not_set(world):
    write(world.profiles / "local.toml", LOCAL)
    path = world.env("[wandb]\nproject = '${oc.env:GONE}'\n[cache]\ngit_dir = '${oc.env:GONE}'\n")
    assert world.plan("local")["env"]["WANDB_PROJECT"] == "<unset GONE>"  # a dry run shows it
    assert world.say("nano3", "sft", "local", "--repo-root", world.project) == (
        2, "", "airlift: [wandb] of %s reads GONE, which is not set\nexport it, or write the value there\n" % path)


# ---------------------------------------------------------------- keys of NVIDIA's documentation

# Collected from its docs, READMEs and the configs of steps/env/env_toml: a key of an env.toml's profile, the executors
# it is used with there, and a value as it is written there.
ALL = ("local", "docker", "slurm", "lepton", "dgxcloud")
PODS = ALL[1:]
OF_NVIDIA = {
    "executor": (ALL, None), "extends": (ALL, None), "nodes": (ALL, 2), "gpus_per_node": (ALL, 8),
    "nproc_per_node": (ALL, 8), "nprocs_per_node": (ALL, 8), "ntasks_per_node": (ALL, 8), "env_vars": (ALL, {"A": "1"}),
    "startup_commands": (ALL, ["source /opt/env.sh"]), "run_command": (ALL, "python -m a.b --config {config}"),
    "pip_extras": (ALL, ["typer", "rich"]), "workspace": (ALL, "/workspace"), "repo_root": (ALL, "."),
    "container_image": (PODS, "nvcr.io/nvidia/nemo:25.11"), "container": (PODS, "nvcr.io/nvidia/nemo:25.11"),
    "account": (["slurm"], "a"), "partition": (["slurm"], "batch"), "run_partition": (["slurm"], "interactive"),
    "batch_partition": (["slurm"], "backfill"), "cpus_per_task": (["slurm"], 4), "time": (["slurm"], "04:00:00"),
    "mem": (["slurm"], "0"), "exclusive": (["slurm"], True), "tunnel": (["slurm"], "ssh"), "host": (["slurm"], "login"),
    "user": (["slurm"], "me"), "identity": (["slurm"], "~/.ssh/id_rsa"), "remote_job_dir": (["slurm"], "/lustre/me"),
    "lustre_mount": (["slurm"], ""), "setup_lines": (["slurm"], "module load x"),
    "runtime": (["docker"], "nvidia"), "ipc_mode": (["docker"], "host"), "shm_size": (["docker"], "16g"),
    "nemo_run_dir": (["lepton"], "/nemo_run"), "resource_shape": (["lepton"], "gpu.8xh100-80gb"),
    "node_group": (["lepton"], "g"), "node_reservation": (["lepton"], "r"), "shared_memory_size": (["lepton"], 65536),
    "image_pull_secrets": (["lepton", "dgxcloud"], ["reg"]), "pre_launch_commands": (["lepton"], ["pip install x"]),
    "queue_priority": (["lepton", "dgxcloud"], "mid-4000"), "can_be_preempted": (["lepton", "dgxcloud"], True),
    "can_preempt": (["lepton"], True), "ray_version": (["lepton"], "2.48.0"),
    "head_resource_shape": (["lepton"], "cpu.large"), "existing_ray_cluster": (["lepton"], "c"),
    "base_url": (["dgxcloud"], "https://h/api/v1"), "kube_apiserver_url": (["dgxcloud"], "https://k"),
    "client_id": (["dgxcloud"], "i"), "client_secret": (["dgxcloud"], "s"), "app_id": (["dgxcloud"], "i"),
    "app_secret": (["dgxcloud"], "s"), "project_name": (["dgxcloud"], "p"),
    "pvc_nemo_run_dir": (["dgxcloud"], "/pvc/x"),
    "pvcs": (["dgxcloud"], [{"claimName": "c", "path": "/pvc", "readOnly": False}]),
    "distributed_framework": (["dgxcloud"], "PyTorch"), "dgxcloud_max_args_chars": (["dgxcloud"], 9500),
    "custom_spec": (["lepton", "dgxcloud"], {"schedulerName": "runai-scheduler"}),
    "mounts": (["docker", "slurm"], ["/lustre:/lustre"]),
}
# What changes nothing here: named in the notes of a section, refused in a file of profiles/.
NAMED = {
    "build_partition": "cpu", "build_time": "02:00:00", "build_cache_dir": "/lustre/x", "build_image": "docker://x",
    "build_include_gpus": False, "build_gpus_per_node": 0, "code_src_dir": "/workspace/_nemotron/src", "apptainer": True,
}
# What would change something, and is not to be had here.
NOT_HERE = {
    "launcher": ("torchrun", "the recipe's header says how it is launched; remove it"),
    "packager": ("git", "Airlift packs the tree itself; exclude and scope say what is sent"),
    "packager_include_pattern": ("src/**/*.py", "Airlift packs the tree itself; exclude and scope say what is sent"),
}
NEEDED = {
    "local": "", "docker": "", "slurm": 'account = "a"\npartition = "p"\nremote_job_dir = "/j"\n',
    "lepton": 'node_group = "g"\nresource_shape = "s"\n',
    "dgxcloud": 'base_url = "u"\nclient_id = "i"\nclient_secret = "s"\nproject_name = "p"\n',
}


def section(executor, key, value):
    """A section's text with that key, and with what the executor needs besides."""
    from cloud import toml

    alias = profiles.KEYS[key].alias if key in profiles.KEYS else ""
    needed = [line for line in NEEDED[executor].splitlines() if line.split()[0] not in (key, alias)]
    return "\n".join(["[x]", 'executor = "%s"' % executor, *needed, "%s = %s" % (key, toml(value)), ""])


@pytest.mark.parametrize("key", [key for key, (_, value) in OF_NVIDIA.items() if value is not None])
def test_a_key_of_nvidias_is_accepted(world, key):
    executors, value = OF_NVIDIA[key]
    for executor in ALL:
        world.env(section(executor, key, value))
        found = profiles.load("x")
        if executor in executors:
            kept = found.keys[profiles.KEYS[key].alias or key]
            assert kept == value if key not in profiles.PATHS else Path(kept).is_absolute()
            assert found.notes == ()
        elif found.notes:  # NVIDIA's launcher passes over what is another executor's; here it is said
            assert found.notes == ("profile x: %s has no effect: it is for %s" % (
                profiles.KEYS[key].alias or key, ", ".join(profiles.KEYS[key].executors)),)
            assert key not in found.keys
        else:
            assert key == "mounts"  # the clouds have mounts of another kind; a launch looks at them


@pytest.mark.parametrize("key", NAMED)
def test_a_key_that_changes_nothing_is_named(world, key):
    assert key in profiles.UNUSED
    text = section("slurm", key, NAMED[key])
    world.env(text)
    plan = world.plan("x")
    assert "profile x: %s has no effect: %s" % (key, profiles.UNUSED[key]) in plan["notes"]
    (world.project / "env.toml").unlink()
    write(world.profiles / "x.toml", text.replace("[x]\n", ""))
    assert refusal(profiles.load, "x") == "profile x: %s is not supported\n%s; remove it" % (key,
                                                                                               profiles.UNUSED[key])


@pytest.mark.parametrize("key", NOT_HERE)
def test_a_key_that_cannot_be_had_is_refused_with_the_reason(world, key):
    value, reason = NOT_HERE[key]
    for executor in ALL:
        world.env(section(executor, key, value))
        assert refusal(profiles.load, "x") == "profile x: %s is not supported\n%s" % (key, reason)


def test_no_key_is_both_known_and_refused():
    assert set(OF_NVIDIA) <= set(profiles.KEYS)
    assert set(NAMED) == set(profiles.UNUSED) and set(NOT_HERE) <= set(profiles.REFUSED)
    assert not set(profiles.KEYS) & (set(profiles.REFUSED) | set(profiles.UNUSED))


@pytest.mark.parametrize("executor", ["skypilot", "kubeflow"])
def test_executors_that_are_not_here(world, executor):
    world.env("[x]\nexecutor = '%s'\n" % executor)
    assert refusal(profiles.load, "x") == ("profile x: executor %s is not supported\n"
                                           "use one of local, docker, lepton, dgxcloud, slurm" % executor)


def test_an_unknown_key_is_named_and_forbids_nothing(world):
    """Such files are shared with other tools. A config may read it, unless it is or holds a secret."""
    world.monkeypatch.setenv("MY_TOKEN", "canary-" + "x" * 20)
    world.env("[x]\n" + LOCAL + "node = 2\nmine = 'for me'\nother_token = 'abcdefgh12345'\ncopied = 'a ${oc.env:MY_TOKEN}'\n")
    world.yaml("a: ${run.env.mine}\nb: ${run.env.other_token}\nc: ${run.env.copied}\n")
    plan = world.plan("x")
    assert "profile x: node is no key of Airlift's, and has no effect; did you mean nodes?" in plan["notes"]
    assert "profile x: mine is no key of Airlift's, and has no effect" in plan["notes"]
    assert config_of(plan) == {"a": "for me", "b": "${run.env.other_token}", "c": "${run.env.copied}"}
    assert "canary" not in json.dumps(plan)
    world.env("[x]\n" + LOCAL + "packager = 'code'\n")
    assert "packager is not supported" in refusal(profiles.load, "x"), "what is refused stays so"
    world.env("[x]\n" + LOCAL + "[x.stages.sft]\nbuild_time = '1'\n[x.stages.rl]\nbuild_partition = 'x'\n")
    assert [note.split(": ")[1] for note in profiles.load("x", "sft").notes] == ["build_time has no effect"]


def test_a_token_in_env_vars_is_not_said_to_stay_here(world):
    world.monkeypatch.setenv("HF_TOKEN", "hf_value")
    world.env("[x]\n" + LOCAL + "[x.env_vars]\nHF_TOKEN = \"${oc.env:HF_TOKEN,''}\"\n")
    plan = world.plan("x")
    assert plan["env"]["HF_TOKEN"] == "***" and "hf_value" not in json.dumps(plan)
    said = [note for note in plan["notes"] if "HF_TOKEN" in note]
    assert said == ["HF_TOKEN is sent as a plain variable; in [secrets] it would stay out of files and records"]


# ---------------------------------------------------------------- who wins, on the command line

@pytest.mark.parametrize("top", range(1, 7))
def test_the_order_of_who_wins(world, top):
    """header < the rest of the YAML's run.env < profile < the YAML's five keys < stages < KEY=VALUE < --nodes."""
    use = ["header", "yaml's rest", "profile", "yaml's five", "stage", "forced", "flag"][: top + 1]
    yaml = {}
    if "yaml's rest" in use:
        yaml |= {"shm_size": "1g"}
    if "yaml's five" in use:
        yaml |= {"container_image": "yaml", "nodes": 4, "gpus_per_node": 4}
    world.yaml("run: {env: %s}\n" % json.dumps(yaml), image="header", nodes=1, gpus=1)
    text = '[x]\nexecutor = "docker"\n'
    if "profile" in use:
        text += 'container_image = "profile"\nnodes = 3\ngpus_per_node = 3\nshm_size = "3g"\n'
    if "stage" in use:
        text += '[x.stages.sft]\ncontainer_image = "stage"\nnodes = 5\ngpus_per_node = 5\nshm_size = "5g"\n'
    world.env(text)
    forced = ["run.env.container_image=forced", "run.env.nodes=6", "run.env.gpus_per_node=6", "run.env.shm_size=6g"]
    words = (forced if "forced" in use else []) + (["--nodes", "7"] if "flag" in use else [])
    seen = []
    world.monkeypatch.setattr(jobs, "unpacking", lambda settings: seen.append(settings) or {"unpack": "local"})
    found = world.plan("x", *words)["recipe"]
    level = {"header": 1, "yaml's rest": 1, "profile": 3, "yaml's five": 4, "stage": 5, "forced": 6, "flag": 6}[use[-1]]
    names = {1: "header", 3: "profile", 4: "yaml", 5: "stage", 6: "forced"}
    assert (found["image"], found["gpus_per_node"]) == (names[level], level)
    assert found["nodes"] == (7 if "flag" in use else level)
    shm = {"yaml's rest": "1g", "profile": "3g", "yaml's five": "3g", "stage": "5g"}  # shm_size is not of the five
    assert seen[0]["shm_size"] == shm.get(use[-1], "6g")


# ---------------------------------------------------------------- mounts

AUTO = "${auto_mount:git+https://host/org/x.git@main,/opt/x}"
TABLE = {"path": "/", "mount_path": "/shared", "from": "node-nfs:s"}


def mounts(world, executor, yaml=(), ours=None, extra=""):
    world.yaml("run: {env: {mounts: %s}}\n" % json.dumps(list(yaml)), image="i")
    text = section(executor, "mounts", ours) if ours is not None else '[x]\nexecutor = "%s"\n%s' % (
        executor, NEEDED[executor])
    world.env(text + extra)
    seen = []
    world.monkeypatch.setattr(jobs, "unpacking", lambda settings: seen.append(settings) or {"unpack": "local"})
    code, out, err = world.say("nano3", "sft", "x", "--json", "--repo-root", world.project)
    if code:
        return err
    notes = [note for note in json.loads(out)["notes"] if "mount" in note or "clone" in note or "inside the image" in note]
    return seen[0].get("mounts"), notes


@pytest.mark.parametrize("executor", ["slurm", "docker"])
def test_strings_where_there_are_hosts(world, executor):
    yaml, notes = (["/y:/y"], ["the config, not your profile, mounts /y:/y"]) if executor == "slurm" else ([], [])
    assert mounts(world, executor, yaml, ["/p:/p"]) == ([*yaml, "/p:/p"], notes)


def test_clones_and_bind_mounts_of_repositories(world):
    assert mounts(world, "slurm", [AUTO], ["/p:/p"]) == ([AUTO, "/p:/p"], [])
    cloned = "each pod clones https://host/org/x.git at main to /opt/x"
    for executor in ("docker", "lepton", "dgxcloud"):
        assert mounts(world, executor, [AUTO]) == ([AUTO], [cloned])
    assert mounts(world, "lepton", [AUTO], extra='[x.git_mirrors]\n"https://host/" = "https://mirror/"\n')[1] == [
        cloned.replace("https://host/", "https://mirror/")]
    assert mounts(world, "lepton", [AUTO], extra='auto_mount = "image"\n')[1] == ["/opt/x: the copy inside the image is used"]
    said = mounts(world, "lepton", ["${auto_mount:https://host/x}"])
    assert said == ("airlift: the mount ${auto_mount:https://host/x} cannot be parsed\n"
                    "write ${auto_mount:git+https://host/path.git@ref,/target}\n")


def test_a_string_that_a_yaml_brings_to_a_cloud_is_named(world):
    for executor in ("lepton", "dgxcloud"):
        assert mounts(world, executor, ["/y:/y"]) == (
            [], ["/y:/y is not mounted: on %s there is no host folder to mount" % executor])
    assert mounts(world, "local", ["/y:/y"]) == ([], ["/y:/y is not mounted: local pods see the files of this machine"])


def test_a_string_that_the_profile_brings_to_a_cloud_is_refused(world):
    assert mounts(world, "lepton", [], ["/p:/p"]) == (
        "airlift: the mount /p:/p is not possible on lepton\nwrite a table with path, mount_path and from\n")
    assert mounts(world, "dgxcloud", [], ["/p:/p"]) == (
        "airlift: the mount /p:/p is not possible on dgxcloud\nuse pvcs for volumes\n")
    assert mounts(world, "dgxcloud", [], [TABLE]).endswith(" is not possible on dgxcloud\nuse pvcs for volumes\n")
    for executor in ("lepton", "dgxcloud"):
        assert "is not possible on " + executor in mounts(
            world, executor, [], extra='[x.stages.sft]\nmounts = ["/p:/p"]\n')


def test_tables_on_lepton_and_pvcs_on_runai(world):
    assert mounts(world, "lepton", [AUTO], [TABLE])[0] == [AUTO, TABLE]
    world.yaml("{}\n")
    world.env(section("dgxcloud", "pvcs", [{"claimName": "c", "path": "/pvc", "existingPvc": True}]))
    assert world.plan("x")["env"]["HF_HOME"] == "/pvc/hf"


# ---------------------------------------------------------------- references within a profile


def test_a_key_in_another_value_and_numbers_from_variables(world):
    world.monkeypatch.setenv("N", "3")
    world.monkeypatch.setenv("WHO", "ada")
    world.env("[x]\nexecutor = 'slurm'\nnodes = '${env:N}'\ngpus_per_node = '${oc.env:GONE,4}'\nexclusive = '${oc.env:GONE,true}'\n"
              "user = '${oc.env:WHO}'\nhome = '/lustre/${user}'\nremote_job_dir = '${home}/jobs'\nretries = '${env:GONE}'\n"
              "startup_commands = ['echo ${user}']\naccount = '${nodes}'\n")
    profile = profiles.load("x")
    assert profile.unset == ("GONE",), "a dry run goes on without it"
    keys = profile.keys
    assert (keys["nodes"], keys["gpus_per_node"], keys["exclusive"]) == (3, 4, True)
    assert (keys["remote_job_dir"], keys["account"]) == ("/lustre/ada/jobs", "3") and "retries" not in keys
    assert keys["startup_commands"] == ["echo ${user}"], "that is the shell's"


@pytest.mark.parametrize(("text", "said"), [
    ("nodes = '${env:WORD}'", "nodes is 'many'"), ("user = '${user}'", "user contains ${user}, which is not replaced"),
    ("user = '${account}'\naccount = '${user}'", "which is not replaced"), ("user = '${nobody}'", "user contains ${nobody}")])
def test_references_that_lead_nowhere(world, text, said):
    world.monkeypatch.setenv("WORD", "many")
    world.env("[x]\nexecutor = 'slurm'\nremote_job_dir = '/j'\n%s\n" % text)
    assert said in refusal(profiles.load, "x")


def test_an_empty_default_is_no_missing_key(world):
    world.env("[x]\nexecutor = 'slurm'\nremote_job_dir = \"${oc.env:GONE,''}\"\n")
    assert world.plan("x")["recipe"]["name"] == "nano3/sft"
    assert "profile x reads the value of remote_job_dir, which is not set" in world.say(
        "nano3", "sft", "x", "--repo-root", world.project)[2]


def test_the_env_toml_of_the_tree_that_is_named_is_used_where_none_is_nearer(world, tmp_path):
    """By --repo-root, or by a profile's repo_root, whose [wandb] then counts."""
    write(world.profiles / "mine.toml", LOCAL + 'repo_root = "%s"\n' % world.project)
    world.monkeypatch.chdir(tmp_path)
    path = world.env("[there]\nexecutor = 'local'\n[wandb]\nproject = 'theirs'\n")
    assert world.plan("there")["profile"]["files"] == [str(path)]
    code, out, err = world.say("nano3", "sft", "mine", "--json")
    assert (code, err) == (0, "") and json.loads(out)["env"]["WANDB_PROJECT"] == "theirs"
    near = world.env("[there]\nexecutor = 'local'\nnodes = 2\n", tmp_path)
    assert world.plan("there")["profile"]["files"] == [str(near)]
    near.unlink()
    (world.place / "home/allowed.json").unlink()
    assert "is not used, since anybody may have put it there" in world.say(
        "nano3", "sft", "there", "--repo-root", world.project)[2]


# What OmegaConf 2.4.0 makes of them, with A=a and GONE not set.
DEFAULTS = ["${oc.env:A}", "${oc.env:A,x}", "${oc.env:GONE,x}", "${oc.env:GONE,${oc.env:A}}", "${oc.env:GONE,${oc.env:GONE,x}}",
            "${oc.env:GONE,'x y'}", '${oc.env:GONE,"x,y"}', "${oc.env:GONE,''}", "${oc.env:GONE, x }", "p/${oc.env:A}/${oc.env:GONE,q}",
            "${oc.env:GONE,${oc.env:A}/x}", "${oc.env:A,${oc.env:GONE,x}}", "${oc.env:GONE,12}"]


@pytest.mark.parametrize("text", DEFAULTS)
def test_defaults_are_read_as_omegaconf_reads_them(world, monkeypatch, text):
    from omegaconf import OmegaConf
    monkeypatch.syspath_prepend(layout.REPO / "src")
    from starter.config import fill_references
    monkeypatch.setenv("A", "a")
    wanted = OmegaConf.create({"v": text}).v
    assert profiles.resolve(text, []) == wanted == fill_references(text)

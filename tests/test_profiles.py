"""profiles/: loading, extends, stages, variables and strict keys. Who wins is in test_jobs.py."""

import json
import re
import shutil
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import allow, refusal
from layout import REPO, recipe, write
from support import toml

import launch
import profiles
from transport import LIMITS, Refusal

SHIPPED = sorted(path.stem for path in (REPO / "profiles").glob("*.toml"))
READ = {"LEPTON_NODE_GROUP", "LEPTON_STORAGE", "LEPTON_GCP_NODE_GROUP", "RUNAI_BASE_URL", "RUNAI_CLIENT_ID",
        "RUNAI_CLIENT_SECRET", "RUNAI_PROJECT", "SLURM_HOST", "SLURM_USER", "SLURM_ACCOUNT", "SLURM_JOB_DIR"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A profiles folder of this test's own, empty, with no variable set that a shipped profile reads."""
    place = tmp_path / "airlift" / "profiles"
    place.mkdir(parents=True)
    monkeypatch.setattr(profiles, "FOLDER", place)
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "home"))
    for name in READ:
        monkeypatch.delenv(name, raising=False)
    return place


@pytest.fixture
def shipped(folder):
    for name in SHIPPED:
        shutil.copy(REPO / "profiles" / (name + ".toml"), folder)
    return folder


# ---------------------------------------------------------------- the shipped ones


def test_there_is_one_for_every_executor(shipped):
    assert {"local", "docker", "slurm", "lepton", "lepton_gcp", "dgxcloud"} <= set(SHIPPED)
    assert {profiles.load(name).executor for name in SHIPPED} == set(LIMITS)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_dry_runs_with_nothing_set(shipped, tmp_path, capsys, name):
    profile = profiles.load(name)
    assert set(profile.unset) <= READ
    recipe(tmp_path)
    assert launch.main(["nano3", "sft", name, "--dry-run", "--json", "--repo-root", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["profile"]["name"] == name and plan["payload"]["fits"]
    for variable in profile.unset:
        assert "<unset %s>" % variable in json.dumps([profile.keys, profile.stage])


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("local", "docker")])
def test_a_launch_names_the_variables_that_are_not_set(shipped, tmp_path, capsys, monkeypatch, name):
    recipe(tmp_path)
    unset = profiles.load(name).unset
    assert unset
    assert launch.main(["nano3", "sft", name, "--repo-root", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == "airlift: profile %s reads %s, which %s not set\nexport %s, or write the value into %s\n" % (
        name, ", ".join(unset), "is" if len(unset) == 1 else "are", "it" if len(unset) == 1 else "them",
        shipped / (name + ".toml"))
    assert said.out == ""
    for variable in unset:
        monkeypatch.setenv(variable, "x")
    profiles.load(name).require_set()


def test_the_overview_tells_what_each_is(shipped):
    write(shipped / "broken.toml", "executor = [")
    rows = {name: (executor, about) for name, executor, about in profiles.overview()}
    assert rows["local"] == ("local", "Pods are processes on this machine; nothing but Python is needed.")
    assert rows["lepton_gcp"][0] == "lepton" and rows["broken"] == ("?", "")
    assert all(about for name, (_, about) in rows.items() if name not in ("broken", "lepton_gcp"))


# ---------------------------------------------------------------- extends, stages, variables


def test_extends_merges_tables_and_replaces_lists(folder):
    write(folder / "top.toml", """\
        executor = "lepton"
        node_group = "a"
        resource_shape = "gpu.8x"
        startup_commands = ["one", "two"]
        [env_vars]
        A = "top"
        B = "top"
        [custom_spec.deep]
        x = 1
        y = [1, 2]
        [stages.rl]
        nodes = 4
        [stages.rl.env_vars]
        R = "top"
        """)
    write(folder / "mid.toml", """\
        extends = "top"
        node_group = "b"
        startup_commands = ["three"]
        [env_vars]
        B = "mid"
        [custom_spec.deep]
        y = [3]
        [stages.rl]
        gpus_per_node = 2
        """)
    write(folder / "low.toml", 'extends = "mid"\n[env_vars]\nC = "low"\n')
    low = profiles.load("low", "rl")
    assert low.keys == {
        "executor": "lepton", "node_group": "b", "resource_shape": "gpu.8x", "startup_commands": ["three"],
        "env_vars": {"A": "top", "B": "mid", "C": "low"}, "custom_spec": {"deep": {"x": 1, "y": [3]}}}
    assert low.stage == {"nodes": 4, "gpus_per_node": 2, "env_vars": {"R": "top"}}
    assert low.files == tuple(str(folder / (name + ".toml")) for name in ("low", "mid", "top"))


@pytest.mark.parametrize(("stage", "nodes"), [
    ("rl", 2), ("rl/stage1_rlvr", 3), ("rl/stage1_rlvr/x", 3), ("rl/stage2", 2), ("rlhf", 1), ("rl2/x", 1), ("sft", 1),
    ("data/prep", 7), ("data/prep/rl", 8), ("data/prepare", 1), ("data", 1), ("", 1)])
def test_stages_are_prefixes_longest_last(folder, stage, nodes):
    write(folder / "p.toml", """\
        executor = "local"
        nodes = 1
        [stages."rl/stage1_rlvr"]
        nodes = 3
        [stages.rl]
        nodes = 2
        [stages."data/prep/rl"]
        nodes = 8
        [stages."data/prep"]
        nodes = 7
        """)
    profile = profiles.load("p", stage)
    assert (profile.keys | profile.stage)["nodes"] == nodes


def test_environment_variables_are_read(folder, monkeypatch):
    monkeypatch.setenv("HERE", "value")
    monkeypatch.delenv("GONE", raising=False)
    write(folder / "p.toml", """\
        executor = "local"
        workspace = "/x/${env:HERE}/${oc.env:HERE}"
        run_command = "${env:GONE} ${oc.env:GONE,fallback} ${oc.env:HERE,no} ${env:GONE,}| ${other:HERE} ${HERE}"
        exclude = ["${env:GONE}", "a"]
        [env_vars]
        A = "${env:HERE}"
        [stages.rl]
        run_dir = "${env:GONE_TOO}"
        """)
    profile = profiles.load("p", "rl")
    assert profile.keys["workspace"] == "/x/value/value"
    assert profile.keys["run_command"] == "<unset GONE> fallback value | ${other:HERE} ${HERE}"
    assert profile.keys["exclude"] == ["<unset GONE>", "a"]
    assert profile.keys["env_vars"] == {"A": "value"}
    assert profile.unset == ("GONE", "GONE_TOO")


def test_a_variable_of_another_stage_need_not_be_set(folder):
    write(folder / "p.toml", """
        executor = "local"
        [stages."rl/".env_vars]
        X = "${env:ONLY_RL}"
    """)
    assert profiles.load("p", "sft").unset == () and profiles.load("p", "rl/stage1").unset == ("ONLY_RL",)
    assert profiles.load("p", "rl").stage == {"env_vars": {"X": "<unset ONLY_RL>"}}


def test_what_nothing_would_replace_is_refused(folder):
    write(folder / "p.toml", """
        executor = "local"
        startup_commands = ["echo ${HOME}"]
        env_vars = { A = "${HOME}/x" }
        workspace = "/shared/${user_dir}/x"
    """)
    assert refusal(profiles.load, "p").what == "profile p: workspace contains ${user_dir}, which is not replaced"


def test_the_env_toml_of_a_launch_counts_wherever_we_are(folder, tmp_path, monkeypatch):
    write(tmp_path / "a/env.toml", '[mine]\nexecutor = "local"\nnodes = 3')
    write(tmp_path / "b/env.toml", '[mine]\nexecutor = "local"\nnodes = 4')
    monkeypatch.chdir(tmp_path / "b")
    with profiles.pinned(str(tmp_path / "a/env.toml")):
        assert profiles.load("mine").keys["nodes"] == 3
    allow(tmp_path / "b/env.toml")
    with profiles.pinned(None):
        assert profiles.load("mine").keys["nodes"] == 4


def test_paths_of_this_machine_begin_at_the_launchers_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write(folder / "a.toml", 'executor = "local"\nworkspace = "out/../output"\nrepo_root = "~/src"\n')
    write(folder / "b.toml", 'executor = "docker"\nworkspace = "/workspace"\nrepo_root = "../checkout"\n')
    assert profiles.load("a").keys["workspace"] == str(folder.parent / "output")
    assert profiles.load("a").keys["repo_root"] == "/home/me/src"
    assert profiles.load("b").keys["workspace"] == "/workspace"
    assert profiles.load("b").keys["repo_root"] == str(folder.parent.parent / "checkout")


# ---------------------------------------------------------------- refusals

BAD = [
    # (text, what, fix)
    ("", "profile p has no executor", "add executor = one of local, docker, lepton, dgxcloud, slurm"),
    ('executor = "lepten"', "profile p: executor 'lepten' is not known", "did you mean lepton?"),
    ("executor = 3", "profile p: executor 3 is not known", "did you mean "),
    ('executor = ["local"]', "profile p: executor ['local'] is not known", "did you mean local?"),
    ("executor = ", "p.toml is not TOML: Invalid value", "fix the file"),
    ("a = " + "[" * 5000, "p.toml is not TOML: ", "fix the file"),
    ("a = " + "9" * 5000, "p.toml is not TOML: ", "fix the file"),
    ("executor = 'local'\nexecutor = 'local'", "p.toml is not TOML: Cannot overwrite a value", "fix the file"),
    ('extends = "p"', "profiles extend each other in a cycle: p -> p", "remove one extends"),
    ('extends = "q"', "profiles extend each other in a cycle: p -> q -> p", "remove one extends"),
    ('extends = "lokal"', "profile p extends 'lokal', which does not exist", "did you mean local?"),
    ("extends = 3", "p.toml: extends is 3", 'write extends = "name"'),
    ('extends = ["local"]', "p.toml: extends is ['local']", 'write extends = "name"'),
    ('executor = "local"\nenv_var = {}', "profile p: there is no key 'env_var'", "did you mean env_vars?"),
    ('executor = "local"\nzzzz = 1', "profile p: there is no key 'zzzz'", "did you mean "),
    ('executor = "local"\nnodes = "2"', "profile p: nodes is '2'", "it must be a whole number, 1 or more"),
    ('executor = "local"\nnodes = true', "profile p: nodes is True", "it must be a whole number, 1 or more"),
    ('executor = "local"\nnodes = 0', "profile p: nodes is 0", "it must be a whole number, 1 or more"),
    ('executor = "local"\ngpus_per_node = -1', "gpus_per_node is -1", 'it must be a whole number, 0 or more, or "gpu"'),
    ('executor = "local"\ngpus_per_node = "all"', "gpus_per_node is 'all'", 'or "gpu"'),
    ('executor = "local"\nstartup_commands = "ls"', "startup_commands is 'ls'", "it must be a list of strings"),
    ('executor = "local"\nexclude = [1]', "exclude is [1]", "it must be a list of strings"),
    ('executor = "local"\nworkspace = 1', "workspace is 1", "it must be a string"),
    ('executor = "local"\nenv_vars = "A=1"', "env_vars is 'A=1'", "it must be a table"),
    ('executor = "local"\nenv_vars = {"A B" = 1}', "env_vars is ***", "see A B: a name may have letters"),
    ('executor = "local"\nenv_vars = {A = [1], TOKEN = "hush"}', "env_vars is ***", "see A: a name may have letters"),
    ('executor = "local"\nenv_vars = {A = "\\u0000"}', "env_vars is ***", "without NUL"),
    ('executor = "local"\ncompression = "zip"', "compression is 'zip'", "it must be xz or gz"),
    ('executor = "local"\nunpack = "everywhere"', "unpack is 'everywhere'", "it must be local"),
    ('executor = "slurm"\nexclusive = 1', "exclusive is 1", "it must be true or false"),
    ('executor = "slurm"\nmounts = "a:b"', "mounts is 'a:b'", "it must be a list of strings or tables"),
    ('executor = "slurm"\nmounts = [1]', "mounts is [1]", "it must be a list of strings or tables"),
    ('executor = "dgxcloud"\npvcs = ["a"]', "pvcs is ['a']", "it must be a list of tables"),
    ('executor = "dgxcloud"\nclient_secret = 12345', "client_secret is ***", "it must be a string"),
    ('executor = "dgxcloud"\napp_secret = 12345', "client_secret is ***", "it must be a string"),
    ('executor = "local"\nnode_group = "x"', "profile p: node_group is not for executor local",
     "it is for lepton; remove"),
    ('executor = "lepton"\naccount = "x"', "profile p: account is not for executor lepton",
     "it is for slurm; remove it"),
    ('executor = "slurm"\nchunk_bytes = 9', "chunk_bytes is not for executor slurm", "it is for local, docker, lepton"),
    ('executor = "local"\ncontainer_image = "x"', "container_image is not for executor local", "docker, slurm, lepton"),
    ('executor = "docker"\ncontainer = "x"\ncontainer_image = "y"', "container_image is set twice, once as an alias",
     "keep one of them"),
    ('executor = "local"\nntasks_per_node = 1\nnprocs_per_node = 1', "nproc_per_node is set twice", "keep one of them"),
    ('executor = "lepton"\nnode_group = "x"', "profile p lacks resource_shape", "see profiles/lepton.toml"),
    ('executor = "local"\nstages = 3', "profile p: stages is 3", "write tables like [stages.rl]"),
    ('executor = "local"\nstages = {rl = 3}', "profile p: stages.rl is 3", "write a table [stages.rl]"),
    ('executor = "local"\n[stages.sft]\nnode = 3', "profile p, stages.sft: there is no key 'node'",
     "did you mean nodes"),
    ('executor = "local"\n[stages.sft]\nnodes = "3"', "profile p, stages.sft: nodes is '3'", "a whole number"),
    ('executor = "local"\n[stages.sft]\nqueue_priority = "3"', "stages.sft: priority is not for executor local",
     "it is for lepton"),
    ('executor = "local"\n[stages.data.prep]\nnodes = 3', "profile p: stages.data has no key 'prep'",
     'write [stages."data/prep"]'),
    ('executor = "local"\n[stages.sft]\nexecutor = "docker"', "stages.sft sets executor", "at the top of the profile"),
    ('executor = "local"\n[stages.sft]\nextends = "x"', "stages.sft sets extends", "set it at the top of the profile"),
    ('executor = "local"\n[stages.sft]\nstages = {}', "stages.sft sets stages", "set it at the top of the profile"),
]


@pytest.mark.parametrize(("text", "what", "fix"), BAD, ids=[re.sub(r"\s+", " ", case[0])[:40] for case in BAD])
def test_a_bad_profile_is_refused(folder, text, what, fix):
    write(folder / "p.toml", text)
    write(folder / "q.toml", 'extends = "p"')
    write(folder / "local.toml", 'executor = "local"')
    for stage in ("", "sft"):
        found = refusal(profiles.load, "p", stage)
        assert what in found.what and fix in found.fix
        assert "hush" not in str(found) and "12345" not in str(found)


def test_unknown_profiles_name_the_nearest(shipped):
    assert str(refusal(profiles.load, "leptn")) == (
        "profile 'leptn' does not exist\ndid you mean lepton or lepton_gcp? (read: %s/*.toml)" % shipped)
    assert "did you mean dgxcloud or docker or" in refusal(profiles.load, "zzz").fix
    for name in ("../profiles/local", "", ".", "local.toml", "local\0"):
        assert "does not exist" in refusal(profiles.load, name).what


def test_a_file_that_is_no_text_or_no_file(folder):
    (folder / "p.toml").write_bytes(b'executor = "\xff"')
    assert "p.toml is not TOML: it is not UTF-8" in refusal(profiles.load, "p").what
    (folder / "q.toml").mkdir()
    assert refusal(profiles.load, "q").what.endswith("q.toml cannot be read: Is a directory")
    (folder / "r.toml").symlink_to("gone")
    assert refusal(profiles.load, "r").what.endswith("r.toml cannot be read: No such file or directory")
    assert [row[1] for row in profiles.overview()] == ["?", "?", "?"]


def test_every_key_has_a_kind_that_can_be_checked():
    for name, key in profiles.KEYS.items():
        assert profiles.must_be(name, object()), name
        assert not key.alias or profiles.KEYS[key.alias].alias == ""
        assert set(key.executors) <= set(LIMITS)
    for required in profiles.REQUIRED.values():
        assert set(required) <= set(profiles.KEYS)


SCALARS = st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.floats(), st.sampled_from(
    ["local", "lepton", "slurm", "gpu", "${env:NOPE}", "${oc.env:PATH,x}", "p", "xz"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["rl", "path", "nodes"]), inner, max_size=3), max_leaves=6)
NAMES = st.sampled_from(sorted(profiles.KEYS)) | st.text(max_size=5)


def load_any(folder, text):
    (folder / "p.toml").write_text(text, encoding="utf-8", errors="replace")
    try:
        profile = profiles.load("p", "rl")
    except Refusal as found:
        assert found.code == 2 and found.what and found.fix
        return None
    assert profile.executor in LIMITS
    return profile


FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.text(max_size=60) | st.lists(st.sampled_from(
    ["[", "]", "executor", "=", '"local"', "\n", "[stages.rl]", "nodes", "1", "'", ".", "{", "}", ",", "extends", '"p"',
     "#"]),
    max_size=20).map(" ".join))
def test_any_text_is_a_profile_or_a_refusal(folder, text):
    load_any(folder, text)


@FUZZ
@given(st.sampled_from(sorted(LIMITS)) | SCALARS, st.dictionaries(NAMES, VALUES, max_size=4),
       st.dictionaries(st.sampled_from(["rl", "rl/x", "data"]), st.dictionaries(NAMES, VALUES, max_size=2) | SCALARS,
                       max_size=2))
def test_any_toml_is_a_profile_or_a_refusal(folder, executor, table, stages):
    table = {"executor": executor} | table | ({"stages": stages} if stages else {})
    text = "\n".join("%s = %s" % (json.dumps(key), toml(value)) for key, value in table.items())
    try:
        tomllib.loads(text)
    except ValueError:
        return  # json.dumps spells some characters in ways that TOML does not have
    load_any(folder, text)

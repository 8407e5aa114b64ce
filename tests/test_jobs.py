"""jobs.py: who wins among header, profile, YAML and command line; environment, secrets, mounts and places."""

import re

import pytest
from inside import refusal, shown, swapped
from layout import REPO, recipe, write

import jobs
import profiles
import recipes
import screen
from transport import Refusal


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of profiles, in a launcher's folder of this test's own."""
    place = tmp_path / "airlift" / "profiles"
    monkeypatch.setattr(profiles, "FOLDER", place)
    return place


# ---------------------------------------------------------------- who wins

# For each key the layers that may set it, lowest first, with the value each one gives.
NODES = {"header": 1, "profile": 2, "yaml": 3, "stage": 4, "forced": 5, "flag": 6}

LAYERS = {
    "nodes": NODES,
    "gpus_per_node": {"header": 1, "profile": 2, "yaml": 3, "stage": 4, "forced": 5},
    "nproc_per_node": {"profile": 2, "yaml": 3, "stage": 4, "forced": 5},
    "container_image": {"header": "h", "profile": "p", "yaml": "y", "stage": "s", "forced": "f"},
    "workdir": {"header": "h", "yaml": "y", "profile": "p", "stage": "s", "forced": "f"},
    "run_command": {"yaml": "y", "profile": "p", "stage": "s", "forced": "f"},
    "node_group": {"yaml": "y", "profile": "p", "stage": "s", "forced": "f"},
    "startup_commands": {"yaml": ["y"], "profile": ["p"], "stage": ["s"], "forced": ["f"]},
    "rendezvous_timeout": {"yaml": 1, "profile": 2, "stage": 3, "forced": 4},
}
HEADER_FIELDS = {"container_image": "image"}
CASES = [(key, tuple(layers)[: number + 1]) for key, layers in LAYERS.items() for number in range(len(layers))]


def settle(executor="lepton", *, header=None, profile=None, yaml=None, stage=None, forced=None, flag=None, env=None):
    """The settings of a job over layers that are given as tables; the YAML holds what is forced, as after overrides."""
    fields = {HEADER_FIELDS.get(key, key): value for key, value in (header or {}).items()}
    made = recipes.Recipe("nano3/sft", REPO, "s.py", **{
        "image": None, "launch": "torchrun", "cmd": None, "workdir": None, "config_dir": REPO, "config_default": "d",
        "nodes": 1, "gpus_per_node": 8, "env": env or {}, **fields})
    notes = []
    found = jobs.settings_for(made, profiles.Profile("p", executor, ("p.toml",), profile or {}, stage or {}, ()), flag,
                            (yaml or {}) | (forced or {}), forced or {}, notes)
    return found, notes


@pytest.mark.parametrize(("key", "layers"), CASES, ids=["%s-%s" % (key, layers[-1]) for key, layers in CASES])
def test_the_highest_layer_wins(key, layers):
    given = {layer: {key: LAYERS[key][layer]} for layer in layers if layer != "flag"}
    found, notes = settle(**given, flag=NODES["flag"] if "flag" in layers else None)
    assert found[key] == LAYERS[key][layers[-1]]
    assert notes == []


@pytest.mark.parametrize("alias", ["ntasks_per_node", "nproc_per_node"])
def test_the_yaml_owns_the_count_under_either_name(alias):
    assert settle(profile={"nproc_per_node": 2}, yaml={alias: 4})[0]["nproc"] == 4


def test_container_is_weaker_than_container_image():
    header, profile = {"container_image": "header"}, {"container_image": "profile"}
    assert settle(header=header, yaml={"container": "c"})[0]["container_image"] == "c"
    assert settle(header=header, yaml={"container": "c", "container_image": "ci"})[0]["container_image"] == "ci"
    assert settle(header=header, yaml={"container": "c"}, profile=profile)[0]["container_image"] == "profile"
    assert settle(header=header, yaml={"container_image": None})[0]["container_image"] == "header"


def test_env_vars_merge_and_mounts_add_up():
    found, _ = settle(
        env={"A": "header", "B": "header", "N": 1, "T": True}, yaml={"env_vars": {"B": "yaml", "C": 3, "F": 0.5}},
        profile={"env_vars": {"C": "profile", "D": "profile"}}, stage={"env_vars": {"D": "stage", "E": False}},
        forced={"env_vars": {"E": "forced"}})
    assert found["env_vars"] == {"A": "header", "B": "header", "N": "1", "T": "true", "C": "profile", "D": "stage",
                                 "E": "forced"}
    found, _ = settle("slurm", yaml={"mounts": ["/y:/y"]}, profile={"mounts": ["/p:/p"]})
    assert found["mounts"] == ["/y:/y", "/p:/p"]
    assert settle("slurm", yaml={"mounts": ["/y:/y"]}, stage={"mounts": ["/s:/s"]})[0]["mounts"] == ["/s:/s"]
    assert settle("slurm", yaml={"mounts": ["/y:/y"]}, forced={"mounts": []})[0]["mounts"] == []


def test_tables_merge_as_under_extends():
    profile = {"secrets": {"HF_TOKEN": "lepton:hf"}, "custom_spec": {"a": {"b": 1}, "l": [1]}}
    stage = {"secrets": {"WANDB_API_KEY": "lepton:wb"}, "custom_spec": {"a": {"c": 2}, "l": [2]}}
    found, _ = settle(profile=profile, stage=stage)
    assert found["secrets"] == {"HF_TOKEN": "lepton:hf", "WANDB_API_KEY": "lepton:wb"}
    assert found["custom_spec"] == {"a": {"b": 1, "c": 2}, "l": [2]}


def test_a_table_is_a_mount_of_leptons_wherever_it_stands():
    storage = {"path": "/d", "mount_path": "/data", "from": "node-nfs:s"}
    found, notes = settle("lepton", yaml={"mounts": [storage, "/y:/y"]}, profile={"mounts": [storage]})
    assert found["mounts"] == [storage, storage] and notes == [
        "/y:/y is not mounted: on lepton there is no host folder to mount", "the config, not your profile, mounts %s" % storage]
    assert settle("dgxcloud", yaml={"mounts": [storage]})[0]["mounts"] == []


@pytest.mark.parametrize(("executor", "settings", "said"), [
    ("lepton", {}, "no workspace is set"), ("lepton", {"nemo_run_dir": "/nemo_run"}, "/nemo_run is on none of"),
    ("lepton", {"nemo_run_dir": "/nemo_run", "mounts": [{"mount_path": "/nemo"}]}, "/nemo_run is on none of"),
    ("lepton", {"nemo_run_dir": "/nemo_run/a", "mounts": [{"mount_path": "/nemo_run/"}]}, ""),
    ("lepton", {"nemo_run_dir": "/nemo_run", "existing_ray_cluster": "c"}, ""),
    ("docker", {"workspace": "/w", "mounts": ["${auto_mount:git+https://h/w@m,/w}"]}, "/w is on none of"),
    ("docker", {"mounts": ["~/airlift:/w"]}, ""), ("slurm", {"remote_job_dir": "/lustre"}, ""),
    ("local", {"workspace": "/w"}, ""), ("dgxcloud", {"workspace": "/w"}, ""),
])
def test_where_nothing_is_kept_it_is_said(executor, settings, said):
    note = jobs.not_kept(settings, executor)
    assert said in note and bool(note) == bool(said)


@pytest.mark.parametrize(("values", "nodes", "gpus", "nproc"), [
    ({}, 1, 8, 8), ({"nodes": "8"}, 8, 8, 8), ({"gpus_per_node": "4"}, 1, 4, 4), ({"gpus_per_node": 0}, 1, 0, 1),
    ({"gpus_per_node": "gpu"}, 1, "gpu", "gpu"), ({"nproc_per_node": 2}, 1, 8, 2),
    ({"nproc_per_node": "gpu"}, 1, 8, "gpu"),
    ({"nproc_per_node": 0}, 1, 8, 1), ({"gpus_per_node": 0, "ntasks_per_node": 4}, 1, 0, 4)])
def test_counts(values, nodes, gpus, nproc):
    found, _ = settle(yaml=values)
    assert (found["nodes"], found["gpus_per_node"], found["nproc"]) == (nodes, gpus, nproc)


@pytest.mark.parametrize(("key", "value"), [
    ("nodes", 0), ("nodes", -1), ("nodes", "two"), ("nodes", 1.5), ("nodes", True), ("nodes", "gpu"),
    ("nodes", [1]), ("nodes", {}), ("nodes", "²"), ("nodes", "9" * 5000), ("nodes", "${art:n}"), ("nodes", " 8"),
    ("gpus_per_node", -1), ("gpus_per_node", "all"), ("gpus_per_node", 0.5), ("nproc_per_node", "auto")])
def test_bad_counts(key, value):
    found = refusal(settle, yaml={key: value})
    assert found.what == "%s is %r" % (key, value) and found.fix.startswith("it must be a whole number")


@pytest.mark.parametrize(("executor", "env", "what"), [
    ("lepton", {"env_vars": "A=1"}, "run.env.env_vars is 'A=1'"),
    ("lepton", {"env_vars": {"A": [1]}}, "env_vars is ***"),
    ("lepton", {"env_vars": {"A": None}}, "run.env.env_vars is ***"),
    ("local", {"env_vars": {1: "x"}}, "env_vars is ***"), ("slurm", {"mounts": "/a:/b"}, "mounts is '/a:/b'"),
    ("slurm", {"time": 14400}, "run.env.time is 14400"),
    ("local", {"startup_commands": "ls"}, "startup_commands is 'ls'"),
    ("local", {"workspace": ["x"]}, "run.env.workspace is ['x']"), ("local", {"exclude": {}}, "run.env.exclude is ***"),
    ("slurm", {"time": "1\n#SBATCH --uid=0"}, "run.env.time is '1\\n#SBATCH --uid=0'")])
def test_the_yamls_settings_have_types_too(executor, env, what):
    assert what in refusal(settle, executor, yaml=env).what


def test_what_the_yaml_holds_for_others_is_said_or_passed_over():
    found, notes = settle(yaml={"mystery": 1, "apptainer": True, "account": "a", "time": 1, 3: 4})
    assert notes == ["run.env.apptainer has no effect: the image must have it, or startup_commands install it",
                     "run.env has 3, mystery, which Airlift does not use"]
    assert "account" not in found
    found, notes = settle("local", forced={"node_group": "x"})
    assert notes == ["run.env has node_group, which is not for executor local"]
    assert "node_group" not in found


@pytest.mark.parametrize(("executor", "profile", "said"), [
    ("lepton", {"workdir": "/opt/nemo-rl"}, True), ("local", {"workdir": "/opt/nemo-rl"}, False), ("lepton", {}, False),
    ("slurm", {"workdir": "/opt/nemo-rl", "container_image": ""}, False),
    ("docker", {"workdir": "/w/here", "mounts": ["~/x:/w"]}, False), ("docker", {"workdir": "/work", "mounts": ["~/x:/w"]}, True)])
def test_a_recipe_that_starts_in_its_image_writes_there(executor, profile, said):
    """As NVIDIA's RL recipes do, with checkpoint_dir: results/…"""
    settings, _ = settle(executor, profile={"container_image": "i"} | profile)
    assert ("is lost with the pod" in jobs.starts_in_image(settings, executor)) == said


def test_on_this_machine_outputs_are_kept_in_any_case(folder):
    assert jobs.run_root(settle("local")[0], "nano3") == str(folder.parent / "output/nano3")


def test_the_sandbox_of_nemo_gym_has_its_variables():
    """As NVIDIA's launcher sets them for its super3 recipes."""
    def variables(**box):
        settings, _ = settle("slurm", yaml={"sandbox": box})
        return jobs.environment(settings, {}, "super3/rl", "slurm", "/j/super3")["defaults"]

    assert not [name for name in variables(container="", port=6000) if "SANDBOX" in name]
    found = variables(container="/sandbox.sqsh", port=7000)
    assert {name: value for name, value in found.items() if re.search("SANDBOX|PORT", name)} == {
        "SANDBOX_CONTAINER": "/sandbox.sqsh", "LISTEN_PORT": "7000", "NGINX_PORT": "7000",
        "NEMO_SKILLS_SANDBOX_PORT": "7000", "SANDBOX_COMMAND": "/start-with-nginx.sh",
        "SANDBOX_ENV_VARS": "NEMO_SKILLS_SANDBOX_PORT=7000"}
    assert variables(container="x", command="/run")["SANDBOX_COMMAND"] == "/run"
    assert refusal(variables, container="x", prot=1).what == "sandbox has prot"


def test_a_workspace_that_the_yaml_names_is_anchored_like_the_profiles(folder):
    assert settle("local", yaml={"workspace": "out"})[0]["workspace"] == str(folder.parent / "out")
    assert settle("lepton", yaml={"workspace": "/out"})[0]["workspace"] == "/out"


@pytest.mark.parametrize(("executor", "profile", "root"), [
    ("local", {"workspace": "/w"}, "/w/nano3"), ("slurm", {}, "~/airlift/nano3"),
    ("local", {"workspace": "/w", "run_dir": "r"}, "/w/r"),
    ("local", {"workspace": "/w", "run_dir": "/r"}, "/r"), ("local", {"run_dir": "/r"}, "/r"),
    ("lepton", {"nemo_run_dir": "/n", "mounts": [{"mount_path": "/m"}]}, "/n/nano3"),
    ("lepton", {"mounts": [{"path": "/", "mount_path": "/m"}]}, "/m/nano3"),
    ("dgxcloud", {"pvc_nemo_run_dir": "/p", "pvcs": [{"path": "/v"}]}, "/p/nano3"),
    ("dgxcloud", {"pvcs": [{"path": "/v"}]}, "/v/nano3"), ("slurm", {"remote_job_dir": "/j"}, "/j/nano3"),
    ("docker", {"mounts": ["~/x:/w:ro"]}, "/w/nano3"), ("docker", {}, None)])
def test_where_outputs_are_kept(folder, executor, profile, root):
    assert jobs.run_root(settle(executor, profile=profile)[0], "nano3") == root


@pytest.mark.parametrize("executor", ["docker", "lepton", "dgxcloud", "slurm"])
def test_a_workspace_in_a_pod_is_absolute(executor):
    found = refusal(jobs.run_root, settle(executor, profile={"workspace": "out"})[0], "nano3")
    assert str(found) == "the workspace is 'out'\nit must be an absolute path, as the pod sees it"
    assert refusal(jobs.run_root, settle(executor, profile={"workspace": "~/out"})[0], "nano3").what == "the workspace is '~/out'"


def test_what_goes_to_the_home_on_the_cluster_is_said():
    said = "the job's files%s go to ~/airlift in your home on the cluster; remote_job_dir names another folder that all nodes see"
    assert settle("slurm")[1] == [said % " and outputs"]
    assert settle("slurm", profile={"workspace": "/lustre"})[1] == [said % ""]


def test_what_follows_from_the_settings_is_a_default_and_what_is_named_is_not():
    found, _ = settle("slurm", profile={"remote_job_dir": "/j", "persistent_cache": "/c",
                                        "env_vars": {"VLLM_CACHE_ROOT": "/v", "WANDB_NAME": "n"}})
    made = jobs.environment(found, {"wandb": {"project": "p"}}, "nano3/sft", "slurm", "/j/nano3")
    assert made["env"] == {"WANDB_PROJECT": "p", "VLLM_CACHE_ROOT": "/v", "WANDB_NAME": "n"}
    caches = {name: "/c/" + folder for name, folder in jobs.PERSISTENT_CACHES.items() if name != "VLLM_CACHE_ROOT"}
    assert made["defaults"] == caches | {"HF_HOME": "/j/hf", "WANDB_DIR": "/j/nano3", "WANDB_ENABLED": "true", "WANDB_JOB_TYPE": "nano3/sft"}
    here = jobs.environment(found | {"workspace": "/w"}, {}, "a/b", "local", "/w/a")["defaults"]
    assert here.get("HF_HOME") is None and here["WANDB_DIR"] == "/w/a"
    assert "WANDB_DIR" not in jobs.environment(found, {}, "a/b", "slurm", None)["defaults"]


def test_what_another_tools_login_has_kept(tmp_path, monkeypatch):
    """It is found and named; it is sent where [secrets] says so, and shown nowhere."""
    for name in (*jobs.TOKENS, "HF_HOME", "HF_TOKEN_PATH", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [jobs.login(name) for name in jobs.TOKENS] == [("", "")] * 3
    write(tmp_path / ".netrc", "machine api.wandb.ai login user password canary-1-" + "w" * 30 + "\ndefault login a password b\n")
    write(tmp_path / ".cache/huggingface/token", "canary-2-" + "h" * 30 + "\n")
    write(tmp_path / ".ngc/config", "[CURRENT]\napikey = canary-3-" + "n" * 30 + "\n")
    assert jobs.login("WANDB_API_KEY") == ("canary-1-" + "w" * 30, str(tmp_path / ".netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.example/x")
    assert jobs.login("WANDB_API_KEY") == ("", ""), "the default entry is for no server of theirs"
    wanted, notes = jobs.check_secrets({"HF_TOKEN": "login"}, "lepton")
    assert wanted == {"HF_TOKEN": "login"} and [note for note in notes if "NGC_API_KEY is in %s/.ngc" % tmp_path in note]
    job = jobs.Job("r", "a/b", "lepton", 1, 0, 1, None, {}, {}, wanted | {"NGC_API_KEY": "login"})
    assert jobs.secret_values(job, False) == {"HF_TOKEN": "canary-2-" + "h" * 30, "NGC_API_KEY": "canary-3-" + "n" * 30}
    assert screen.hide("a canary-2-%s b" % ("h" * 30)) == "a *** b"
    write(tmp_path / ".cache/huggingface/token", "")
    assert refusal(jobs.secret_values, job, False).what == "secret HF_TOKEN is not set here"
    for text in ("machine", "\0", "machine api.wandb.ai"):  # broken ones
        write(tmp_path / ".netrc", text)
        assert jobs.login("WANDB_API_KEY") == ("", "")


def test_secrets_are_references():
    assert jobs.check_secrets({"A": "env"}, "local")[0] == {"A": "env"}
    assert jobs.check_secrets({"A": "lepton:a"}, "lepton")[0] == {"A": "lepton:a"}
    for executor, value, fix in [
            ("local", "lepton:a", 'write "env"'), ("local", 3, 'write "env"'), ("lepton", "hf_abc", '"lepton:name"'),
            ("lepton", "lepton:", '"lepton:name"'), ("dgxcloud", "lepton:a", '"runai:')]:
        found = refusal(jobs.check_secrets, {"TOKEN": value}, executor)
        assert found.what == "secrets.TOKEN is not a reference that %s supports" % executor
        assert found.fix.startswith('write "env"') and fix in found.fix and "hf_abc" not in str(found)


def test_a_token_that_is_set_but_not_sent_is_mentioned(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_xyz")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NGC_API_KEY", raising=False)
    assert jobs.check_secrets({}, "local")[1] == [
        "HF_TOKEN is set here but not sent; add it to [secrets] to send it"]
    assert jobs.check_secrets({"HF_TOKEN": "env"}, "local")[1] == [
        "HF_TOKEN is sent by value, in the job's environment"]


def test_a_variable_that_is_named_like_a_secret_is_mentioned_where_it_is_a_plain_one():
    plain = {"DB_PWD": "x", "TOKENIZER_PATH": "/x", "EMPTY_TOKEN": "", "IN_TOKEN": "x"}
    note = "DB_PWD is sent as a plain variable; in [secrets] it would stay out of files and records"
    for executor in ("local", "docker", "lepton", "dgxcloud"):
        assert note in jobs.check_secrets({"IN_TOKEN": "env"}, executor, plain)[1]
    assert not [said for said in jobs.check_secrets({}, "slurm", plain)[1] if "plain variable" in said], "there it is a secret"


# ---------------------------------------------------------------- through the launcher


def test_run_env_reads_the_environment(tmp_path):
    """As NVIDIA's launcher does, which reads run.env by way of OmegaConf."""
    root = swapped(tmp_path, """\
        run:
          nproc_per_node: 8
          env:
            nodes: ${oc.env:MY_NODES,8}
            container_image: /home/${oc.env:MY_USER}/x.sqsh
            executor: slurm
            env_vars: {A: "${oc.env:MY_A,fallback}", B: "${oc.env:PWD}/x", C: "${art:data,path}"}
        """)
    found = shown(root, "nano3", "sft", "mine", "-c", "test", env={"MY_NODES": "3"})
    assert (found["recipe"]["nodes"], found["recipe"]["image"]) == (3, "/home/<unset MY_USER>/x.sqsh")
    assert (found["env"]["A"], found["env"]["B"]) == ("fallback", "/nemo_run/code/x")
    notes = "\n".join(found["notes"])
    for words in ("run.env reads MY_USER", "run.nproc_per_node has no effect", "executor, which only a profile can set",
                  "env_vars.C is sent unchanged"):
        assert words in notes, notes


def test_resources_of_the_header_on_every_executor(tmp_path):
    """gpus_per_node = "gpu", launch = "python", env and workdir."""
    root = tmp_path / "repo"
    recipe(root, "nano3/sft", launch="python", gpus="gpu", nodes=2, env={"A": 1}, workdir="/opt/x")
    tables = {"local": "", "docker": 'container_image = "i"',
              "slurm": 'account = "a"\npartition = "p"\nremote_job_dir = "/l"',
              "lepton": 'node_group = "g"\nresource_shape = "s"\ncontainer_image = "i"',
              "dgxcloud": 'base_url = "u"\nclient_id = "c"\nclient_secret = "s"\nproject_name = "p"\n'
                          'container_image = "i"'}
    text = "".join('[my-%s]\nexecutor = "%s"\n%s\n' % (name, name, rest) for name, rest in tables.items())
    for name in tables:
        found = shown(root, "nano3", "sft", "my-" + name, profile=text)
        assert found["recipe"] | {"image": None} == {
            "name": "nano3/sft", "script": "src/nemotron/recipes/nano3/sft/train.py", "launch": "python", "nodes": 2,
            "gpus_per_node": "gpu", "nproc_per_node": "gpu", "image": None}
        assert found["env"]["A"] == "1" and found["command"].startswith('python "$AIRLIFT_CODE"/src/')


@pytest.mark.parametrize("name, root", [("lr-0.3", "/w/lr-0.3"), ("a.b_c", "/w/a.b_c"), (None, "/w/runs/x")])
def test_an_experiment_has_a_folder_of_its_own(name, root):
    assert jobs.run_root({"workspace": "/w", "run_dir": "runs/x"}, "nano3", name) == root


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "a b", "$(x)", "ä", "x" * 101])
def test_the_name_of_an_experiment_is_one_plain_word(name):
    with pytest.raises(Refusal, match="--name is"):
        jobs.run_root({"workspace": "/w"}, "nano3", name)

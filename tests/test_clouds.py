"""Both clouds: the same launches and promises, against emulated platforms whose pods are real processes. What they share
besides is in test_http.py, test_follow.py and test_common.py."""

import contextlib
import json
import logging
import re
import time
from pathlib import Path

import layout
import pytest
from cloud import EMULATED, HELLO, ON_BOTH_IN_TIME, PLATFORMS, SLOW, cloud, secret_of, seen_in, wait_for

import runs

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- jobs, and what they carry

MEETS = """
    import os, socket, time
    rank, nodes = int(os.environ["NODE_RANK"]), int(os.environ["NNODES"])
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    def reaches(port):
        try: return bool(socket.create_connection(("127.0.0.1", port), 1))
        except OSError: return False
    print("interfaces", [name for _, name in socket.if_nameindex()], "platform reached:", reaches(%d), flush=True)
    if rank == 0:
        server = socket.create_server(("", where[1]))
        names = sorted(server.accept()[0].makefile().readline().strip() for _ in range(nodes - 1))
        print("met", names, flush=True)
    else:
        for _ in range(200):
            try: link = socket.create_connection(where); break
            except OSError: time.sleep(0.02)
        link.sendall(b"rank %%d\\n" %% rank)
"""


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_every_rank_meets_rank_0_and_nothing_else(here, nodes):
    here.recipe(MEETS % here.server.port)
    result = here.launch("--nodes", nodes, "--all-ranks")
    assert (result.code, result.err) == (0, ""), result.out
    mark = "[%d] " if nodes > 1 else "%.0s"
    for rank in range(nodes):
        assert (mark % rank) + "interfaces ['lo'] platform reached: False" in result.out.splitlines()
        assert (mark % rank) + "airlift: rank %d ended with exit code 0" % rank in result.out.splitlines()
    assert (mark % 0) + "met %s" % ["rank %d" % rank for rank in range(1, nodes)] in result.out
    kept = here.volume / "airlift/nano3/runs" / result.run
    assert sorted(path.name for path in kept.iterdir()) == sorted(["config.yaml", "run.json", *(
        "rank-%d.%s" % (rank, end) for rank in range(nodes) for end in ("exit", "log"))])
    assert len(here.posts) == len(here.jobs) == 1


@pytest.mark.parametrize(("here", "nodes", "method"), [
    ("lepton", 2, "gz"), ("dgxcloud", 1, "gz"), ("dgxcloud", 2, "gz"), *(
        pytest.param(kind, nodes, "xz", marks=SLOW) for kind in PLATFORMS for nodes in (1, 2, 4))], indirect=["here"])
def test_the_payload_up_to_the_edge(here, nodes, method):
    here.profile(compression=method)
    first, last = runs.new_run_id(), runs.new_run_id()
    here.monkeypatch.setattr(runs, "new_run_id", lambda: last)  # it has its share in the sum
    fits, over = 0, 1_400_000
    while over - fits > 1:
        middle = (over + fits) // 2
        here.pad(middle)
        fits, over = (middle, over) if here.launch("--json", "--nodes", nodes).code == 0 else (fits, middle)
    here.pad(over)
    result = here.launch("--nodes", nodes)
    assert result.code == 3 and "API object needs" in result.err and "nothing was submitted" in result.err
    assert here.server.requests == []
    for number, (size, run) in enumerate(((fits // 3, first), (fits, last))):
        here.monkeypatch.setattr(runs, "new_run_id", lambda run=run: run)
        here.pad(size)
        result = here.launch("--nodes", nodes)
        assert (result.code, result.err) == (0, ""), result.out
        assert "hello from 0" in result.out and len(here.jobs) == number + 1
    assert fits > (1_120_000 if here.kind == "lepton" or nodes == 1 else 550_000)


@pytest.mark.slow
@pytest.mark.parametrize(("here", "nodes"), [("dgxcloud", 2)], indirect=["here"])  # Lepton's is in test_plan.py
def test_the_real_recipe_trains(here, nodes):
    """nano3/sft of src/starter under torchrun, and a second launch that goes on where the first ended."""
    here.profile(gpus_per_node=0)
    words = ["nano3", "sft", here.kind, "--repo-root", layout.REPO, "--nodes", nodes, "train.checkpoint_every=2"]
    first = here.main(*words, "train.steps=4")
    assert (first.code, first.err) == (0, ""), first.out
    assert "%d ranks on cpu" % nodes in first.out, first.out
    assert "step 4/4" in first.out, first.out
    assert (here.volume / "airlift/nano3/sft/model/config.json").is_file()
    if nodes == 2:
        again = here.main(*words, "train.steps=6")
        assert again.code == 0 and "step 6/6" in again.out and "step 4/" not in again.out


def test_values_arrive_as_they_were_written(here):
    odd = {"lower": "a b; c", "QUOTES": "it's \"so\" \\ `x`", "DOLLAR": "$HOME $(HOSTNAME) $$ ${HOME}", "EMPTY": "",
           "LINES": "a\nb\tc", "UMLAUT": "äöü €"}
    here.profile("[env_vars]\n" + "".join("%s = %s\n" % (name, json.dumps(text)) for name, text in odd.items()))
    here.recipe("import json, os, sys\nprint('SEEN', json.dumps([{name: os.environ.get(name) for name in %r},"
                " open(os.environ['AIRLIFT_CONFIG']).read(), sys.argv[3:]]))" % list(odd), yaml="text: $(A) $$\n")
    result = here.launch("extra=$(B) 'c'", "--", "two words", "$(HOSTNAME)", "--flag='x'")
    assert result.code == 0, result.err
    env, config, args = json.loads(re.search("SEEN (.*)", result.out).group(1))
    assert env == odd and args == ["two words", "$(HOSTNAME)", "--flag='x'"]
    assert "text: $(A) $$\n" in config and "extra: $(B) 'c'" in config
    assert not [name for name, value in here.env().items() if "$" in str(value)]


def test_a_workspace_with_a_hostile_name(here):
    place = "/shared/a b;$(touch x)'\""
    here.profile(**{"nemo_run_dir" if here.kind == "lepton" else "pvc_nemo_run_dir": place})
    here.recipe("import os, pathlib\n(pathlib.Path(os.environ['NEMO_RUN_DIR']) / 'out').write_text('kept')\n"
                "print(open(os.environ['AIRLIFT_CONFIG']).read(), os.environ['HF_HOME'])", yaml="out: /nemo_run/x\n")
    result = here.launch()
    assert result.code == 0, result.err
    assert (here.volume / "a b;$(touch x)'\"" / "nano3/out").read_text() == "kept"
    assert place + "/hf" in result.out and json.dumps(place + "/nano3/x") in result.out


def test_the_environment_of_nvidias_launcher(here):
    names = ["HF_HOME", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_TAGS", "HF_TOKEN", "WANDB_GROUP"]
    here.recipe("import os\nprint([os.environ.get(name) for name in %r])" % names,
                yaml="run: {wandb: {project: p q, entity: e, tags: [a, b], group: g}}\n")
    here.profile("[env_vars]\nWANDB_GROUP = 'mine'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = here.launch()
    assert str(["/shared/airlift/hf", "p q", "e", "nano3-sft", "a,b", None, "mine"]) in result.out, result.err
    assert "note: HF_TOKEN is set here but not sent" in result.out and "hf_secret" not in result.out


def test_what_the_platform_sets_wins_over_our_defaults_and_the_user_over_both(here):
    envs = [{"name": name, "value": "/platform"} for name in ("HF_HOME", "VLLM_CACHE_ROOT", "DG_JIT_CACHE_DIR")]
    here.profile("[env_vars]\nDG_JIT_CACHE_DIR = '/mine'\n", persistent_cache="/shared/cache",
                 custom_spec={"envs" if here.kind == "lepton" else "environmentVariables": envs})
    names = ["HF_HOME", "VLLM_CACHE_ROOT", "DG_JIT_CACHE_DIR", "FLASHINFER_CUBIN_DIR"]
    here.recipe("import os\nprint([os.environ.get(name) for name in %r])" % names)
    result = here.launch()
    assert str(["/platform", "/platform", "/mine", "/shared/cache/flashinfer_cubins"]) in result.out, result.err
    assert "airlift: left as this pod has them: HF_HOME, VLLM_CACHE_ROOT\n" in result.out
    assert (here.volume / "cache/vllm_compile_cache/deep_gemm").is_dir()
    shown = json.loads(here.launch("--json").out)["env"]
    assert (shown["HF_HOME"], shown["DG_JIT_CACHE_DIR"]) == ("/shared/airlift/hf", "/mine")


def test_a_stage_on_one_cpu_node(here):
    here.profile('[stages."data/prep"]\ngpus_per_node = 0\nnodes = 1\n' + 'resource_shape = "cpu.large"\n' * (
        here.kind == "lepton"), nodes=2)
    here.recipe("import os\nprint('prepared by', os.environ['NNODES'])", "nano3/data/prep/sft", gpus=8)
    result = here.launch(stage="data/prep/sft")
    assert (result.code, "prepared by 1" in result.out, "1 node, CPU only" in result.out) == (0, True, True)
    spec = here.job.spec
    assert spec["resource_shape"] == "cpu.large" if here.kind == "lepton" else spec["compute"]["gpuDevicesRequest"] == 0


def test_no_gpus_means_one_process(here):
    here.profile(gpus_per_node=0)
    here.recipe(HELLO, launch="torchrun", gpus=8)
    assert "--nproc-per-node 1 " in json.loads(here.launch("--json").out)["command"]


# ---------------------------------------------------------------- later, from another shell


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=SLOW), 2])
def test_cancel_from_another_process(here, nodes):
    run = here.up("--nodes", nodes)
    process = here.process("cancel", run)
    assert process.communicate(timeout=20) == (
        "%s, nano3/sft on %s: %s %s was cancelled\n" % (
            run, here.kind, "job" if here.kind == "lepton" else "workload", here.job.name), "")
    assert here.job.state == "Stopped" and not any(pod.alive for pod in here.job.pods)
    assert "cancelled" in here.main("status", run).out
    assert "it had already ended" in here.main("cancel", run).out


@ON_BOTH_IN_TIME
def test_four_launches_at_once(here):
    """Each from a process of its own: all are there, also in nemo-run's records, followed, and can be cancelled."""
    here.recipe("import os, time\nprint('up', flush=True)\nwhile not os.path.exists('/shared/go'): time.sleep(0.05)")
    launchers = [here.process("nano3", "sft", here.kind, "--repo-root", here.root) for _ in range(4)]
    wait_for(lambda: len(here.jobs) == 4 and all(job.pods and "up" in job.pods[0].output for job in here.jobs), "", 120)
    rows = json.loads(here.main("status", "--json").out)
    assert len({row["run"] for row in rows}) == 4 and {row["state"] for row in rows} == {"running"}
    wait_for(lambda: {row["run"] for row in rows} <= {name.rpartition("-")[2] for name in here.records})
    stopped = {row["run"] for row in rows[:2]}
    for run in stopped:
        assert here.main("cancel", run).out.endswith("was cancelled\n")
    (here.volume / "go").write_text("")
    codes = []
    for launcher in launchers:
        out, _ = launcher.communicate(timeout=60)
        codes.append((launcher.returncode, re.search(r"run (\w+)\n", out).group(1) in stopped, "up\n" in out))
    assert sorted(codes) == [(0, False, True)] * 2 + [(1, True, True)] * 2


def test_two_in_one_second_and_a_rerun_have_their_own_names(here):
    now = time.time()
    here.monkeypatch.setattr(time, "time", lambda: now)
    assert [here.launch("--detach").code for _ in range(3)] == [0, 0, 0]
    assert len({job.name for job in here.jobs}) == 3


# ---------------------------------------------------------------- nothing lies about


def test_no_chunk_and_no_secret_lies_about(here, caplog):
    """In files of ours and of nemo-run, its logs at DEBUG, the arguments of any process, what a pod prints."""
    from nemo_run.config import get_nemorun_home

    here.profile("[secrets]\nHF_TOKEN = 'env'\n[env_vars]\nMINE = 'plain-value-4711'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf-secret-4711")
    here.pad(200_000)
    for name in [*logging.root.manager.loggerDict, None]:
        logger = logging.getLogger(name)
        here.monkeypatch.setattr(logger, "setLevel", lambda level: None)
        here.monkeypatch.setattr(logger, "level", logging.DEBUG)
        here.monkeypatch.setattr(logger, "disabled", False)
        here.monkeypatch.setattr(logger, "handlers", [caplog.handler])  # nemo-run takes away the root's
    logging.root.manager._clear_cache()
    run = here.up()
    sent = here.env()
    assert sent["HF_TOKEN"] == "hf-secret-4711"
    secrets = ["hf-secret-4711", secret_of(here), "plain-value-4711"]
    for name, value in sent.items():
        if re.match(r"AIRLIFT_[A-Z]+_\d", name):
            secrets += [value[:60], value[-60:]]
    assert len(secrets) > 8
    commands = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands += path.read_bytes()
    assert b"AIRLIFT_POD_SHA256" in commands  # the pod's bootstrap
    shown = here.main("status", run, "--json").out + here.main("cancel", run).out
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert {"urllib3", "nemo_run"} <= {record.name.split(".")[0] for record in caplog.records}
    for secret in secrets:
        assert secret.encode() not in commands
        assert secret not in shown + logged + here.job.pods[0].output
    folders = [get_nemorun_home(), here.place / "airlift", here.place / "home", here.volume]
    assert seen_in(folders, secrets) == []
    assert seen_in(folders, [run])  # the search does find what is there
    assert seen_in([get_nemorun_home()], ["registry.test/nemo:1"])  # also in nemo-run's base64


# ---------------------------------------------------------------- what a profile may add


SECRET = {"lepton": {"secrets": {"my-token": "hf_by $(reference)"}},
          "dgxcloud": {"credentials": {"mine": {"token": "hf_by $(reference)"}}}}
REFERENCE = {"lepton": "lepton:my-token", "dgxcloud": "runai:mine/token"}


@pytest.mark.parametrize("kind", PLATFORMS)
def test_secrets_by_reference_and_by_value(kind, tmp_path, monkeypatch, capsys):
    for here in cloud(kind, tmp_path, monkeypatch, capsys, **SECRET[kind]):
        here.profile("[secrets]\nHF_TOKEN = '%s'\nWANDB_API_KEY = 'env'\n" % REFERENCE[kind])
        here.recipe("import os, base64\nfor name in ('HF_TOKEN', 'WANDB_API_KEY'):\n"
                    "    print(base64.b16encode(os.environ[name].encode()).decode())")
        result = here.launch()
        assert result.code == 2 and "WANDB_API_KEY is not set here" in result.err and here.server.requests == []
        monkeypatch.setenv("WANDB_API_KEY", "by value $(x)")
        result = here.launch()
        assert result.code == 0 and "note: WANDB_API_KEY is sent by value" in result.out
        assert b"hf_by $(reference)".hex().upper() in result.out and b"by value".hex().upper() in result.out
        assert "by value $" not in result.out and "hf_by" not in str(here.env()) + result.out


@pytest.mark.parametrize("source", ["file", "env2", "", "docker:x", "lepton:", "lepton:a b", "runai:only", "runai:a/",
                                    "runai:/b", "runai:a/b/c"])
def test_malformed_references(here, source):
    here.profile("[secrets]\nHF_TOKEN = '%s'\n" % source)
    result = here.launch()
    assert result.code == 2 and "secrets.HF_TOKEN" in result.err and 'write "env"' in result.err
    assert here.server.requests == []

"""pod/rank.py: which pod this is, and where rank 0 listens; never 0 by default."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import failed, plan, ran

from pod import failures
from pod.failures import Failure
from pod.rank import find_master, find_rank, first_host

LEPTON = {"LEPTON_JOB_NAME": "j", "LEPTON_JOB_TOTAL_WORKERS": "3", "LEPTON_SUBDOMAIN": "j-job-svc",
          "LEPTON_JOB_WORKER_PREFIX": "worker", "LEPTON_JOB_WORKER_HOSTNAME_PREFIX": "worker"}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "PET_MASTER_ADDR": "job-master-0",
            "PET_MASTER_PORT": "23456", "JOB_NAME": "job", "POD_INDEX": "0"}
ELASTIC = {"PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "3:3"}
SLURM = {"SLURM_JOB_NODELIST": "dgx[007-009]", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "3"}


@pytest.mark.parametrize("env, host, nodes, rank", [
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "0"}, "worker-0", 3, 0),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "2"}, "j-worker-2.j-job-svc", 3, 2),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "2"}, "j-2-x7f", 3, 2),
    (KUBEFLOW | {"RANK": "0", "PET_NODE_RANK": "0"}, "job-master-0", 3, 0),
    (KUBEFLOW | {"RANK": "1", "PET_NODE_RANK": "1"}, "job-worker-0", 3, 1),
    (KUBEFLOW | {"RANK": "2", "PET_NODE_RANK": "2", "POD_INDEX": "1"}, "job-worker-1.ns.svc", 3, 2),
    (KUBEFLOW, "job-master-0", 3, 0), (KUBEFLOW, "job-worker-1", 3, 2),
    ({"PET_MASTER_ADDR": "job-master-0"}, "job-worker-0", 2, 1),
    ({}, "job-worker-0", 3, 0), ({}, "job-worker-2", 3, 2), ({"POD_INDEX": "2"}, "my-job-worker-2", 3, 2),
    (ELASTIC, "job-worker-0", 3, 0), (ELASTIC, "job-worker-2", 3, 2),
    (SLURM | {"SLURM_NODEID": "0"}, "dgx007", 3, 0), (SLURM | {"SLURM_NODEID": "2"}, "dgx009", 3, 2),
    (SLURM | {"SLURM_NODEID": "0"}, "gpu-worker-7", 3, 0),
    (SLURM | {"SLURM_NODEID": "1", "PET_NODE_RANK": "1"}, "x", 3, 1),
    ({"NODE_RANK": "1"}, "anything", 2, 1), ({"NODE_RANK": " 1 "}, "x-worker-7", 2, 1),
    ({"NODE_RANK": "1", "RANK": "01"}, "job-worker-0", 2, 1),
    ({"NODE_RANK": ""}, "job-worker-1", 2, 1), ({"NODE_RANK": "", "RANK": "1"}, "x", 2, 1),
    ({}, "my-laptop", 1, 0), ({}, "gpu-worker-3", 1, 0), ({"NODE_RANK": "0"}, "x", 1, 0),
    ({"POD_INDEX": "0"}, "job-0-0", 1, 0),
])
def test_rank(env: dict[str, str], host: str, nodes: int, rank: int) -> None:
    assert find_rank(env, host, nodes) == rank


@pytest.mark.parametrize("env, host, nodes, word", [
    ({}, "my-laptop", 2, "no variable"), ({"POD_INDEX": "1"}, "x-1", 2, "no variable"),
    ({"NODE_RANK": ""}, "h", 2, "no variable"),
    ({"NODE_RANK": "0", "RANK": "1"}, "h", 2, "disagree"), ({"RANK": "0"}, "job-worker-1", 2, "disagree"),
    (KUBEFLOW | {"RANK": "0"}, "job-worker-0", 3, "disagree"),
    (LEPTON | {"LEPTON_JOB_WORKER_INDEX": "1", "RANK": "0"}, "h", 3, "dis"),
    ({"SLURM_NODEID": "0", "PET_NODE_RANK": "1"}, "h", 2, "disagree"),
    ({"NODE_RANK": "2"}, "h", 2, "job has 2"), ({"NODE_RANK": "1"}, "h", 1, "job has 1"),
    ({}, "job-worker-2", 2, "job has 2"),
    ({"RANK": "1"}, "h", 1, "job has 1"), (KUBEFLOW, "job-worker-2", 3, "job has 3"),
    ({"NODE_RANK": "one"}, "h", 2, "not a number"), ({"RANK": "-1"}, "h", 2, "not a number"),
    ({"NODE_RANK": "1.0"}, "h", 2, "not a number"), ({"NODE_RANK": "٣"}, "h", 9, "not a number"),
    ({"NODE_RANK": "$SLURM_NODEID"}, "h", 2, "not a number"), ({"NODE_RANK": "9" * 50}, "h", 2, "not a number"),
])
def test_a_rank_that_is_not_certain(env: dict[str, str], host: str, nodes: int, word: str) -> None:
    with pytest.raises(Failure, match=re.escape(word)) as caught:
        find_rank(env, host, nodes)
    assert caught.value.code == failures.RANK


@pytest.mark.parametrize("env, master", [
    (LEPTON, ("worker-0.j-job-svc", "29400")), (LEPTON | {"MASTER_PORT": "7"}, ("worker-0.j-job-svc", "7")),
    (KUBEFLOW, ("job-master-0", "23456")), ({"PET_MASTER_ADDR": "m"}, ("m", "29400")),
    (SLURM, ("dgx007", "24567")), (SLURM | {"SLURM_JOB_ID": "7"}, ("dgx007", "20007")),
    (SLURM | {"MASTER_PORT": "1", "MASTER_ADDR": "m"}, ("m", "1")),
    (SLURM | {"SLURM_JOB_ID": "x"}, ("dgx007", "29400")),
    (SLURM | {"MASTER_PORT": "99"}, ("dgx007", "99")),
])
def test_where_rank_0_listens(env: dict[str, str], master: tuple[str, str]) -> None:
    assert find_master(env, 3) == master


def test_where_rank_0_listens_alone() -> None:
    address, port = find_master({}, 1)
    assert address == "127.0.0.1" and 1024 < int(port) < 65536
    assert find_master({"MASTER_ADDR": "m", "MASTER_PORT": "5"}, 1) == ("m", "5")


def test_nothing_tells_where_rank_0_is() -> None:
    for env in ({}, ELASTIC, {"SLURM_JOB_NODELIST": "[1-2"}, {"SLURM_JOB_NODELIST": ","}):
        with pytest.raises(Failure) as caught:
            find_master(env, 2)
        assert caught.value.code == failures.RANK


@pytest.mark.parametrize("nodelist, host", [
    ("dgx[007-009,012],login1", "dgx007"), ("n[1-2]", "n1"), ("a,b", "a"), ("a", "a"), ("n[3,5-7]", "n3"),
    ("a.b-c_d,e", "a.b-c_d"),
    ("rack[1-2]n[3,5]", "rack1n3"), ("n[1-2]-ib,m", "n1-ib"), ("n[08-10]", "n08"), ("login,dgx[1-2]", "login"),
])
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


PLATFORMS_WORDS = ["NODE_RANK", "RANK", "PET_NODE_RANK", "SLURM_NODEID", "LEPTON_JOB_WORKER_INDEX", "MASTER_ADDR",
                   "MASTER_PORT", "PET_MASTER_ADDR", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"]


@given(st.dictionaries(st.sampled_from(PLATFORMS_WORDS), st.one_of(st.text(max_size=8), st.sampled_from("012"))),
       st.text(max_size=12), st.integers(2, 9))
def test_the_platforms_words_never_end_in_a_traceback(env: dict[str, str], host: str, nodes: int) -> None:
    with contextlib.suppress(Failure):
        rank = find_rank(env, host, nodes)
        assert 0 <= rank < nodes
        said = [int(value) for name, value in env.items() if name in PLATFORMS_WORDS[:5] and value.strip().isdigit()]
        assert set(said) <= {rank}
        assert said or re.search("-(master|worker)-[0-9]", host), "never 0 by default"
    with contextlib.suppress(Failure):
        address, port = find_master(env, nodes)
        assert address and port


def test_a_rank_that_is_not_certain_ends_the_pod(tmp_path: Path) -> None:
    code, out = ran(plan(nodes=2, command="echo RECIPE RAN"), tmp_path, env={"NODE_RANK": "0", "RANK": "1"})
    assert code == failures.RANK
    assert failed(code, out, "?") == "sources disagree: NODE_RANK says 0, RANK says 1"
    assert not out.places
    code, out = ran(plan(nodes=2, command="echo RECIPE RAN"), tmp_path, env={"NODE_RANK": "1"})
    assert code == failures.RANK and "MASTER_ADDR" in failed(code, out, "1")

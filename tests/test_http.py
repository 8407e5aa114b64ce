"""common/http.py: bad credentials, bad moments, certificates and proxies, on both clouds."""

import contextlib
import os
import re
import socket
import ssl
import subprocess
import threading
import time

import pytest
from cloud import EMULATED, HELLO, PLATFORMS, cloud, secret_of

import runs
from backends.common import http

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


def test_bad_credentials(here):
    wrong = "wrong-secret-value-4711"
    here.monkeypatch.setenv("LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET", wrong)
    begin = time.monotonic()
    result = here.launch()
    assert time.monotonic() - begin < 5 and result.code == 4 and len(result.err.splitlines()) == 2
    named = {"lepton": "LEPTON_WORKSPACE_TOKEN", "dgxcloud": "client_secret"}[here.kind]
    assert "HTTP 401" in result.err and named in result.err.splitlines()[1] and wrong not in result.out + result.err
    assert ("invalid or expired token" if here.kind == "lepton" else "wrong secret") in result.err
    assert here.posts == [] and runs.all_runs() == ([], [])


def test_a_secret_that_the_server_repeats_is_not_shown(here):
    here.profile("[secrets]\nHF_TOKEN = 'env'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf_4711 secret")
    here.server.fault("status", status=422, method="POST", path="/(jobs|trainings)$",
                      message="bad body: {'value': 'hf_4711 secret'}, " + secret_of(here))
    result = here.launch()
    assert result.code == 4 and "bad body: {'value': '***'}, ***" in result.err


def test_a_platform_that_is_not_there(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    run = here.up()
    url = "http://127.0.0.1:9/api"
    here.monkeypatch.setenv("LEPTON_WORKSPACE_URL" if here.kind == "lepton" else "RUNAI_BASE_URL", url)
    for words in (["nano3", "sft", here.kind, "--repo-root", here.root], *(
            [] if here.kind == "lepton" else [["status", run], ["logs", run], ["cancel", run]])):
        result = here.main(*words)
        assert result.code == 5 and url in result.err and "cannot be reached" in result.err, result.err


def test_the_table_waits_for_a_silent_platform_once(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    for _ in range(3):
        here.up()
    here.server.fault("drop", times=999)
    seen = len(here.server.requests)
    table = here.main("status")
    assert table.code == 5 and table.out.count("  unknown  ") == 3 and "cannot be reached" in table.out
    assert len(here.server.requests) - seen <= http.READ_RETRIES + 1


def test_a_status_that_cannot_be_read_is_an_error(here):
    """And in the table it does not hide the others."""
    first, name = here.up(), "LEPTON_WORKSPACE_TOKEN" if here.kind == "lepton" else "RUNAI_CLIENT_SECRET"
    (here.folder / "local.toml").write_text('executor = "local"\n')
    here.recipe(HELLO)
    assert here.launch("--nodes", 1, profile="local").code == 0
    here.monkeypatch.setenv(name, "wrong")
    result = here.main("status", first)
    assert result.code == 4 and "HTTP 401" in result.err and result.out == ""
    table = here.main("status")
    assert table.code == 4 and len(table.out.splitlines()) == 1 + 2
    assert re.search(first + r"  unknown .*HTTP 401", table.out) and " local " in table.out


@pytest.mark.parametrize("how", ["--verbose", "AIRLIFT_DEBUG"])
def test_each_request_is_told_with_its_time_where_that_is_asked_for(here, how):
    """On standard error, before and after; without a secret; and nothing of it on standard output."""
    here.profile("[secrets]\nHF_TOKEN = 'env'\n")
    here.monkeypatch.setenv("HF_TOKEN", "hf_4711 secret")
    quiet = here.launch()
    assert (quiet.code, quiet.err) == (0, "")
    seen = len(here.server.requests)
    if how == "AIRLIFT_DEBUG":
        here.monkeypatch.setenv(how, "1")
    told = here.launch(*[how] * (how == "--verbose"))
    lines = told.err.splitlines()
    asked = [line[9:] for line in lines if re.match(r"[\d:]{8} [A-Z]+ http://127\.0\.0\.1:%d/" % here.server.port, line)]
    ended = [line.rpartition(": ")[0] for line in asked if re.search(r": \d+\.\d\d s$", line)]
    assert sorted(ended) == sorted(line for line in asked if not re.search(r": \d+\.\d\d s$", line))
    assert len(ended) == len(here.server.requests) - seen
    for request in here.server.requests[seen:]:
        assert any(line.startswith(request.method) and request.path in line for line in ended), request
    assert all(re.match(r"\d\d:\d\d:\d\d \w+ \S", line) for line in lines)
    assert "hf_4711" not in told.err and secret_of(here) not in told.err
    assert "hello from 0" in told.out and "http://127" not in told.out


TROUBLE = {  # a bad moment, and whether a request that creates survives it by itself
    "429": {"kind": "status", "status": 429, "retry_after": 0.05}, "503": {"kind": "status", "status": 503},
    "500": {"kind": "status", "status": 500}, "drop": {"kind": "drop"}, "reset": {"kind": "reset"},
    "slow": {"kind": "slow", "seconds": 0.2},
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_bad_moment_is_survived(here, trouble):
    """In every request but the one that creates: that is for the tests below."""
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    for path in ("node-groups", "/token", "/projects", r"/(jobs|trainings)/[\w-]+$", "log$"):
        here.server.fault(**TROUBLE[trouble], path=path, times=2)
    if trouble in ("429", "503", "slow"):
        here.server.fault(**TROUBLE[trouble], path="/(jobs|trainings)$", method="POST", times=2)
    result = here.launch()
    assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
    assert len(here.jobs) == 1


@pytest.mark.parametrize("trouble", ["429", "500", "drop", "hang"])
def test_trouble_that_lasts_ends_in_bounded_time(here, trouble):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.monkeypatch.setattr(http, "READ_S", 0.2)
    here.server.fault(**TROUBLE.get(trouble, {"kind": trouble}), times=99)
    begin = time.monotonic()
    result = here.launch()
    assert result.code == 5 and len(result.err.splitlines()) == 2 and time.monotonic() - begin < 5
    assert len(here.server.requests) <= http.RETRIES + 1


@pytest.mark.parametrize("trouble", [{"kind": "drop"}, {"kind": "reset"}, {"kind": "status", "status": 500},
                                     {"kind": "status", "status": 503}, {"kind": "status", "status": 504}])
def test_a_creation_whose_answer_got_lost_is_not_doubled(here, trouble):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault(**trouble, done=True, method="POST", path="/(jobs|trainings)$")
    result = here.launch()
    assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
    assert len(here.jobs) == 1


def test_a_creation_that_never_arrived(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.server.fault("drop", method="POST", path="/(jobs|trainings)$")
    result = here.launch("--detach")
    assert result.code == 5 and "look for nano3-sft-" in result.err and here.jobs == []
    assert len(here.posts) == 1
    assert here.launch("--detach").code == 0


@pytest.mark.parametrize("answer", [b"<html>Please log in</html>", b"[1, 2]", b"", b"{}"])
def test_what_answers_is_not_the_platform(here, answer):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *words):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = "http://127.0.0.1:%d/api/v1" % server.server_address[1]
    here.monkeypatch.setenv("LEPTON_WORKSPACE_URL" if here.kind == "lepton" else "RUNAI_BASE_URL", url)
    result = here.launch()
    server.shutdown()
    server.server_close()
    assert result.code in (4, 5) and "a bug" not in result.err, result.err  # the SDK may have its own word before


# ---------------------------------------------------------------- certificates and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: (its file, its key's file)."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=airlift",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.pem"],
                   cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem", folder / "key.pem"


def relay(port, wrap=lambda connection: connection, head=lambda data: data):
    """Listen on loopback, and pass bytes on to `port`; `head` may change each piece of a request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source, target, change=lambda data: data):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(change(data))
            target.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                try:
                    inner = wrap(connection)
                except OSError:  # the client did not trust us
                    continue
                outer = socket.create_connection(("127.0.0.1", port))
                threading.Thread(target=copy, args=(inner, outer, head), daemon=True).start()
                threading.Thread(target=copy, args=(outer, inner), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


URLS = {"lepton": ("LEPTON_WORKSPACE_URL",), "dgxcloud": ("RUNAI_BASE_URL", "RUNAI_KUBE_APISERVER_URL")}


def test_a_private_certificate_authority(here, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with relay(here.server.port, lambda plain: context.wrap_socket(plain, server_side=True)) as listener:
        for name in URLS[here.kind]:
            url = os.environ[name].replace("http://127.0.0.1:%d" % here.server.port,
                                           "https://127.0.0.1:%d" % listener.getsockname()[1])
            here.monkeypatch.setenv(name, url)
        begin = time.monotonic()
        result = here.launch()
        assert result.code == 5 and "is not trusted (TLS)" in result.err and "ca_bundle" in result.err
        assert time.monotonic() - begin < 5 and here.server.requests == []
        here.profile(ca_bundle=str(certificate[0]))
        here.monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/hostname")  # the profile's own comes first
        result = here.launch()
        assert (result.code, result.err) == (0, "") and "hello from 0" in result.out
        assert here.main("logs", result.run).code == 0
        here.profile(ca_bundle="/no/such/file.pem")
        result = here.launch()
        assert result.code == 2 and "ca_bundle /no/such/file.pem does not exist" in result.err


def test_the_usual_proxy_variables(here):
    passed = []

    def direct(data):
        first = re.match(rb"[A-Z]+ (http://127.0.0.1:%d)/" % here.server.port, data)
        passed.append(bool(first))
        return data.replace(first.group(1), b"", 1) if first else data

    with relay(here.server.port, head=direct) as listener:
        here.monkeypatch.setenv("http_proxy", "http://127.0.0.1:%d" % listener.getsockname()[1])
        here.monkeypatch.setenv("no_proxy", "")
        result = here.launch()
        assert (result.code, result.err) == (0, "") and passed.count(True) == len(here.server.requests)
        here.monkeypatch.setenv("no_proxy", "127.0.0.1")
        seen = len(passed)
        assert here.launch().code == 0 and len(passed) == seen

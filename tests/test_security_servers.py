"""Servers beyond their role (SECURITY.md): one that redirects, that never ends its answer, that repeats secrets, or
writes to the terminal. Each is a hostile server on loopback, and a real session, client or daemon's SDK."""

import base64
import contextlib
import gzip
import json
import re
import resource
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import docker as sdk
import pytest
import requests

import backends
import commands
import screen
from backends import Status, common, docker, lepton, local
from backends.common import follow, http, lepton_client, lepton_ray, runai_client, slurm_watch
from backends.common.ssh import Host
from runs import Run
from transport import Refusal

TOKEN, SECRET = 'tok/en+"4711"-quite-long', "s3cret/+&of-the-client"
RUN = Run("t23456", "a/b", "p", "lepton", 1, "0" * 64)


class Server:
    """`answer(handler)` answers every request; `asked` are (method, path, headers, body)."""

    def __init__(self, answer):
        self.asked, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.append((self.command, self.path, dict(self.headers), body))
                with contextlib.suppress(OSError):
                    answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

            def log_message(self, *words):
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that went away is no news
        self.http.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    made = []

    def start(answer):
        made.append(Server(answer))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    monkeypatch.setattr(screen, "CONCEALED", set())
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "airlift"))
    for name in ("http_proxy", "HTTP_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def reply(handler, body=b"{}", status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def redirect(to, status=307):
    return lambda handler: reply(handler, b"", status, Location=to)


def say(value):
    return lambda handler: reply(handler, json.dumps(value).encode())


def endless(head, block, pause=0.0):
    """Sends `head`, then `block` for ever."""
    def answer(handler):
        handler.close_connection = True
        handler.wfile.write(head)
        while True:
            handler.wfile.write(block)
            time.sleep(pause)

    return answer


def runai(url, **settings):
    return runai_client.Client({"base_url": url + "/api/v1", "client_id": "me", "client_secret": SECRET} | settings)


def sdk_client(url, monkeypatch):
    for name, value in {"ID": "ws", "TOKEN": TOKEN, "URL": url + "/api"}.items():
        monkeypatch.setenv("LEPTON_WORKSPACE_" + name, value)
    return lepton_client.connect(None)


def daemon(url, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", url.replace("http:", "tcp:"))
    return docker.connect()


def two_lines(error, *words, code=4):
    assert error.code == code and "\n" not in error.what + error.fix
    assert all(word in error.what for word in words), error.what


# ---------------------------------------------------------------- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("client", ["run:AI token", "run:AI create", "run:AI log", "lepton create", "lepton log", "ray"])
def test_nothing_that_was_sent_goes_to_another_origin(serve, monkeypatch, client, status):
    thief = serve(say({"accessToken": "x"}))
    home = serve(redirect(thief.url + "/api/v1/token", status))
    here = runai(home.url)
    if client != "run:AI token":
        here.token = TOKEN
    cluster = Run("t23456", "a/b", "p", "lepton", 1, "0" * 64, record={"cluster": "c", "job": "j"})
    with pytest.raises(Refusal) as caught:
        if client == "run:AI token":
            here.ask_token()
        elif client == "run:AI create":
            here.call("POST", "/workloads/trainings", "create", {"environment": SECRET})
        elif client == "run:AI log":
            here.send("GET", home.url + "/log", "read the log", stream=True)
        elif client == "lepton create":
            made = sdk_client(home.url, monkeypatch)
            lepton_client.ask_lepton("create", made, lambda: made._post("/jobs", json={"env": SECRET}))
        elif client == "lepton log":
            lepton._stream(sdk_client(home.url, monkeypatch), cluster, 0, "j-0")
        else:
            lepton_ray.stage(sdk_client(home.url, monkeypatch), cluster, SimpleNamespace(program="", env={}))
    two_lines(caught.value, "redirects to another server", home.url, thief.url)
    assert "address" in caught.value.fix and thief.asked == [] and len(home.asked) == 1


def test_dockers_daemon_redirects_nothing_either(serve, monkeypatch):
    thief = serve(say({}))
    home = serve(lambda handler: reply(handler, b'{"ApiVersion": "1.44"}') if handler.path.endswith("/version")
                 else redirect(thief.url)(handler))
    client = daemon(home.url, monkeypatch)
    with pytest.raises(Refusal) as caught:
        docker.ask_docker(lambda: client.api.create_container("plain", environment={"TOKEN": SECRET}))
    two_lines(caught.value, thief.url)
    with pytest.raises(Refusal):
        daemon(serve(redirect(thief.url)).url, monkeypatch)
    assert thief.asked == []


@pytest.mark.parametrize("to", ["/new/place", "{url}/new/place", "//{host}/new/place"])
def test_within_an_origin_a_redirect_is_followed(serve, to):
    def answer(handler):
        if handler.path == "/new/place":
            return reply(handler, b'{"moved": true}')
        return redirect(to.format(url=server.url, host=server.url[7:]))(handler)

    server = serve(answer)
    client = runai(server.url)
    client.token = TOKEN
    assert client.call("POST", "/x", "try", {"a": 1}) == {"moved": True}
    assert [(asked[0], asked[2]["Authorization"], asked[3]) for asked in server.asked] == [
        ("POST", "Bearer " + TOKEN, b'{"a": 1}')] * 2


@pytest.mark.parametrize("here, there, same", [
    ("https://a/x", "https://a:443/y", True), ("https://a/x", "http://a/x", False), ("http://a", "https://a", False),
    ("https://a", "https://a:444", False), ("https://a", "https://A/", True), ("https://a", "https://b@a/", True),
    ("https://a", "https://a@b/", False), ("https://a", "https://a.b", False), ("https://a", "https://a:x/", False),
    ("https://a", "file:///etc/passwd", False), ("https://a", "https://a\\@b/", False), ("https://a", "https://[/", False)])
def test_what_an_origin_is(here, there, same):
    with contextlib.nullcontext() if same else pytest.raises(Refusal):
        http.require_same_origin(requests.Request(url=there), SimpleNamespace(url=here))


def test_a_redirect_that_turns_for_ever_ends(serve):
    server = serve(redirect("/again"))
    client = runai(server.url)
    client.token = TOKEN
    with pytest.raises(Refusal):
        client.call("GET", "/x", "try")
    assert len(server.asked) <= 31


@pytest.mark.parametrize("entry", ["default", "machine 127.0.0.1"])
def test_netrc_is_not_asked(serve, monkeypatch, tmp_path, entry):
    (tmp_path / ".netrc").write_text(entry + " login someone password of-another-server\n")
    (tmp_path / ".netrc").chmod(0o600)
    server = serve(lambda handler: redirect("/moved")(handler) if handler.path == "/api/v1/x" else say({
        "ApiVersion": "1.44", "accessToken": "x"})(handler))
    client = runai(server.url)
    client.ask_token()
    client.token = TOKEN
    client.call("GET", "/x", "try")
    daemon(server.url, monkeypatch)
    assert [asked[2].get("Authorization") for asked in server.asked] == [
        None, "Bearer " + TOKEN, "Bearer " + TOKEN, None]


# ---------------------------------------------------------------- bounds

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BLOCK = b"10000\r\n" + b"a" * 65536 + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {  # (the answer, words of the refusal)
    "chunks": (endless(CHUNKED, BLOCK), "sends more than"),
    "no length": (endless(OK + b"\r\n", b"a" * 65536), "sends more than"),
    "a length that lies": (endless(OK + b"Content-Length: 99999999999999\r\n\r\n", b"a" * 65536), "sends more than"),
    "an error, retried": (endless(b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n", BLOCK), "sends more than"),
    "an error with a length": (endless(b"HTTP/1.1 503 No\r\nContent-Length: 2000000000\r\n\r\n", b"a"), "sends more than"),
    "one chunk's size": (endless(CHUNKED, b"0" * 65536), "without end"),
    "a negative size": (endless(CHUNKED + b"-1\r\n", b"a" * 65536), "sends more than"),
    "trailers": (endless(CHUNKED + b"0\r\n", b"a: b\r\n" * 1000), "without end"),
    "one header": (endless(OK + b"A: ", b"a" * 65536), "without end"),
    "100 Continue": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), "without end"),
    "slow": (endless(CHUNKED, b"1\r\na\r\n", 0.02), "whole answer"),
    "a slow head": (endless(OK, b"A", 0.02), "whole answer"),
    "gzip": (lambda handler: reply(handler, gzip.compress(b"a" * (80 << 20)), Content_Encoding="gzip"), "compressed"),
    "gzip of gzip": (lambda handler: reply(handler, b"", Content_Encoding="gzip, gzip"), "compressed"),
}


def grown(since=None):
    """MiB by which the peak of this process's memory has grown."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return now if since is None else now - since


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_without_end_is_refused(serve, monkeypatch, kind):
    monkeypatch.setattr(http, "MOST", 8 << 20)
    monkeypatch.setattr(http, "ANSWER_S", 2.0 if "slow" in kind else 60.0)
    answer, words = ENDLESS[kind]
    client, before, begun = runai(serve(answer).url), grown(), time.monotonic()
    client.token = TOKEN
    with pytest.raises(Refusal) as caught:
        client.call("GET", "/x", "try")
    two_lines(caught.value, words)
    assert grown(before) < 100 and time.monotonic() - begun < 20


@pytest.mark.parametrize("kind", ["chunks", "gzip", "100 Continue", "an error, retried"])
def test_nor_is_it_in_the_sdks_session(serve, monkeypatch, kind):
    monkeypatch.setattr(http, "MOST", 8 << 20)
    client = sdk_client(serve(ENDLESS[kind][0]).url, monkeypatch)
    with pytest.raises(Refusal) as caught:
        lepton_client.ask_lepton("list", client, client.nodegroup.list_all)
    two_lines(caught.value, ENDLESS[kind][1])


@pytest.mark.parametrize("kind", ["one chunk's size", "trailers", "gzip", "a negative size", "one header"])
def test_nor_the_frame_of_a_log(serve, monkeypatch, kind):
    monkeypatch.setattr(http, "MOST", 8 << 20)
    client, before = runai(serve(ENDLESS[kind][0]).url), grown()
    client.token = TOKEN
    with pytest.raises(Refusal) as caught:
        for _ in http.decoded(client.send("GET", client.base + "/log", "read the log", stream=True)):
            pass
    two_lines(caught.value, ENDLESS[kind][1])
    assert grown(before) < 100


def test_a_log_may_be_of_any_length_and_comes_in_pieces(serve, monkeypatch):
    """Also one chunk that is larger than any answer may be."""
    monkeypatch.setattr(http, "MOST", 4 << 20)

    def answer(handler):
        handler.wfile.write(CHUNKED + b"%x\r\n" % (32 << 20))
        for _ in range(512):
            handler.wfile.write(b"a" * 65536)
        handler.wfile.write(b"\r\n0\r\n\r\n")

    client, before = runai(serve(answer).url), grown()
    client.token = TOKEN
    sizes = [len(text) for text in http.decoded(client.send("GET", client.base + "/log", "read the log", stream=True))]
    assert sum(sizes) == 32 << 20 and max(sizes) <= http.PIECE and grown(before) < 20


@pytest.mark.parametrize("wait", ["9" * 5000, "Fri, 31 Dec 999999999999 23:59:59 GMT", "-1", "1e99", "99999999"])
def test_a_retry_after_that_lies(serve, monkeypatch, wait):
    monkeypatch.setattr(http, "LONGEST_WAIT_S", 0.05)
    server = serve(lambda handler: reply(handler, status=429, Retry_After=wait))
    client, begun = runai(server.url), time.monotonic()
    client.token = TOKEN
    with pytest.raises(Refusal) as caught:
        client.call("GET", "/x", "try")
    two_lines(caught.value, "HTTP 429", code=5)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 100_000])
def test_json_of_any_depth(serve, monkeypatch, body):
    for status in (200, 422):
        client = runai(serve(lambda handler, status=status: reply(handler, body, status)).url)
        with pytest.raises(Refusal):
            client.ask_token()
        client.token = TOKEN
        with pytest.raises(Refusal):
            client.call("GET", "/x", "try")


@pytest.mark.parametrize("fresh", [True, False])
def test_pages_without_end(serve, monkeypatch, fresh):
    monkeypatch.setattr(runai_client, "PAGES", 20)
    server = serve(lambda handler: say({"next": 1, "projects": [
        {"name": "p%d" % (len(server.asked) if fresh else 0), "id": 1, "clusterId": 1}] * 500})(handler))
    client = runai(server.url)
    client.token = TOKEN
    with pytest.raises(Refusal) as caught:
        client.project("mine")
    two_lines(caught.value, "lists more than 1000 projects")
    assert len(server.asked) == 20
    monkeypatch.setattr(http, "ANSWER_S", 0.0001)
    with pytest.raises(Refusal):
        client.project("mine")


def test_a_line_of_64_mb(monkeypatch):
    """It is passed on in parts, the same ones however it came."""
    before, longest, sizes = grown(), 0, []
    for part in follow.lines("a" * 65536 for _ in range(1024)):
        longest, sizes = max(longest, len(part)), [*sizes, len(part)]
    assert (longest, sum(sizes)) == (follow.LONGEST + 1, (64 << 20) + 1) and grown(before) < 50
    monkeypatch.setattr(follow, "LONGEST", 4)
    for text in ("abcdefghij\nk\n\nlmnopqrs\ntuv", "abcd\n", "abcdefgh", "\n"):
        ways = [list(follow.lines([text[at:at + size] for at in range(0, len(text), size)])) for size in range(1, 30)]
        assert all(way == ways[0] for way in ways), ways
        assert "".join(ways[0]) == text + "\n" * (text[-1] != "\n")


def test_a_log_that_nobody_reads_is_not_collected(monkeypatch):
    monkeypatch.setattr(follow, "SO_FAR_S", 0.2)
    made = []
    for _ in follow.so_far("a" * 65536 for number in iter(int, 1) if not made.append(number)):
        time.sleep(0.1)
    count = len(made)
    time.sleep(0.3)
    assert len(made) - count <= 1 and count < 200


def test_rays_log_beyond_its_bound_is_told_and_no_other(serve, monkeypatch, capsys):
    monkeypatch.setattr(http, "MOST", 1 << 20)
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    monkeypatch.setattr(lepton_ray, "POLL_S", 0.01)
    said = {"text": "one\n"}

    def answer(handler):
        running = len(server.asked) < 20
        if handler.path.endswith("/logs"):
            text, said["text"] = said["text"], "one\n" + "a" * (2 << 20)
            return say({"logs": text})(handler)
        return say({"status": "RUNNING" if running else "SUCCEEDED"})(handler)

    server = serve(answer)
    run = Run("t23456", "a/b", "p", "lepton", 1, "0" * 64, record={"cluster": "c", "made": False})
    ended = lepton_ray.follower(run, sdk_client(server.url, monkeypatch)).follow()
    out = capsys.readouterr().out
    assert ended.state == "done" and out.count("one\n") == 1
    assert re.search("-- the log of rank 0 ends here: .* sends more than", out), out


def frames(*pieces):
    return b"".join(b"\1\0\0\0" + length.to_bytes(4, "big") + data for length, data in pieces)


def test_dockers_answers_and_the_frames_of_its_logs(serve, monkeypatch):
    monkeypatch.setattr(http, "MOST", 8 << 20)
    state = {"answer": ENDLESS["chunks"][0]}
    server = serve(lambda handler: say({"ApiVersion": "1.44"})(handler) if handler.path.endswith("/version")
                   else state["answer"](handler))
    client, before = daemon(server.url, monkeypatch), grown()
    for kind in ("chunks", "no length", "gzip"):
        state["answer"] = ENDLESS[kind][0]
        with pytest.raises(Refusal) as caught:
            docker.ask_docker(client.info)
        two_lines(caught.value, ENDLESS[kind][1])

    def log(body):
        def answer(handler):
            if "/logs" not in handler.path:
                return say({"Id": "x", "Config": {"Tty": False}})(handler)
            return reply(handler, body, Content_Type="application/vnd.docker.raw-stream")
        return answer

    state["answer"] = log(frames((3, b"abc"), (2, b"de")))
    assert list(client.containers.get("x").logs(stream=True)) == [b"abc", b"de"]
    state["answer"] = log(frames((3, b"abc"), (0xFFFFFFFF, b"x")))
    pieces = client.containers.get("x").logs(stream=True)
    assert next(pieces) == b"abc"
    with pytest.raises(Refusal):
        next(pieces)
    assert grown(before) < 100 and sdk


# ---------------------------------------------------------------- what a server repeats


def in_forms(secret):
    yield secret
    yield json.dumps(secret)
    yield urllib.parse.quote(secret, "")
    yield urllib.parse.quote_plus(secret)
    yield urllib.parse.quote(secret)
    for before in ("", "a", "me:", "user:x"):
        yield base64.b64encode((before + secret + "\n").encode()).decode()
        yield base64.urlsafe_b64encode((before + secret).encode()).decode()


def remains(text, secret):
    """Whether much of a secret can be read in a text, in any of its forms."""
    runs = {form[at:at + 10] for form in (*in_forms(secret), json.dumps(secret)[1:-1]) for at in range(2, len(form) - 12)}
    return [run for run in runs if run in text and not run.startswith(("user:", "me:"))]


def test_no_form_of_a_secret_is_printed(serve, monkeypatch, capsys):
    for form in in_forms(SECRET):
        client = runai(serve(lambda handler, form=form: reply(handler, json.dumps({
            "message": "wrong: " + form}).encode(), 422)).url)
        client.token = "x"
        with pytest.raises(Refusal) as caught:
            client.call("GET", "/x", "try")
        screen.complain(caught.value.what, caught.value.fix)
        said = capsys.readouterr().err
        assert "wrong: " in said and not remains(said, SECRET), said


def test_tokens_are_hidden_once_they_are_known(serve, monkeypatch):
    client = runai(serve(say({"accessToken": TOKEN})).url)
    client.signed_in()
    assert screen.hide("echo: " + TOKEN) == "echo: ***"
    monkeypatch.setattr(screen, "CONCEALED", set())
    sdk_client("http://127.0.0.1:9", monkeypatch)
    assert screen.hide("echo: " + TOKEN) == "echo: ***"
    job = SimpleNamespace(secrets={"HF": "env", "NGC": "lepton:x"})
    common.sent_by_value(job, SimpleNamespace(env={"HF": "of the job itself", "NGC": "another"}))
    assert screen.hide("echo: of the job itself") == "echo: ***"


def test_nor_does_the_sdk_print_them(serve, monkeypatch, capsys):
    client = sdk_client(serve(say([{"bad": TOKEN + "\x1b[2J", "much": "a" * 100_000}])).url, monkeypatch)
    assert lepton_client.ask_lepton("list", client, client.nodegroup.list_all) == []
    said = capsys.readouterr().err
    assert "Skipped 1 invalid item" in said and TOKEN not in said and "\x1b" not in said and len(said) < 20_000


@pytest.mark.parametrize("at", range(270, 312, 3))
def test_a_secret_is_hidden_before_the_text_is_cut(at):
    screen.conceal(SECRET)
    assert SECRET[:6] not in screen.said("x " * (at // 2) + " " * (at % 2) + SECRET + " rest")


def test_parts_of_what_was_sent_are_not_printed():
    chunk = base64.b64encode(bytes(range(256)) * 40).decode()
    for length in (200, 8000):
        said = screen.said("bad value: '%s'" % chunk[:length])
        assert said == "bad value: '<%d characters>'" % length


def test_the_state_of_a_job_is_what_a_server_says(serve):
    from backends import dgxcloud

    client = runai(serve(say({"phase": "\x1b[2J" + SECRET + "y" * 5000})).url)
    client.token = TOKEN
    run = Run("t23456", "a/b", "p", "dgxcloud", 1, "0" * 64, record={"kind": "trainings", "id": "1", "name": "n"})
    found = dgxcloud._status(client, run)
    assert found.state == "waiting" and len(found.detail) <= 300 and SECRET not in found.detail


# ---------------------------------------------------------------- the terminal

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x08\x00\x7f\x9b31m\u202e\u2066\u2028\nairlift: done"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def test_nothing_of_a_servers_words_reaches_the_terminal_raw(capsys):
    run = Run("t23456", "a/b", "p", "lepton", 1, "0" * 64)
    screen.complain("Lepton: " + HOSTILE, HOSTILE)
    screen.note(HOSTILE)
    print(screen.status_line(Status("running", HOSTILE), run))
    print(screen.run_table([{"run": "t23456", "state": "failed", "age_s": 1, "after": None, "recipe": HOSTILE, "profile": "p",
                             "nodes": 1, "detail": HOSTILE, "job_exit_code": 1}]))
    follow.Follower(run, None, None, None)._say(HOSTILE)
    out, err = capsys.readouterr()
    assert not RAW.search(out + err), repr(out + err)
    assert len(err.splitlines()) == 2 and len(out.splitlines()) == 5
    assert "\\x1b[2J" in out and "\\u202e" in out and "\\nairlift: done" in err


def test_nor_in_a_finding_or_the_answer_of_cancel(capsys, monkeypatch):
    from backends.common import checks

    finding = backends.Finding("nodes", "failure", "has only " + HOSTILE, HOSTILE, 4)
    monkeypatch.setattr(checks, "findings", lambda *_: [finding])
    monkeypatch.setattr(commands.profiles, "load", lambda name: None)
    assert commands.check(SimpleNamespace(words=["p"], json=False)) == 4
    monkeypatch.setattr(commands.runs, "load_run", lambda name: RUN)
    monkeypatch.setattr(backends, "backend", lambda name: SimpleNamespace(cancel=lambda run: HOSTILE))
    commands.cancel(SimpleNamespace(words=["t23456"]))
    out = capsys.readouterr().out
    assert not RAW.search(out) and "owned" in out and len(out.splitlines()) == 4


def test_a_huge_message_is_one_short_line(capsys):
    screen.complain("it sees " + "p, " * 1_000_000, "x" * 1_000_000)
    assert len(capsys.readouterr().err) < 2 * screen.LONGEST + 20


def test_letters_of_any_language_stay():
    assert screen.plain("größer als 5 €, 数据, ñ") == "größer als 5 €, 数据, ñ"


def test_a_jobs_own_log_is_passed_on_as_it_is(capsys):
    log = ["\x1b[32mstep 1\x1b[0m\r", "step 2 \u202e\n"]
    follower = follow.Follower(RUN, lambda: Status("done"), lambda rank, on: iter(log), lambda: "")
    follower.logs()
    assert capsys.readouterr().out == "".join(log)


# ---------------------------------------------------------------- the exit code


def ended(logs, state="failed"):
    run = Run("t23456", "a/b", "p", "lepton", len(logs), "0" * 64)
    follower = follow.Follower(run, lambda: Status(state), lambda rank, on: iter(logs[rank]), lambda: "")
    return follower.explain(Status(state))


END = "airlift: rank %s ended with exit code %s\n"


@pytest.mark.parametrize("logs, code", [
    ([[END % (0, 37)]], 37),
    ([[END % (1, 85), END % (0, 37)], [END % (1, 0)]], 37),  # of another rank
    ([[END % (0, 85), "x\n", END % (0, 37)]], 37),  # before the pod's own
    ([[END % (0, 143)], [END % (0, 37), END % (1, 5)]], 5),
    ([["airlift_pod_program_did_not_arrive_whole\n", END % (0, 37)]], 37),
    ([["airlift_pod_program_did_not_arrive_whole\n", END % ("unknown", 80)]], 80),
    ([[END % ("unknown", 82)]], 82),
    ([["text " + (END % (0, 0)).strip() + " " + END % (0, 3)]], 3),
    ([[END % (7, 85)]], None), ([[END % (0, "85" * 3000)]], None),
])
def test_a_ranks_exit_code_comes_from_its_own_log(logs, code):
    assert ended(logs).exit_code == code


def test_success_cannot_be_forged_nor_failure():
    assert (ended([[END % (0, 0)]]).state, ended([[END % (0, 0)]]).exit_code) == ("failed", None)
    assert (ended([[END % (0, 85)]], "done").state, ended([[END % (0, 85)]], "done").exit_code) == ("done", 0)


def test_a_code_of_our_own_is_told_as_the_logs_word(monkeypatch, capsys, tmp_path):
    run = Run("t23456", "a/b", "p", "lepton", 1, "0" * 64)
    monkeypatch.setattr(backends, "backend", lambda name: SimpleNamespace(follow=lambda run: Status("failed", "F", 86)))
    assert commands.follow(run) == 1
    assert capsys.readouterr().err.splitlines()[1].startswith("the pod's log says: a startup command failed; ")


def test_on_slurm_each_rank_has_a_file_of_its_own(tmp_path):
    logs = {0: END % (1, 85) + END % (0, 143) + "\nsrun: error: task 0 was ended",
            1: END % (0, 85) + "\r log-fam_7_0_0.out " + END % (0, 85) + "\n\nlog-fam_7_0_0.out " + END % (0, 85) + "\n"
               + END % (1, 37) + "\n"}
    for rank, text in logs.items():
        (tmp_path / ("log-fam_7_%d_0.out" % rank)).write_text(text)
    run = Run("t23456", "fam/x", "p", "slurm", 2, "0" * 64, record={
        "folder": str(tmp_path), "job": "7", "host": vars(Host())})
    status = Status("failed", "FAILED", 143)
    watch = slurm_watch.Watch(run)
    assert watch.final(status).exit_code == 37


def test_a_pod_of_this_machine_does_not_write_its_end(tmp_path, monkeypatch):
    run = Run("t23456", "a/b", "local", "local", 1, "0" * 64, record={"folder": str(tmp_path), "pid": 1, "born": "1"})
    (tmp_path / "exit").write_text("0\n")
    monkeypatch.setattr(local, "_alive", lambda run: True)
    assert local.status(run).state == "running"


def test_a_server_that_says_nothing_after_it_was_connected(serve, monkeypatch):
    monkeypatch.setattr(http, "READ_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client, begun = runai("http://127.0.0.1:%d" % silent.getsockname()[1]), time.monotonic()
        with pytest.raises(Refusal) as caught:
            client.ask_token()
    assert caught.value.code == 5 and time.monotonic() - begun < 5

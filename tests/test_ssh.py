"""common/ssh.py: commands on the machine that has sbatch, this one or one behind ssh, which here is a script of ours."""

import re
from pathlib import Path

import pytest

import screen
from backends.common import ssh
from transport import Refusal

FAR = ssh.Host("login.example.com", "me", 2222, "/home/me/.ssh/key")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Has `ssh` be a script: it notes its arguments and its input, and then does what the test says."""
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % tmp_path)

    def make(body, asked="true"):
        head = 'case " $* " in *" -G "* | *" -O "*) %s; exit ;; esac\nfor last; do :; done\n' % asked
        (tmp_path / "ssh").write_text('#!/bin/sh\nprintf "%%s\\n" "$@" >%s/argv\n%s%s' % (tmp_path, head, body))
        (tmp_path / "ssh").chmod(0o755)

    ssh._options.cache_clear()
    yield make
    make("true\n")
    ssh.close()


def test_ssh_never_asks_and_the_script_is_in_no_argument_list(fake, tmp_path):
    fake('exec sh -c "$last"\n')
    assert FAR.output("echo 's3cret'; cat", "look") == "s3cret\n"
    argv = (tmp_path / "argv").read_text().splitlines()
    assert argv[-3:-1] == ["--", "login.example.com"] and argv[-1].startswith("exec sh -c ")
    assert "s3cret" not in "".join(argv)
    for words in ("-o BatchMode=yes", "-p 2222", "-l me", "-i /home/me/.ssh/key", "-o IdentitiesOnly=yes"):
        assert words in " ".join(argv)
    bare = ssh.Host("alias").command(10)
    assert bare[-3:-1] == ["--", "alias"] and not {"-p", "-l", "-i"} & set(bare)


def test_data_follows_the_script_byte_for_byte(fake, tmp_path):
    fake('exec sh -c "$last"\n')
    data = bytes(range(256)) * 3000
    for host in (FAR, ssh.Host()):
        assert host.run("cat >%s/copy" % tmp_path, data=data).returncode == 0
        assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("said, wanted, gone", [
    ("remotecommand tmux", "remotecommand=none", ""), ("stdinnull yes", "stdinnull=no", ""),
    ("sessiontype none", "sessiontype=default", ""), ("requesttty true", "requesttty=auto", ""),
    ("forkafterauthentication yes", "forkafterauthentication=no", ""),
    ("clearallforwardings no", "clearallforwardings=yes", ""), ("stdinnull no", "", "stdinnull"),
    ("controlpath none", "ControlMaster=auto", ""), ("controlpath /x", "", "ControlPath")])
def test_settings_in_the_way_are_put_aside_and_a_shared_connection_of_the_users_is_used(fake, said, wanted, gone):
    fake("true\n", asked="echo " + said)
    ssh._options.cache_clear()
    words = FAR.command(10)
    assert (not wanted or words[words.index(wanted) - 1] == "-o") and (not gone or gone not in " ".join(words))


@pytest.mark.parametrize("host", [ssh.Host(), FAR], ids=["here", "far"])
def test_what_a_login_script_prints_is_not_the_answer(fake, host):
    fake('echo Welcome; echo to the cluster; exec sh -c "$last"\n')
    done = host.run("printf 'a\\nb'; exit 3")
    assert (done.returncode, done.stdout) == (3, b"a\nb")


def test_a_script_that_ends_with_255_is_no_broken_connection(fake):
    fake('exec sh -c "$last"\n')
    assert FAR.run("exit 255").returncode == 254


@pytest.mark.parametrize(("said", "code"), [
    ("me@login.example.com: Permission denied (publickey).", 4), ("Host key verification failed.", 4),
    ("ssh: connect to host login.example.com port 2222: Connection refused", 5)])
def test_a_host_that_refuses_us_and_one_that_is_not_there(fake, said, code):
    fake("echo %s >&2; exit 255\n" % repr(said))
    with pytest.raises(Refusal) as caught:
        FAR.run("true")
    assert caught.value.code == code and said.rstrip(".") in caught.value.what and caught.value.fix


def test_a_login_that_runs_nothing_is_told(fake):
    fake("echo 'this account is not available' >&2; exit 1\n")
    with pytest.raises(Refusal, match="its shell ran nothing: this account is not available") as caught:
        FAR.output("true", "look")
    assert caught.value.code == 4


def test_a_host_that_does_not_answer_in_time(fake):
    fake("exec sleep 30\n")
    with pytest.raises(Refusal, match=r"me@login.example.com:2222 did not answer in") as caught:
        FAR.run("true", 0.2)
    assert caught.value.code == 5


def test_a_command_that_fails_is_told_in_its_own_words():
    with pytest.raises(Refusal, match="this machine: cannot make a folder: one; two") as caught:
        ssh.Host().output("echo one >&2; echo two >&2; exit 1", "make a folder")
    assert caught.value.code == 4


def test_the_shared_connection_has_a_private_folder_that_goes(fake, tmp_path):
    fake('exec sh -c "$last"\n')
    option = next(word for word in FAR.command(10) if word.startswith("ControlPath="))
    folder = Path(option.partition("=")[2]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "socket").write_text("")
    ssh.close()
    assert not folder.exists()
    assert (tmp_path / "argv").read_text().splitlines() == ["-o", "ControlPath=%s/socket" % folder, "-O", "exit", "there"]


def test_each_command_is_told_where_that_is_asked_for(fake, capsys, monkeypatch):
    monkeypatch.setattr(screen, "VERBOSE", False)  # whatever another test has asked for
    fake('exec sh -c "$last"\n')
    FAR.run("true")
    assert capsys.readouterr() == ("", "")
    screen.VERBOSE = True
    try:
        FAR.run("squeue -h |\n  head -n 1")
    finally:
        screen.VERBOSE = False
    out, err = capsys.readouterr()
    before, after = err.splitlines()
    assert out == "" and before.endswith("me@login.example.com:2222: squeue -h | head -n 1")
    assert re.fullmatch(re.escape(before[9:]) + r": \d\.\d\d s", after[9:])

"""How ranks ended, by their logs: the rank that failed, its code and its reason."""

from backends.common.ends import STALE, Ends

ENDED = "airlift: rank %d ended with exit code %d\n"
REAL = """\
Traceback (most recent call last):
  File "/tmp/code/src/train.py", line 3, in <module>
    raise ValueError("row 7 has no text")
ValueError: row 7 has no text
"""
STORE = """\
[rank%d]: Traceback (most recent call last):
[rank%d]:   File "/tmp/code/src/train.py", line 9, in <module>
[rank%d]:     dist.barrier()
[rank%d]: torch.distributed.DistStoreError: wait timeout after 1800000ms, keys: /default_pg/0/store_based_barrier_key:0
"""


def ends_of(**logs: str) -> Ends:
    ends = Ends()
    for name, text in logs.items():
        for line in text.splitlines(keepends=True):
            ends.note(int(name[1:]), line)
    return ends


def test_the_rank_that_only_lost_another_is_not_the_cause() -> None:
    store = STORE.replace("%d", "0")
    ends = ends_of(r0=store + ENDED % (0, 1), r1="step 1\n" + REAL + ENDED % (1, 3))
    assert (ends.first(), ends.code()) == (1, 3)
    assert ends.said() == ("rank 1 failed with exit code 3", '  File "/tmp/code/src/train.py", line 3, in <module>',
                           '    raise ValueError("row 7 has no text")', "ValueError: row 7 has no text")
    assert ends_of(r0=store + ENDED % (0, 1), r1=store + ENDED % (1, 1)).said() == (), "nobody knows"
    both = ends_of(r0=REAL + store + ENDED % (0, 1))  # as torchrun prints them, one for each of its processes
    assert both.said()[-1] == "ValueError: row 7 has no text"


def test_a_traceback_that_was_survived_is_no_reason() -> None:
    ends = ends_of(r0="ok\n", r1=REAL + "step\n" * (STALE + 1) + ENDED % (1, 139))
    assert ends.said() == ("rank 1 failed with exit code 139",)


def test_a_rank_that_is_killed_before_its_last_line_has_said_why() -> None:
    lost = "airlift: rank 0: the Ray cluster lost a node: rank 1: it is gone\nairlift: what to do: see\nsaving\n"
    assert ends_of(r0=lost, r1=ENDED % (1, 137)).code() == 91
    assert ends_of(r0=lost + ENDED % (0, 137)).code() == 91
    assert ends_of(r0=lost + ENDED % (0, 5), r1=ENDED % (1, 137)).code() == 5, "its last line is what counts"
    ends = ends_of(r0=lost, r1="airlift: rank 0: the Ray cluster lost a node: another rank's words\n")
    assert set(ends.failed()) == {0}


def test_a_recipe_cannot_say_how_it_ended() -> None:
    assert ends_of(r0=ENDED % (0, 7) + "not yet\n" + ENDED % (0, 0)).code() is None
    assert ends_of(r0=ENDED % (1, 7)).code() is None, "about another rank"
    assert ends_of(r0=ENDED % (0, 7) + "slurmstepd: error: *** STEP CANCELLED ***\n").code() == 7

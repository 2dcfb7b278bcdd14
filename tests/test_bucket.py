"""Workdirs and data in buckets: on file://, a bucket without a network."""

import importlib
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from cosup_jax import assemble
from cosup_jax.config import make
from cosup_jax.errors import LostProcess, UserError
from cosup_jax.freeze import freeze
from cosup_jax.runtime import bucket as bucket_lib
from cosup_jax.runtime import workdir as workdir_lib
from cosup_jax.runtime.bucket import Bucket, Lease, localise
from cosup_jax.runtime.workdir import Workdir, checkpoints

LEASE_S = 2.0  # longer than a busy machine stands still


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A bucket, and a cache of this machine's own; leases that lapse at once."""
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path / "host a"))
    quick = lambda bucket, say: Lease(bucket, say, LEASE_S)
    quick.NAME = Lease.NAME
    monkeypatch.setattr(workdir_lib, "Lease", quick)
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket/runs/one"


def another_host(tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path / "host b"))


def test_objects_are_whole_and_listed(url):
    """Bugs: a name that is a prefix of another lists it too; a missing object read as empty."""
    bucket = Bucket(url)
    bucket.write("a/x", b"1")
    bucket.write("ab", b"2")
    assert (bucket.names(), bucket.names("a/")) == (["a/x", "ab"], ["a/x"])
    assert (bucket.read("ab"), bucket.read("a")) == (b"2", None)


@pytest.mark.parametrize("path", ["ftp://a/b", "gs://", "file:///"])
def test_a_url_that_is_no_bucket(path):
    """Bug: a typing error in the scheme makes a local directory of that name."""
    with pytest.raises(UserError, match=r"give a local path, or gs://"):
        Workdir(path)


@pytest.mark.parametrize("answers", [True, False])
def test_a_bucket_out_of_reach_is_told_within_seconds(answers, monkeypatch):
    """Bug: without a network, or behind a wall, a quarter of an hour without a word."""
    with socket.socket() as place:  # which takes connections and is silent, or takes none
        place.bind(("127.0.0.1", 0))
        if answers:
            place.listen()
            monkeypatch.setattr(bucket_lib, "REACH_S", 0.5)
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"used \((no answer|.*retry.*)\); check the network"):
            Bucket("gs://nobodys/run")
        assert time.monotonic() - start < 15


def test_what_a_run_writes_is_in_the_bucket_and_found_again(url, tmp_path, monkeypatch):
    """Bugs: a status that the launcher never sees; a resume on another machine that starts anew;
    tokens uploaded with every report."""
    with Workdir(url) as workdir:
        assert workdir.url == url and workdir.path.is_relative_to(tmp_path / "host a")
        workdir.status("running", 3)
        assert json.loads(Bucket(url).read("status.json")) == {"state": "running", "step": 3}
        for name in ("metrics.jsonl", "tokenizer/k/vocab.json", "data/tokens", "index/shard"):
            (workdir.path / name).parent.mkdir(parents=True, exist_ok=True)
            (workdir.path / name).write_text("first")
        workdir.publish("metrics.jsonl", "tokenizer")
        assert Bucket(url).read("tokenizer/k/vocab.json") == b"first"
        (workdir.path / "metrics.jsonl").write_text("first, longer")
    names = Bucket(url).names()
    assert "metrics.jsonl" in names and "index/shard" in names
    assert not [name for name in names if name.startswith((".lease", ".lock", "data", ".bucket"))]
    another_host(tmp_path, monkeypatch)
    with Workdir(url) as workdir:
        assert workdir.read_status() == {"state": "running", "step": 3}
        assert (workdir.path / "metrics.jsonl").read_text() == "first, longer"
        assert (workdir.path / "tokenizer/k/vocab.json").is_file()
        assert not (workdir.path / "index").exists()
        workdir.fetch("index/")
        assert (workdir.path / "index/shard").read_text() == "first"
        expected = Path(url.removeprefix("file://")) / "checkpoints"
        assert str(checkpoints(workdir.path)) == str(expected)


def write(directory, *names, text="old"):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def test_what_another_machine_has_written_since_stays(url):
    """Bug: a machine that opens a workdir and closes it puts its old export, index, mined data and
    answers over newer ones."""
    names = ("export/gen/weights", "index/x/shard", "mined/x", "prepared/x", "report.html")
    with Workdir(url) as workdir:
        write(workdir.path, *names)
    bucket = Bucket(url)
    for name in names:
        bucket.write(name, b"newer")
    with Workdir(url) as workdir:
        write(workdir.path, "mined/y")
        workdir.publish("mined")
        write(workdir.path, "index/y/shard")
    assert {bucket.read(name) for name in names} == {b"newer"}
    assert bucket.read("mined/y") == bucket.read("index/y/shard") == b"old"


def test_what_a_killed_run_left_is_published_by_the_next(url):
    """Bug: of an index that two runs have written the bucket gets the second one's half."""
    Workdir(url).close()
    write(workdir_lib.mirror(url), "index/x/first")
    with Workdir(url) as workdir:
        write(workdir.path, "index/x/second")
    assert Bucket(url).names() == ["index/x/first", "index/x/second"]


def test_what_was_deleted_in_the_bucket_is_gone_here(url):
    """Bugs: a workdir that was deleted is finished all the same; one that keeps no answers of a run
    that was killed, or tokenises again."""
    gone = ["metrics.jsonl", "tokenizer/k/vocab.json", "evaluation/summary.json"]
    kept = ["answers/a.jsonl", "data/tokens", "evaluation/x/arm.jsonl", "index/x/shard"]
    with Workdir(url) as workdir:
        workdir.status("finished", 3)
        write(workdir.path, *gone, *kept)
    shutil.rmtree(url.removeprefix("file://"))
    with Workdir(url) as workdir:
        assert workdir.read_status() is None
        assert not [name for name in gone if (workdir.path / name).exists()]
        assert all((workdir.path / name).exists() for name in kept)
        write(workdir.path, "tokenizer/.k.7.part")
        workdir._pull()
        assert (workdir.path / "tokenizer/.k.7.part").exists(), "another process is writing it"
    assert Bucket(url).names() == []


def test_answers_of_a_killed_run_are_not_overwritten(url):
    """Bug: what the bucket has of them, from an earlier stop, replaces the many that came after; or
    these never come there."""
    with Workdir(url) as workdir:
        (workdir.path / "answers").mkdir()
        (workdir.path / "answers/a.jsonl").write_text("1\n")
        (workdir.path / "answers/b.jsonl").write_text("1\n")
    path = workdir.path
    (path / "answers/a.jsonl").write_text("1\n2\n3\n")  # and then it was killed
    (path / "answers/b.jsonl").write_text("other\n")
    with Workdir(url) as workdir:
        assert (path / "answers/a.jsonl").read_text() == "1\n2\n3\n"
        assert (path / "answers/b.jsonl").read_text() == "1\n"
    assert Bucket(url).read("answers/a.jsonl") == b"1\n2\n3\n"
    assert Bucket(url).read("answers/b.jsonl") == b"1\n"


@pytest.mark.parametrize("mode", ["evaluate", "generate"])
def test_answers_go_on_on_another_machine(mode, url, tmp_path, monkeypatch):
    """Bugs: answers begun anew there, and put over those that were there; passages encoded again
    that are in the bucket."""
    with Workdir(url) as workdir:
        write(workdir.path, "answers/a.jsonl", "index/x/shard")
    another_host(tmp_path, monkeypatch)
    found = []

    def trained(config, directory):
        found.extend((directory / name).is_file() for name in ("answers/a.jsonl", "index/x/shard"))
        raise UserError("seen")

    monkeypatch.setattr(assemble, "trained", trained)
    run = getattr(importlib.import_module(f"cosup_jax.{mode}"), mode)
    with pytest.raises(UserError, match="seen"):
        run(freeze(make({"num_steps": 1}, {})), url)
    assert found == [True, True]


def test_what_is_withdrawn_is_gone_and_no_more(url):
    """Bug: one file of weights stays beside a newer export's several, and is read for them."""
    with Workdir(url) as workdir:
        for name in ("export/gen/model.safetensors", "exported"):
            Bucket(url).write(name, b"old")
        workdir.withdraw("export")
        assert Bucket(url).read("export/gen/model.safetensors") is None
        assert Bucket(url).read("exported") == b"old"


def test_a_second_run_is_refused_on_another_machine(url, tmp_path, monkeypatch):
    """Bug: two machines write one workdir, as no lock of theirs is seen by the other."""
    with Workdir(url):
        another_host(tmp_path, monkeypatch)
        start = time.monotonic()
        with pytest.raises(UserError, match="in use by another run, process"):
            Workdir(url)
        assert time.monotonic() - start < 2 * LEASE_S
    Workdir(url).close()


def test_a_dead_run_frees_its_lease_and_notices(url, capsys):
    """Bugs: a kill -9 that locks the workdir for ever; a run that was cut off from the bucket and
    writes on beside its successor."""
    bucket = Bucket(url)
    dead = Lease(bucket, print, LEASE_S)
    dead._over.set()  # renews no more
    dead._thread.join()
    heir = Lease(bucket, print, LEASE_S)
    assert "was held by process" in capsys.readouterr().out
    dead._over.clear()
    threading.Timer(2 * LEASE_S, dead._over.set).start()  # else it would renew for ever
    dead._renew()
    assert dead.lost and dead.heir.startswith("process ") and not heir.lost
    dead.close()
    assert json.loads(bucket.read(Lease.NAME))["holder"], "the heir's lease is gone"
    heir.close()
    assert bucket.read(Lease.NAME) is None


def test_a_lease_that_is_given_back_meanwhile_is_taken(url):
    """Bug: the next run of a queue is refused, as it saw the one before it end."""
    bucket = Bucket(url)
    ending = Lease(bucket, print, LEASE_S)
    ending._over.set()
    ending._thread.join()
    threading.Timer(LEASE_S / 3, ending.close).start()
    taken = Lease(bucket, print, LEASE_S)
    assert bucket.read(Lease.NAME) and not taken.lost
    taken.close()


def test_a_moment_without_network_loses_no_lease(url, monkeypatch):
    """Bug: a run of weeks ended by one request that failed."""
    bucket = Bucket(url)
    lease, failed, replace = Lease(bucket, print, LEASE_S), [], bucket.replace

    def flaky(*change):
        if not failed:
            failed.append(1)
            raise UserError("no network")
        return replace(*change)

    monkeypatch.setattr(bucket, "replace", flaky)
    time.sleep(LEASE_S)
    assert failed and not lease.lost and lease._thread.is_alive()
    lease.close()


def test_a_renewal_whose_answer_is_lost_is_one(url, monkeypatch):
    """Bug: a run takes itself for another that has taken its lease."""
    bucket = Bucket(url)
    lease, replace, failed = Lease(bucket, print, LEASE_S), bucket.replace, []

    def deaf(*change):
        renewed = replace(*change)
        if not failed:
            failed.append(1)
            raise UserError("no answer")
        return renewed

    monkeypatch.setattr(bucket, "replace", deaf)
    time.sleep(1.5 * LEASE_S)
    assert failed and not lease.lost
    lease.close()
    assert bucket.read(Lease.NAME) is None


def test_a_download_that_fails_leaves_nothing(url, tmp_path, monkeypatch):
    """Bug: half a file for every attempt, until the disk is full."""
    bucket, directory = Bucket(url), tmp_path / "there"
    bucket.write("x", b"1")
    monkeypatch.setattr(workdir_lib.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        bucket.download("x", directory)
    assert not list(directory.iterdir())


def test_a_bucket_that_does_not_answer_is_a_lost_lease(url):
    """Bug: while a renewal hangs another takes the lease, and both runs write."""
    bucket, answers = Bucket(url), threading.Event()
    lease, replace = Lease(bucket, print, 0.2), bucket.replace
    bucket.replace = lambda *change: answers.wait(10) and replace(*change)
    time.sleep(0.5)
    assert lease.lost
    answers.set()
    lease.close()
    assert bucket.read(Lease.NAME) is None


def test_of_two_takers_one_wins(url):
    """Bug: both find the lease free, and both take it."""
    bucket, taken, refused = Bucket(url), [], []

    def take():
        try:
            taken.append(Lease(bucket, print, 10.0))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    looked = threading.Barrier(4)
    look = bucket.look
    bucket.look = lambda name: (look(name), looked.wait(10) if not taken else None)[0]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 3)
    taken[0].close()


@pytest.mark.parametrize(
    ("heir", "error", "says"),
    [("process 7", UserError, "taken over by .*process 7"), ("", LostProcess, "out of reach")],
)
def test_a_lost_lease_stops_the_run(url, heir, error, says):
    """Bugs: the loser goes on training, and its uploads destroy the winner's; a run that was cut
    off for a minute is over for good, as launchers start no mistake again."""
    workdir = Workdir(url)
    workdir._lease._lost, workdir._lease.heir = True, heir
    with pytest.raises(error, match=says):
        workdir.status("running", 4)
    workdir.close()
    assert Bucket(url).read("status.json") is None


def test_a_run_that_is_cut_off_may_be_started_again(url, monkeypatch):
    """Bug: what fails for want of a network is taken for the user's mistake, at a write that has
    waited for the network or as the lease is given back."""

    def cut_off(*_):
        time.sleep(1.2 * LEASE_S)  # it is tried again and again
        raise UserError("no network")

    with pytest.raises(LostProcess, match="out of reach"), Workdir(url) as workdir:
        monkeypatch.setattr(Bucket, "replace", lambda *_: cut_off())
        monkeypatch.setattr(Bucket, "write", cut_off)
        workdir.status("running", 4)


@pytest.mark.parametrize(
    ("source", "gives", "files"),
    [
        ("{url}/x.jsonl@2", "x.jsonl@2", ["x.jsonl", "x.passages.jsonl"]),
        ("prepared:{url}/made", "made", ["made/manifest.json", "made/t/a"]),
        ("prepared:{url}/made::x", "made::x", ["made/manifest.json", "made/t/a"]),
        ("{url}/y*.jsonl", "y*.jsonl", ["y1.jsonl", "y1.passages.jsonl", "y2.jsonl"]),
    ],
)
def test_data_is_fetched_once(url, tmp_path, source, gives, files, monkeypatch):
    """Bugs: questions without their passages; a prepared directory of which a file is missing;
    every start downloads the corpus again."""
    bucket = Bucket(url)
    for name in ("x.jsonl", "x.passages.jsonl", "xy.jsonl", "made/manifest.json", "made/t/a"):
        bucket.write(name, name.encode())
    for name in ("y1.jsonl", "y1.passages.jsonl", "y2.jsonl", "maden"):
        bucket.write(name, name.encode())
    found = localise(source.format(url=url), tmp_path / "cache")
    assert "://" not in found and found.endswith(f"/{gives}")
    local = Path(found.removeprefix("prepared:").removesuffix(gives))
    assert sorted(str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()) == files
    monkeypatch.setattr(Bucket, "download", lambda *_: pytest.fail("again"))
    assert localise(source.format(url=url), tmp_path / "cache") == found
    assert localise("tfds:world", tmp_path) == "tfds:world"
    with pytest.raises(UserError, match="does not exist"):
        localise(f"{url}/no.jsonl", tmp_path)

"""Several processes that torchrun starts label one folder together."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import detect_emotions
from detect_emotions import Source, share_out

README = (ROOT / "README.md").read_text(encoding="utf-8")
TORCHRUN = ("-m", "torch.distributed.run")
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """Photos of one face each, one that is none, and a small video."""
    (tmp_path / "holiday").mkdir()
    with Image.open(ROOT / "resources" / "sample.jpg") as image:
        for i in range(24):
            image.crop((0, 0, 440, 480)).resize((330 + i, 360)).save(tmp_path / "holiday" / f"{i:02}.jpg")
    (tmp_path / "holiday" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "holiday"


def outputs(out_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("[!.]*.*")}


def options(folder: Path, out_dir: Path) -> list:
    tables = ["--csv", out_dir / "faces.csv", "--summary", out_dir / "summary.csv"]
    return [ROOT / "detect_emotions.py", folder, "--out-dir", out_dir, *tables]


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        pid for pid in map(int, children) if b"detect_emotions" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def kill_one_at_work(process: subprocess.Popen, out_dir: Path) -> None:
    """Kill the second worker once a few photos are done, with their rows."""
    while sum(journal.read_text().count("stamp") for journal in out_dir.glob(".faces.csv.journal*")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(workers_of(process)[1], signal.SIGKILL)


def test_the_readmes_processes_give_the_outputs_of_one(start, folder, tmp_path):
    """The second photo is in a subfolder."""
    (folder / "first day").mkdir()
    (folder / "01.jpg").rename(folder / "first day" / "01.jpg")
    one, two = tmp_path / "one", tmp_path / "runs" / "holiday"
    single = start(*options(Path("holiday"), one), "--recursive", cwd=tmp_path)
    out, err = single.communicate()
    [command] = re.findall(r"`torchrun (\S+ \S+ detect_emotions.py .+?)`", README)
    command = command.replace("detect_emotions.py", str(ROOT / "detect_emotions.py")).split()
    summary = ("--summary", two / "summary.csv")
    together = start(*TORCHRUN, "--standalone", *command, *summary, cwd=tmp_path)
    both_out, both_err = together.communicate()
    assert (single.returncode, together.returncode) == (1, 1)  # for the broken one
    assert sorted(both_out.splitlines()) == sorted(out.splitlines())
    for line in err.splitlines():
        assert both_err.count(line) == 1, line
    assert outputs(two) == outputs(one)
    assert len(outputs(one)) == 24 + 2


def test_a_killed_process_ends_the_others_and_a_later_run_goes_on_with_more(start, folder, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    assert start(*options(folder, one)).wait() == 1
    process = start(*TORCHRUN, "--standalone", "--nproc-per-node", 2, *options(folder, many))
    kill_one_at_work(process, many)
    assert process.wait(60)
    assert not (many / "faces.csv").exists()
    again = start(*TORCHRUN, "--standalone", "--nproc-per-node", 3, *options(folder, many))
    _, err = again.communicate()
    assert "finished before" in err
    assert outputs(many) == outputs(one)


def test_torchrun_starts_killed_processes_again_and_they_go_on(start, folder, tmp_path):
    (folder / "broken.png").unlink()
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(*options(folder, one)).wait() == 0
    restarts = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    process = start(*TORCHRUN, *restarts, *options(folder, two))
    kill_one_at_work(process, two)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "finished before" in err
    assert outputs(two) == outputs(one)


def test_two_machines_share_a_folder(start, folder, tmp_path):
    (folder / "broken.png").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(*options(folder, one)).wait() == 0
    where = ("--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port)
    nodes = [start(*TORCHRUN, *where, "--node-rank", rank, *options(folder, two)) for rank in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0]
    assert all(node.stdout.read().count("happy") for node in nodes)
    assert outputs(two) == outputs(one)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--model", "nowhere.pt"), "error: there is no checkpoint nowhere.pt"),
        (("--json",), "error: --json is for one process; leave it out, or start without torchrun"),
    ],
)
def test_a_mistake_is_said_once(start, folder, tmp_path, asked, said):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", 2, *options(folder, tmp_path / "out"), *asked]
    process = start(*command)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count(said) == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in err
    assert not (tmp_path / "out").exists()


# The second process finds a photo that has come since the first looked.
LATE = """
import os, shutil, sys
from torch import distributed
sys.path.insert(0, {root!r})
import detect_emotions
find, is_first = detect_emotions.find_sources, os.environ["RANK"] == "0"
def find_sources(*args):
    if not is_first:
        distributed.barrier()
        shutil.copy({photo!r}, {late!r})
    found = find(*args)
    if is_first:
        distributed.barrier()
    return found
detect_emotions.find_sources = find_sources
detect_emotions.main()
"""


def test_each_input_is_done_once_though_the_folder_changes_meanwhile(start, folder, tmp_path):
    (folder / "broken.png").unlink()
    names = sorted(path.name for path in folder.iterdir())
    photo, late, script = str(folder / "23.jpg"), str(folder / "0.jpg"), tmp_path / "late_detect_emotions.py"
    script.write_text(LATE.format(root=str(ROOT), photo=photo, late=late))
    _, *arguments = options(folder, tmp_path / "out")
    process = start(*TORCHRUN, "--standalone", "--nproc-per-node", 2, script, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(Path(line.split("\t")[0]).name for line in out.splitlines()) == names
    assert (tmp_path / "out" / "faces.csv").read_text().count(",happy,") == len(names)


def test_shares_are_of_about_the_same_work(tmp_path):
    sources = []
    for i, size in enumerate((10, 20, 30, 40, 50, 900)):
        kind = "video" if i == 1 else "photo"
        (tmp_path / str(i)).write_bytes(bytes(size))
        sources.append(Source(tmp_path / str(i), kind, tmp_path))
    works = [10, 20 * detect_emotions.VIDEO_WORK, 30, 40, 50, 900]
    shares = share_out({source: {} for source in sources}, 2)
    assert sorted(source for share in shares for source in share) == sorted(sources)
    loads = [sum(works[sources.index(source)] for source in share) for share in shares]
    assert loads == [900, 10 + 20 * detect_emotions.VIDEO_WORK + 30 + 40 + 50]

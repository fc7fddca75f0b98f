"""Training by processes that torchrun starts together; they learn what one process does."""

import json
import re

import pytest
import torch
from conftest import ROOT, make_faces, write_checkpoint
from PIL import Image
from tiny_resnet import ARCH

import finetune_emotion
import finetune_fer
import finetune_gray_imagenet
import model as shared

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Float32 sums in another order, over a few steps of a tiny network.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """What `launch` does for its processes."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.fixture
def launch(start):
    """Run a script by torchrun, whose options come first; return the exit code, stdout and stderr.

    The process that is about to finish last.pt for the `number`th time kills itself.
    """

    def launch(torchrun, *command, number=0):
        stop = ["tests/in_float32.py", "tests/stop_at.py", "SIGKILL", number, "last.pt"]
        process = start("-m", "torch.distributed.run", *torchrun.split(), *stop, *command)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    return launch


@pytest.fixture
def fer_options(fer_dir, gray_checkpoint):
    """Sixteen steps, each with a last share of one image or none; BatchNorm stays frozen."""
    options = ["--data-dir", fer_dir, "--init", gray_checkpoint, "--image-size", 32, "--batch-size", 11]
    options += ["--epochs", 4, "--lr", 0.01, "--unfreeze", "conv1", "fc", "--mixup", 0.2, "--ema", 0.9]
    return [str(option) for option in options]


def read_log(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "images_per_s"} for record in records]


def assert_same_run(folder, other):
    """Compare what each epoch of two runs gave, and the weights that they came to."""
    log, expected = read_log(folder), read_log(other)
    assert log == [pytest.approx(record, rel=1e-3) for record in expected]
    assert expected[0]["train_loss"] != pytest.approx(expected[-1]["train_loss"], rel=0.004)
    one, two = (shared.load_checkpoint(path / "last.pt")["model"] for path in (folder, other))
    torch.testing.assert_close(one, two, **CLOSE)


def mistakes_in(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17])
def test_shares_of_a_batch_are_the_batch_and_none_is_of_one_image(length, world):
    batch = torch.arange(length)
    shares = [shared.share_of(batch, rank, world) for rank in range(world)]
    assert sorted(torch.cat(shares).tolist()) == batch.tolist()
    sizes = {len(share) for share in shares if len(share)}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(length, 2)


@pytest.mark.slow
def test_three_processes_learn_what_one_learns(tmp_path, fer_options, launch, capsys):
    finetune_fer.main([*fer_options, "--out-dir", str(tmp_path / "one")])
    alone = capsys.readouterr().out
    command = ["finetune_fer.py", *fer_options, "--out-dir", tmp_path / "three"]
    code, out, err = launch("--nproc-per-node 3", *command)
    assert code == 0, err
    assert_same_run(tmp_path / "three", tmp_path / "one")
    assert len(out.splitlines()) == len(alone.splitlines())
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("one", "three")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_killed_job_goes_on_by_itself_and_later_in_another_number_of_processes(
    tmp_path, fer_options, launch
):
    """It is the README's command, and dies twice, each time about to finish its second checkpoint."""
    finetune_fer.main([*fer_options, "--out-dir", str(tmp_path / "whole")])
    [torchrun] = re.findall(r"`torchrun (.+) finetune_fer.py`", README)
    torchrun = torchrun.replace("--max-restarts 3", "--max-restarts 1")
    command = ["finetune_fer.py", *fer_options, "--out-dir", tmp_path / "killed"]
    code, out, err = launch(torchrun, *command, number=2)
    assert code == 1
    assert [line.split()[1] for line in out.splitlines() if line.startswith("epoch ")] == list("1223")
    assert "SIGKILL" in err
    assert "gloo" not in err  # what the other process has to say of its loss
    last = tmp_path / "killed" / "last.pt"
    assert shared.load_checkpoint(last)["epoch"] == 2
    finetune_fer.main(["--resume", str(last)])
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_used_folder_is_refused_in_one_line_however_often_torchrun_tries(tmp_path, fer_options, launch):
    finetune_fer.main([*fer_options, "--out-dir", str(tmp_path / "used")])
    before = (tmp_path / "used" / "last.pt").read_bytes()
    command = ["finetune_fer.py", *fer_options, "--out-dir", tmp_path / "used"]
    code, out, err = launch("--nproc-per-node 2 --max-restarts 1", *command)
    assert (code, out) == (1, "")
    assert [line.split(";")[0] for line in mistakes_in(err)] == [
        f"error: {tmp_path / 'used'} holds another run"
    ] * 2  # of two tries
    assert (tmp_path / "used" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_the_gray_stage_runs_in_several_processes(tmp_path, launch):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for i in range(15):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{i}.png")
    teacher = shared.color_resnet(ARCH).train()
    for _ in range(20):  # BatchNorm learns what is usual, else the embeddings are next to nothing
        teacher(torch.randn(8, 3, 64, 64, generator=generator))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    options = ["--data-dir", tmp_path / "photos", "--teacher-weights", tmp_path / "teacher.pth"]
    options += ["--arch", ARCH, "--image-size", 64, "--batch-size", 5, "--epochs", 3, "--lr", 0.01]
    options = [str(option) for option in (*options, "--stem-init", "kaiming")]
    finetune_gray_imagenet.main([*options, "--out-dir", str(tmp_path / "one")])
    command = ["finetune_gray_imagenet.py", *options, "--out-dir", tmp_path / "two"]
    code, _, err = launch("--nproc-per-node 2", *command)
    assert code == 0, err
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_the_photo_stage_runs_in_several_processes_and_one_cuts(tmp_path, sample_photo, launch):
    with Image.open(sample_photo) as montage:
        people = [montage.crop((x, y, x + 480, y + 480)) for y in (0, 480) for x in (0, 480)]
    for name, photos in (("angry", people[2:]), ("happy", people[:2])):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, photo in enumerate(photos):
            photo.save(tmp_path / "photos" / name / f"{i}.jpg")
    for split in shared.SPLITS:
        make_faces(tmp_path / "fer" / split, 8, ("angry", "happy"))
    net = shared.gray_resnet(ARCH, 2)
    init = write_checkpoint(tmp_path / "init.pt", net, ("angry", "happy"))
    options = [
        "--data-dir",
        tmp_path / "photos",
        "--init",
        init,
        "--mix",
        tmp_path / "fer",
        "--unfreeze",
        "fc",
    ]
    options += ["--image-size", 32, "--batch-size", 4, "--epochs", 8, "--lr", 0.1, "--max-loss", 100]
    options = [str(option) for option in (*options, "--val-fraction", 0.5)]
    command = ["finetune_emotion.py", *options, "--out-dir", tmp_path / "two"]
    code, out, err = launch("--nproc-per-node 2", *command)
    assert code == 0, err
    assert ["total", "4", "0", "0", "0"] in [line.split() for line in out.splitlines()]
    finetune_emotion.main([*options, "--out-dir", str(tmp_path / "one")])
    assert_same_run(tmp_path / "two", tmp_path / "one")
    results = [json.loads((tmp_path / name / "emotion.json").read_text()) for name in ("one", "two")]
    assert results[0]["after"].keys() == results[1]["after"].keys()

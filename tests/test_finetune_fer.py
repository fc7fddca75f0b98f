import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import FIVE, ROOT, file_size_limit, make_faces, write_checkpoint
from PIL import Image
from tiny_resnet import ARCH, FEATURES

import finetune_fer
import model as shared
import unpack_fer_data

SMALL = ["--image-size", "32", "--batch-size", "16", "--epochs", "4", "--lr", "0.001"]
QUICK = ["--batch-size", "4", "--lr", "0.03"]  # learns the one class that all targets name


@pytest.fixture
def options(fer_dir, gray_checkpoint):
    return ["--data-dir", str(fer_dir), "--init", str(gray_checkpoint), *SMALL]


def test_training_learns_and_writes_what_it_says(tmp_path, options, capsys):
    out_dir = tmp_path / "run"
    finetune_fer.main([*options, "--out-dir", str(out_dir), "--balance", "0.5"])
    out = capsys.readouterr().out
    log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [1, 2, 3, 4]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    best = shared.load_checkpoint(out_dir / "best.pt", stages=("fer",))
    assert best["metrics"]["val_loss"] == min(record["val_loss"] for record in log)
    assert best["classes"] == list(FIVE)
    assert best["config"]["lr"] == 0.001
    assert f"wrote {out_dir / 'best.pt'}" in out
    for name in ("curves", "test_confusion", "test_reliability"):
        with Image.open(out_dir / f"{name}.png") as picture:
            assert min(picture.size) > 400
    test = json.loads((out_dir / "test.json").read_text())
    assert test["n"] == 30
    assert sum(map(sum, test["confusion"])) == 30


def test_evaluate_repeats_the_report_of_the_training_run(tmp_path, options, capsys):
    out_dir = tmp_path / "run"
    finetune_fer.main([*options, "--out-dir", str(out_dir)])
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test: ")]
    assert len(trained) == 8
    finetune_fer.main(
        [*options, "--evaluate", str(out_dir / "best.pt"), "--out-dir", str(tmp_path / "again")]
    )
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("test: ")] == trained


def run_until(start, stop, number, options, out_dir):
    """Stop a process when it is about to finish the checkpoint of epoch `number`; return what it says."""
    script = ["finetune_fer.py", *options, "--out-dir", out_dir]
    process = start(ROOT / "tests" / "stop_at.py", stop, number, "last.pt", *script)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, options, start):
    web = make_faces(tmp_path / "web", 20)
    options += ["--ema", "0.9", "--balance", "0.5", "--mixup", "0.2", "--mix", f"{web}=2"]
    code, _, err = run_until(start, "SIGKILL", 3, options, tmp_path / "killed")
    assert (code, err) == (-signal.SIGKILL, "")
    last = tmp_path / "killed" / "last.pt"
    assert shared.load_checkpoint(last)["epoch"] == 2
    finetune_fer.main(["--resume", str(last), "--out-dir", str(tmp_path / "killed")])
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "whole")])
    for name in ("last.pt", "best.pt"):
        one, other = (shared.load_checkpoint(tmp_path / run / name) for run in ("killed", "whole"))
        assert one["epoch"] == other["epoch"]
        assert one["temperature"] == other["temperature"]
        assert one["model"].keys() == other["model"].keys()
        assert all(value.equal(other["model"][key]) for key, value in one["model"].items())
    assert one["config"] == {**other["config"], "out_dir": str(tmp_path / "killed")}


def test_ctrl_c_is_one_line_and_leaves_a_loadable_checkpoint(tmp_path, options, start):
    code, out, err = run_until(start, "SIGINT", 2, options, tmp_path / "run")
    assert code == 130
    assert err == "interrupted\n"
    assert "--resume" in out
    assert shared.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1


def test_a_full_disk_is_one_line_and_leaves_a_loadable_checkpoint(tmp_path, options):
    """A file size limit between those of best.pt and last.pt fails the write itself, as a full disk does."""
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "whole")])
    sizes = [(tmp_path / "whole" / f"{name}.pt").stat().st_size for name in ("best", "last")]
    with file_size_limit(sum(sizes) // 2), pytest.raises(SystemExit) as stop:
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert stop.value.code == f"error: cannot write {tmp_path / 'run' / 'last.pt'}: File too large; " + (
        "free some space and go on with --resume"
    )
    assert shared.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1
    assert not (tmp_path / "run" / "last.pt").exists()
    last = shutil.copy(tmp_path / "whole" / "last.pt", tmp_path / "run")
    before = Path(last).read_bytes()
    resume = ["--resume", last, "--out-dir", str(tmp_path / "run"), "--epochs", "5"]
    with (
        file_size_limit(sum(sizes) // 2),
        pytest.raises(SystemExit, match="the former one is kept; free some"),
    ):
        finetune_fer.main(resume)
    assert Path(last).read_bytes() == before


def test_a_run_does_not_write_over_another(tmp_path, options):
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    (out_dir / "last.pt").write_text("precious")
    with pytest.raises(SystemExit, match="holds another run"):
        finetune_fer.main([*options, "--out-dir", str(out_dir)])
    assert (out_dir / "last.pt").read_text() == "precious"


@pytest.mark.parametrize("changed", [["--ema", "0.5"], ["--unfreeze", "fc"]])
def test_resuming_with_other_weights_is_a_mistake(tmp_path, options, changed):
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), "--epochs", "1", "--ema", "0"])
    with pytest.raises(SystemExit, match="leave --arch, --unfreeze and --ema as they were"):
        finetune_fer.main(["--resume", str(tmp_path / "run" / "last.pt"), "--epochs", "2", *changed])


def test_resuming_with_other_classes_is_a_mistake(tmp_path, fer_dir, options):
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), "--epochs", "1"])
    for split in shared.SPLITS:
        (fer_dir / split / "angry").rename(fer_dir / split / "upset")
    before = "angry, disgusted, happy, sad, surprised"
    with pytest.raises(SystemExit, match=f"learned {before}, .* disgusted, happy, sad, surprised, upset; "):
        finetune_fer.main(["--resume", str(tmp_path / "run" / "last.pt"), "--epochs", "2"])


def test_a_damaged_last_checkpoint_is_not_resumed_from(tmp_path, options):
    last = tmp_path / "run" / "last.pt"
    finetune_fer.main([*options, "--out-dir", str(last.parent), "--epochs", "1"])
    whole = torch.load(last, weights_only=True)
    config, optimizer = whole["config"], whole["optimizer"]
    moments = {**optimizer["state"][0], "exp_avg": torch.ones(0)}
    for damaged, message in (
        (
            {"config": {**config, "batch_size": -(2**63)}},
            "argument --batch-size: .* is out of range",
        ),
        ({"config": {**config, "epochs": "many"}}, "argument --epochs: invalid int value: 'many'"),
        ({"config": {**config, "lr": {}}}, "argument --lr: invalid float value: '{}'"),
        ({"config": {**config, "mix": 7}}, "7 is no collection of faces"),
        ({"config": {**config, "teachers": 1.5}}, r"there is no checkpoint 1\.5; "),
        ({"config": {**config, "init": ["gray.pt"]}}, "there is no checkpoint"),
        ({"optimizer": {**optimizer, "state": {**optimizer["state"], 0: moments}}}, "its file is damaged"),
        ({"history": [{**whole["history"][0], "val_acc": "high"}]}, "its file is damaged"),
        ({"history": [{**whole["history"][0], "epoch": 7}]}, "its file is damaged"),
    ):
        torch.save(whole | damaged, last)
        with pytest.raises(SystemExit, match=f"^error: .*{message}.*$") as stop:
            finetune_fer.main(["--resume", str(last), "--epochs", "2"])
        assert "\n" not in stop.value.code


def test_a_folder_whose_name_no_class_may_have_is_refused_before_training(tmp_path, fer_dir, options):
    make_faces(fer_dir / "train", 3, ("so\x1b[31mred",))
    with pytest.raises(SystemExit) as stop:
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert "a class of the name 'so\\x1b[31mred'" in stop.value.code
    assert not (tmp_path / "run").exists()


def test_a_second_run_into_the_folder_stops_and_names_the_first(tmp_path, options):
    with shared.only_run_in(tmp_path / "run"), pytest.raises(SystemExit) as stop:
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert stop.value.code.startswith(f"error: {tmp_path / 'run'} is in use by ")
    assert f"(process {os.getpid()})" in stop.value.code
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, options):
    with pytest.raises(SystemExit, match="try a lower --lr"):
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), "--lr", "1e30"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--init", "none.pt"], "no checkpoint none.pt"),
        (["--data-dir", "nowhere"], "expected a folder"),
        (["--evaluate", "INIT"], "has stage 'gray', expected 'fer' or 'emotion'"),
        (["--resume", "INIT"], "has stage 'gray', expected 'fer'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, options, gray_checkpoint, changed, message):
    changed = [str(gray_checkpoint) if word == "INIT" else word for word in changed]
    with pytest.raises(SystemExit) as stop:
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), *changed])
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_more_emotions_are_learned_than_are_told_apart_by_default(tmp_path, fer_dir, options, capsys):
    make_faces(fer_dir / "train", 16, ("fearful", "neutral"))
    out_dir = tmp_path / "run"
    finetune_fer.main([*options, "--out-dir", str(out_dir), "--emotions", "happy", "sad", "angry"])
    out = capsys.readouterr().out
    assert "train: 112 images" in out
    assert "fearful 16" in out
    best = shared.load_checkpoint(out_dir / "best.pt")
    assert best["classes"] == sorted([*FIVE, "fearful", "neutral"])
    assert best["default_classes"] == ["angry", "happy", "sad"]
    assert best["model"]["fc.weight"].shape == (7, FEATURES)
    assert json.loads((out_dir / "test.json").read_text())["n"] == 18
    assert json.loads((out_dir / "test_all.json").read_text())["n"] == 30


def test_emotions_that_train_does_not_have_are_a_mistake(options, tmp_path):
    with pytest.raises(SystemExit, match="expected two or more of happy bored"):
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), "--emotions", "happy", "bored"])


def write_votes(fer_dir, splits, votes):
    """Write votes.csv for the faces of some splits; `votes` maps a class to its counts."""
    rows = sorted({int(path.stem) for split in splits for path in (fer_dir / split).rglob("*.png")})
    header = ["row", *FIVE]
    lines = [[row, *(votes.get(name, 0) for name in FIVE)] for row in rows]
    text = "".join(",".join(map(str, line)) + "\n" for line in [header, *lines])
    (fer_dir / "votes.csv").write_text(text)


def test_votes_are_learned_beside_the_labels(tmp_path, fer_dir, options, capsys):
    """All ten voters saw happy faces; learned from the votes alone, every face is a happy one."""
    write_votes(fer_dir, ("train", "test"), {"happy": 10})
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), *QUICK, "--vote-weight", "1"])
    out = capsys.readouterr().out
    assert "votes: known for 80 images of train" in out
    last = shared.load_network(shared.load_checkpoint(tmp_path / "run" / "last.pt"))
    images, labels, _ = shared.load_faces(fer_dir, "test", FIVE)
    batches = shared.FaceBatches(images, labels, 16, 32, torch.device("cpu"))
    assert set(shared.evaluate(last, batches.eval())[0].argmax(1).tolist()) == {FIVE.index("happy")}
    test = json.loads((tmp_path / "run" / "test.json").read_text())
    assert (
        test["subsets"]["with 6 of FER+'s 10 votes"]["n"] == test["subsets"]["not in another split"]["n"] / 5
    )


def test_votes_that_lack_a_face_are_a_mistake(tmp_path, fer_dir, options):
    write_votes(fer_dir, ("val",), {"happy": 10})
    with pytest.raises(SystemExit) as stop:
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert "has no votes for" in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("cell", "words"),
    [("many", "line 3: could not"), ("-1", "line 3: row 1 has votes"), ("nan", "line 3: row 1 has votes")],
)
def test_votes_that_are_no_numbers_are_refused_with_their_row(tmp_path, cell, words):
    path = tmp_path / "votes.csv"
    path.write_text(f"row,happy,sad\n0,1,2\n1,{cell},2\n")
    with pytest.raises(ValueError, match=f"{path} is not .*, {words}"):
        finetune_fer.load_votes(path, [Path("00000.png")], torch.tensor([0]), ["happy", "sad"])


def test_a_class_that_nobody_could_vote_for_has_no_votes(tmp_path):
    """It may be another collection's. Votes that lack a face's own class are of other classes altogether."""
    path, faces, classes = tmp_path / "votes.csv", [Path("00001.png")], ["contempt", "happy", "sad"]
    path.write_text("row,sad,happy\n0,1,2\n1,3,7\n")
    votes = finetune_fer.load_votes(path, faces, torch.tensor([1]), classes)
    assert votes.tolist() == [[0, 7, 3]]
    with pytest.raises(ValueError, match=f"{path} is not .*, line 1: it lacks contempt"):
        finetune_fer.load_votes(path, faces, torch.tensor([0]), classes)


def test_mix_targets_weighs_votes_and_falls_back_on_the_label():
    votes = torch.tensor([[0.0, 6.0, 2.0], [0.0, 0.0, 0.0]])
    targets = finetune_fer.mix_targets(torch.tensor([0, 2]), votes, 0.4)
    torch.testing.assert_close(targets, torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0]]))


def test_copies_in_other_splits_are_judged_apart(tmp_path, fer_dir, options, capsys):
    copied = sorted((fer_dir / "test").rglob("*.png"))[:4]
    for path in copied:
        shutil.copy(path, fer_dir / "train" / path.parent.name / f"9{path.stem}.png")
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert "hint" not in capsys.readouterr().out  # after stage 3, this stage is the way
    test = json.loads((tmp_path / "run" / "test.json").read_text())
    assert test["n"] == 30
    assert test["subsets"]["not in another split"]["n"] == 26


def test_classes_that_the_head_does_not_know_are_named(tmp_path, options, capsys):
    start = write_checkpoint(tmp_path / "start" / "best.pt", shared.gray_resnet(ARCH, 2), ("angry", "happy"))
    finetune_fer.main([*options, "--init", str(start), "--out-dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "untrained in the head: disgusted, sad, surprised\n" in out
    assert "hint: these are few faces; finetune_emotion.py --cropped --no-mix learns more from them" in out
    assert "(--data-dir DIR/train if DIR has splits)\n" in out


def test_a_trained_model_learns_on_in_the_parts_that_are_named(tmp_path, options):
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "first")])
    first = tmp_path / "first" / "best.pt"
    before = shared.load_checkpoint(first)
    shared.save_checkpoint(first, {**before, "stage": "emotion"})
    finetune_fer.main(
        [*options, "--init", str(first), "--unfreeze", "layer4", "fc", "--out-dir", str(tmp_path / "second")]
    )
    after = shared.load_checkpoint(tmp_path / "second" / "best.pt")
    assert after["stage"] == "fer"
    for name, value in after["model"].items():
        frozen = not name.startswith(("layer4", "fc"))
        assert value.equal(before["model"][name]) == frozen or "num_batches" in name, name


def write_teacher(folder, classes, **bias):
    """Write the best.pt of a network with random weights, drawn to some classes."""
    torch.manual_seed(len(classes))
    net = shared.gray_resnet(ARCH, len(classes))
    for name, value in bias.items():
        net.fc.bias.data[classes.index(name)] = value
    return write_checkpoint(folder / "best.pt", net, classes, temperature=0.5)


def test_teachers_are_learned_from_beside_the_labels(tmp_path, fer_dir, options):
    """All that the teachers see is sad; learned from them alone, every face is, after a resumed run too."""
    teachers = [str(write_teacher(tmp_path / name, FIVE, sad=20.0)) for name in "ab"]
    taught = [*QUICK, "--teachers", *teachers, "--teacher-weight", "1", "--epochs", "2"]
    finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), *taught])
    last = tmp_path / "run" / "last.pt"
    assert shared.load_checkpoint(last)["config"]["teachers"] == teachers
    finetune_fer.main(["--resume", str(last), "--epochs", "4"])
    net = shared.load_network(shared.load_checkpoint(last))
    images, labels, _ = shared.load_faces(fer_dir, "test", FIVE)
    batches = shared.FaceBatches(images, labels, 16, 32, torch.device("cpu"))
    assert set(shared.evaluate(net, batches.eval())[0].argmax(1).tolist()) == {FIVE.index("sad")}


def test_ask_teachers_averages_networks_and_mirror_images(tmp_path, fer_dir):
    device, classes = torch.device("cpu"), FIVE
    paths = [write_teacher(tmp_path / "a", classes), write_teacher(tmp_path / "b", classes[::-1], happy=1.0)]
    images, labels, _ = shared.load_faces(fer_dir, "test", classes)
    expected = torch.zeros(len(images), 5)
    for path, order in zip(paths, ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]), strict=True):
        net = shared.load_network(shared.load_checkpoint(path))
        for view in (images, images.flip(-1)):
            logits, _ = shared.evaluate(net, shared.FaceBatches(view, labels, 16, 32, device).eval())
            expected += (logits / 0.5).softmax(1)[:, order] / 4
    answers = finetune_fer.ask_teachers(paths, images, classes, device)
    torch.testing.assert_close(answers, expected, atol=0.01, rtol=0)  # it may run in bfloat16


def test_a_teacher_of_other_emotions_is_a_mistake(tmp_path, options):
    teacher = write_teacher(tmp_path / "teacher", ["happy", "sad"])
    with pytest.raises(SystemExit, match=f"{teacher} has learned happy sad, expected angry disgusted"):
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run"), "--teachers", str(teacher)])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_shipped_model_reaches_its_accuracy_on_privatetest(tmp_path, real_data, capsys):
    """At least 82 % of the five-class PrivateTest; the README gives the figures."""
    unpack_fer_data.main([str(real_data / "fer2013.csv.xz"), "--out-dir", str(tmp_path / "fer")])
    options = f"--data-dir {tmp_path}/fer --evaluate {shared.DEFAULT_MODEL} --out-dir {tmp_path}"
    finetune_fer.main(options.split())
    test = json.loads((tmp_path / "test.json").read_text())
    assert test["n"] == 2423
    assert test["acc"] >= 0.82
    assert test["mean_recall"] >= 0.77
    assert min(test["recall"].values()) > 0.6
    assert test["ece"] < 0.03
    assert shared.DEFAULT_MODEL.stat().st_size < 50_000_000
    assert "accuracy" in capsys.readouterr().out


# --- own faces ---


@pytest.mark.parametrize("splits", [("train", "val", "test"), ("train", "val"), ("train",), ()])
def test_own_faces_of_any_size_are_learned_whatever_splits_there_are(tmp_path, options, splits, capsys):
    """The report is on test, or on val if there is none; all classes are told apart, none is a usual one."""
    classes, sizes = ("attentive", "bored", "confused"), itertools.cycle([(30, 40), (200, 180)])
    for folder in [tmp_path / "mine" / split for split in splits] or [tmp_path / "mine"]:
        for path in shared.list_images(make_faces(folder, 12 if splits else 24, classes)):
            with Image.open(path) as face:
                face.convert("RGB").resize(next(sizes)).save(path)
    out_dir = tmp_path / "run"
    options += ["--data-dir", str(tmp_path / "mine"), "--out-dir", str(out_dir), "--epochs", "1"]
    finetune_fer.main(options)
    captured = capsys.readouterr()
    reported, other = ("test", "val") if not splits or "test" in splits else ("val", "test")
    assert f"{reported}: accuracy" in captured.out
    assert ("judged on val" in captured.err) == (reported == "val")
    assert (out_dir / f"{reported}.json").exists()
    assert not (out_dir / f"{other}.json").exists()
    best = shared.load_checkpoint(out_dir / "best.pt")
    assert tuple(best["classes"]) == tuple(best["default_classes"]) == classes
    finetune_fer.main(["--data-dir", str(tmp_path / "mine"), "--evaluate", str(out_dir / "best.pt")])
    again = capsys.readouterr().out.splitlines()
    assert [line for line in captured.out.splitlines() if line in again]
    assert all(line in captured.out for line in again)


def test_the_image_size_is_that_of_init_except_of_the_gray_stage(tmp_path, fer_dir, gray_checkpoint):
    small = write_checkpoint(tmp_path / "small.pt", shared.gray_resnet(ARCH, 2), ("happy", "sad"))
    for init, size in ((gray_checkpoint, shared.IMAGE_SIZE), (small, 32)):
        out_dir = tmp_path / f"run{size}"
        options = ["--data-dir", fer_dir, "--init", init, "--out-dir", out_dir, "--epochs", 1]
        finetune_fer.main([str(option) for option in options])
        best = shared.load_checkpoint(out_dir / "best.pt")
        assert (best["image_size"], best["arch"]) == (size, ARCH)


def test_the_report_has_the_accuracy_of_the_faces_that_are_sure(capsys):
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.tensor([[0.55, 0.45], [0.85, 0.15], [0.35, 0.65], [0.05, 0.95]]).log()
    options = {"temperature": 1.0, "classes": ("a", "b"), "out_dir": None, "subsets": {}}
    shared.report("test", logits, labels, **options)
    levels = "0.4 75.0% of 100.0%, 0.5 75.0% of 100.0%, 0.6 66.7% of 75.0%, 0.7 100.0% of 50.0%, "
    assert f"{levels}0.8 100.0% of 50.0%, 0.9 100.0% of 25.0%\n" in capsys.readouterr().out


# --- other collections ---


def test_other_collections_are_learned_beside_fer(tmp_path, fer_dir, options, capsys):
    """A folder with splits, and one without, with a class that FER lacks."""
    more, web = tmp_path / "more", tmp_path / "web"
    make_faces(more / "train", 16)
    make_faces(more / "val", 8)
    make_faces(web, 40, ("happy", "neutral", "sad"))
    out_dir = tmp_path / "run"
    mix = ["--mix", str(more), f"{web}=0.5"]
    finetune_fer.main([*options, *mix, "--out-dir", str(out_dir), "--epochs", "2"])
    out = capsys.readouterr().out
    splits = {
        split: len(shared.list_split(web, split, ("happy", "neutral", "sad"))) for split in shared.SPLITS
    }
    assert sum(splits.values()) == 120
    assert all(6 <= splits[split] <= 20 for split in ("val", "test"))
    for line in ("fer train: 80", "more train: 80", "more val: 40", f"web train: {splits['train']}"):
        assert line in out
    assert "test_web_all: accuracy" in out
    assert "test_more" not in out  # it has no test faces
    best = shared.load_checkpoint(out_dir / "best.pt")
    assert best["classes"] == sorted([*FIVE, "neutral"])
    assert best["default_classes"] == list(shared.EMOTIONS)
    assert best["model"]["fc.weight"].shape == (6, FEATURES)
    assert best["config"]["mix"] == mix[1:]
    assert {"fer_acc", "more_acc", "web_acc"} < best["metrics"].keys()
    last = shared.load_checkpoint(out_dir / "last.pt")
    assert last["model"]["fc.weight"].shape == (4 * 6, FEATURES)  # the common head and each collection's
    with Image.open(out_dir / "test_reliability_by_collection.png") as picture:
        assert picture.width > 1.5 * picture.height  # FER's test faces, and the web's: a column each


def test_a_collection_without_default_classes_is_reported_with_all_classes_alone(tmp_path, options, capsys):
    web, out_dir = make_faces(tmp_path / "web", 40, ("fearful", "neutral")), tmp_path / "run"
    mix = ["--mix", str(web), "--epochs", "1"]
    finetune_fer.main([*options, *mix, "--out-dir", str(out_dir)])
    trained = capsys.readouterr().out
    assert "test_web_all: accuracy" in trained
    assert "nan" not in trained
    assert not (out_dir / "test_web.json").exists()
    assert not (out_dir / "test_reliability_by_collection.png").exists()  # it would be FER's alone
    finetune_fer.main(["--data-dir", str(web), "--evaluate", str(out_dir / "best.pt")])
    evaluated = capsys.readouterr().out.replace("test_all", "test_web_all").splitlines()
    assert len(evaluated) == 11
    assert set(evaluated) <= set(trained.splitlines())


def test_val_faces_of_no_default_class_are_a_mistake_before_training(tmp_path, fer_dir, options):
    make_faces(fer_dir / "train", 16, ("fearful", "neutral"))
    shutil.rmtree(fer_dir / "val")
    make_faces(fer_dir / "val", 4, ("fearful", "neutral"))
    with pytest.raises(SystemExit, match="no val face is of angry disgusted happy sad surprised"):
        finetune_fer.main([*options, "--out-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("collection", "message"),
    [
        ("nowhere", "expected a folder"),
        ("FER", "have one name"),
        ("FER=much", "DIR or DIR=WEIGHT"),
        ("FER=0", "above 0"),
        ("=2", "=2 is no collection of faces, expected a folder"),  # of a variable that is unset
    ],
)
def test_a_collection_that_is_none_is_one_line(tmp_path, fer_dir, options, collection, message):
    with pytest.raises(SystemExit) as stop:
        finetune_fer.main(
            [*options, "--out-dir", str(tmp_path / "run"), "--mix", collection.replace("FER", str(fer_dir))]
        )
    assert message in stop.value.code
    assert "\n" not in stop.value.code


def test_vary_outline_leaves_whole_faces_alone_and_varies_black_surroundings():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(60, 200, (60, 1, 48, 48), generator=generator, dtype=torch.uint8)
    assert shared.vary_outline(whole).equal(whole)
    side = torch.linspace(-1, 1, 48)
    inside = (side[:, None] ** 2 + side**2 < 0.8)[None, None]
    cut = whole * inside
    varied = shared.vary_outline(cut)
    corner = varied[:, 0, 0, 0]
    assert 10 <= int((corner == 0).sum()) <= 30  # a third
    core = (side[:, None] ** 2 + side**2 < 0.5)[None, None].expand_as(varied)
    assert varied[core].equal(cut[core])
    assert shared.vary_outline(cut).equal(varied)

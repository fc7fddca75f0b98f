import csv
import functools
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import FIVE, ROOT, address_space_limit, make_faces, write_checkpoint
from PIL import Image
from tiny_resnet import ARCH, FEATURES

import finetune_emotion
import model as shared

CLASSES = ("angry", "happy")
NAMES = [str(i) for i in range(1000)]


@pytest.fixture(scope="session")
def cut_photos_dir(tmp_path_factory, sample_photo):
    """Two photos of one face for each of two emotions, and some that are of no use; `faces` beside them."""
    folder = tmp_path_factory.mktemp("photos") / "google"
    with Image.open(sample_photo) as montage:
        quarters = [montage.crop((x, y, x + 480, y + 480)) for y in (0, 480) for x in (0, 480)]
    for name, faces in (("angry", quarters[2:]), ("happy", quarters[:2])):
        (folder / name).mkdir(parents=True)
        for i, face in enumerate(faces):
            face.save(folder / name / f"{i}.jpg")
    (folder / "angry" / "more").mkdir()
    (folder / "angry" / "1.jpg").rename(folder / "angry" / "more" / "1.jpg")
    shutil.copy(sample_photo, folder / "angry" / "four_faces.jpg")
    Image.new("RGB", (200, 200), "gray").save(folder / "happy" / "empty.png")
    (folder / "happy" / "page.jpg").write_text("<html>")
    cut(folder, shared.FaceFinder())
    return folder


@pytest.fixture
def photos_dir(tmp_path, cut_photos_dir):
    """Those photos, not cut yet."""
    return shutil.copytree(cut_photos_dir, tmp_path / "google")


@pytest.fixture
def fer_checkpoint(tmp_path):
    torch.manual_seed(0)
    net = shared.gray_resnet(ARCH, 2)
    return write_checkpoint(tmp_path / "fer.pt", net, CLASSES, crop_margin=0.1, temperature=1.5)


@pytest.fixture
def options(tmp_path, photos_dir, cut_photos_dir, fer_checkpoint):
    """A short run on the photos alone, whose faces are cut already."""
    shutil.copytree(cut_photos_dir.parent / "faces", tmp_path / "faces")
    options = ["--data-dir", photos_dir, "--faces-dir", tmp_path / "faces", "--init", fer_checkpoint]
    options += ["--out-dir", tmp_path / "run", "--image-size", 32, "--batch-size", 4, "--no-mix"]
    return [str(option) for option in (*options, "--epochs", 1, "--val-fraction", 0.5)]


@pytest.fixture
def mixed(options, fer_dir):
    """The same with FER's faces beside the photos, of which all may be forgotten."""
    return [*options, "--mix", str(fer_dir), "--max-loss", "100"]


class CountingFinder(shared.FaceFinder):
    """The real finder; it counts the photos it looks at and may break off."""

    seen, break_after = 0, None

    def find(self, image):
        if self.seen == self.break_after:
            raise KeyboardInterrupt
        self.seen += 1
        return super().find(image)


def cut(photos_dir, finder, **options):
    options = {"margin": 0.1, "largest_face": False, "size": 96, **options}
    return finetune_emotion.cut_photos(photos_dir, photos_dir.parent / "faces", CLASSES, finder, **options)


def read_index(faces_dir):
    return [json.loads(line) for line in (faces_dir / "index.jsonl").read_text().splitlines()]


def weights_that_changed(start, trained):
    start, trained = shared.load_checkpoint(start), shared.load_checkpoint(trained)
    return {name for name, value in trained["model"].items() if not value.equal(start["model"][name])}


# --- from photos to faces ---


def test_single_faces_are_cut_and_the_rest_is_counted(tmp_path, options, capsys):
    shutil.rmtree(tmp_path / "faces")
    finetune_emotion.main(options)
    table = capsys.readouterr().out.splitlines()[:4]
    assert [line.split() for line in table] == [
        ["photos", "one", "face", "cut", "no", "face", "several", "faces", "not", "readable"],
        ["angry", "2", "0", "1", "0"],
        ["happy", "2", "1", "0", "1"],
        ["total", "4", "1", "1", "1"],
    ]
    faces = sorted((tmp_path / "faces").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "faces")) for path in faces] == [
        *("angry/0.jpg.png", "angry/more/1.jpg.png", "happy/0.jpg.png", "happy/1.jpg.png")
    ]
    with Image.open(faces[0]) as face:
        assert (face.mode, face.size) == ("L", (32, 32))  # as the network sees it
    last = shared.load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last["stage"], last["classes"], last["crop_margin"]) == ("emotion", ["angry", "happy"], 0.1)


def test_the_index_says_what_was_cut_from_which_photo(photos_dir):
    record = cut(photos_dir, shared.FaceFinder())[0]
    assert read_index(photos_dir.parent / "faces")[0] == record
    assert (record["photo"], record["label"], record["reason"]) == ("angry/0.jpg", "angry", None)
    assert record["crop"] == "angry/0.jpg.png"
    assert record["sha256"] == shared.file_digest(photos_dir / "angry" / "0.jpg")
    assert record["blur"] > 0


def test_an_index_of_an_earlier_version_is_as_good(photos_dir):
    """It has more fields, of which none is read."""
    index_path = photos_dir.parent / "faces" / "index.jsonl"
    cut(photos_dir, shared.FaceFinder())
    older = [{**record, "size": [480, 480], "prob": 0.99} for record in read_index(index_path.parent)]
    index_path.write_text("".join(json.dumps(record) + "\n" for record in older))
    again = CountingFinder()
    cut(photos_dir, again)
    assert again.seen == 0


def test_blur_lowers_the_blur_measure(sample_photo):
    with Image.open(sample_photo) as image:
        sharp = image.convert("L").resize((96, 96))
    blurred = sharp.resize((24, 24)).resize((96, 96))
    assert finetune_emotion.blur_measure(blurred) < finetune_emotion.blur_measure(sharp) / 4
    assert finetune_emotion.blur_measure(Image.new("L", (96, 96), 7)) == 0


def test_a_second_run_looks_only_at_what_is_new_or_changed(photos_dir):
    faces_dir = photos_dir.parent / "faces"
    cut(photos_dir, CountingFinder())
    index = read_index(faces_dir)
    again = CountingFinder()
    assert cut(photos_dir, again) == index
    assert again.seen == 0
    shutil.copy(photos_dir / "happy" / "0.jpg", photos_dir / "angry" / "0.jpg")
    (photos_dir / "happy" / "1.jpg").unlink()
    before = (faces_dir / "angry" / "0.jpg.png").read_bytes()
    changed = CountingFinder()
    records = cut(photos_dir, changed)
    assert changed.seen == 1
    assert (faces_dir / "angry" / "0.jpg.png").read_bytes() != before
    assert not (faces_dir / "happy" / "1.jpg.png").exists()
    assert [record["photo"] for record in read_index(faces_dir)] == [record["photo"] for record in records]
    wider = CountingFinder()
    cut(photos_dir, wider, margin=0.4)
    assert wider.seen == 5  # all that are readable


def test_a_lost_crop_is_cut_again(photos_dir):
    cut(photos_dir, shared.FaceFinder())
    crop = photos_dir.parent / "faces" / "angry" / "0.jpg.png"
    crop.unlink()
    cut(photos_dir, shared.FaceFinder())
    assert crop.exists()


def test_a_photo_that_goes_away_meanwhile_is_not_readable(photos_dir):
    gone = photos_dir / "happy" / "1.jpg"

    class Remover(shared.FaceFinder):
        def find(self, image):
            gone.unlink(missing_ok=True)
            return super().find(image)

    reasons = {record["photo"]: record["reason"] for record in cut(photos_dir, Remover())}
    assert reasons["happy/1.jpg"] == "not readable"
    assert reasons["happy/0.jpg"] is None


def test_an_interrupted_search_goes_on_where_it_was(photos_dir):
    broken = CountingFinder()
    broken.break_after = 3
    with pytest.raises(KeyboardInterrupt):
        cut(photos_dir, broken)
    with (photos_dir.parent / "faces" / "index.jsonl").open("a") as index:
        index.write('{"photo": "happy/0.jp')
    rest = CountingFinder()
    records = cut(photos_dir, rest)
    assert rest.seen == 6 - 3  # of the 7 photos one is not readable
    assert sum(record["reason"] is None for record in records) == 4


@pytest.mark.parametrize("photo", ["../victim", "/victim", "linked/victim", "a\0b"])
def test_an_index_that_names_a_photo_elsewhere_deletes_nothing_there(tmp_path, photos_dir, photo):
    faces_dir, victim = tmp_path / "faces", tmp_path / "victim.png"
    victim.write_text("precious")
    faces_dir.mkdir()
    (faces_dir / "linked").symlink_to(tmp_path)
    photo = str(victim.with_suffix("")) if photo == "/victim" else photo
    record = {"photo": photo, "label": "angry", "crop": f"{photo}.png", "reason": "no face"}
    (faces_dir / "index.jsonl").write_text(json.dumps(record) + "\n")
    assert len(cut(photos_dir, shared.FaceFinder())) == 7
    assert victim.read_text() == "precious"


def test_a_record_that_names_another_crop_is_made_anew(photos_dir):
    faces_dir = photos_dir.parent / "faces"
    records = cut(photos_dir, shared.FaceFinder())
    wrong = [{**record, "crop": "../victim"} for record in records]
    (faces_dir / "index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in wrong))
    assert cut(photos_dir, shared.FaceFinder()) == records == read_index(faces_dir)


def test_lines_of_the_index_that_are_no_records_count_for_nothing(photos_dir):
    faces_dir = photos_dir.parent / "faces"
    cut(photos_dir, CountingFinder())
    index = (faces_dir / "index.jsonl").read_text()
    record = json.loads(index.splitlines()[0])
    wrong = [
        {**record, "blur": "much"},
        {**record, "blur": 10**400},
        {**record, "reason": "none"},
        {"photo": 1},
        [],
        7,
        None,
    ]
    lines = ["[" * 100_000, *map(json.dumps, wrong), *index.splitlines()[1:], '{"photo": "happy/0.jp']
    (faces_dir / "index.jsonl").write_text("\n".join(lines))
    again = CountingFinder()
    cut(photos_dir, again)
    assert again.seen == 1
    assert sorted((faces_dir / "index.jsonl").read_text().splitlines()) == sorted(index.splitlines())


def test_of_several_faces_the_largest_is_cut_if_asked(photos_dir):
    by_photo = {record["photo"]: record for record in cut(photos_dir, shared.FaceFinder(), largest_face=True)}
    with Image.open(photos_dir / "angry" / "four_faces.jpg") as image:
        boxes = shared.FaceFinder().find(image).boxes
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    [largest] = shared.crop_faces(image.convert("L"), boxes[[sizes.argmax()]], 0.1)
    with Image.open(photos_dir.parent / "faces" / "angry" / "four_faces.jpg.png") as crop:
        expected = largest.resize(crop.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(crop, float) - np.asarray(expected, float)).mean() < 1
    assert by_photo["angry/four_faces.jpg"]["reason"] is None
    assert by_photo["happy/empty.png"]["reason"] == "no face"


def test_a_missing_emotion_is_one_line(photos_dir, options):
    shutil.rmtree(photos_dir / "happy")
    with pytest.raises(SystemExit, match=f"{photos_dir} has 1 emotion folders, expected 2 or more"):
        finetune_emotion.main(options)


@pytest.mark.parametrize("name", [".", ".."])
def test_the_folder_of_the_faces_is_beside_that_of_the_photos_whatever_it_is_called(
    name, photos_dir, options, monkeypatch
):
    monkeypatch.chdir(photos_dir if name == "." else photos_dir / "angry")
    faces_dir = options.index("--faces-dir")
    finetune_emotion.main([*options[:faces_dir], *options[faces_dir + 2 :], "--data-dir", name])
    assert (photos_dir.parent / "google_faces" / "index.jsonl").exists()


@pytest.mark.parametrize("task", [["--cropped"], ["--evaluate", "best.pt"]])
def test_a_folder_that_has_splits_is_one_line(fer_dir, options, task):
    with pytest.raises(SystemExit, match=f"^error: {fer_dir} has splits; pass {fer_dir}/train, or another"):
        finetune_emotion.main([*options, "--data-dir", str(fer_dir), *task])


def test_photos_that_are_not_readable_are_named_and_stop_it_if_they_are_many(
    tmp_path, photos_dir, options, capsys
):
    finetune_emotion.main(options)
    assert "not readable: happy/page.jpg\n" in capsys.readouterr().err
    (photos_dir / "angry" / "page.jpg").write_text("<html>")
    with pytest.raises(SystemExit) as stop:
        finetune_emotion.main([*options, "--out-dir", str(tmp_path / "other")])
    assert "not readable: angry/page.jpg, happy/page.jpg\n" in capsys.readouterr().err
    assert stop.value.code.startswith("error: 2 of 8 images are not readable, expected a single one or 1%")
    assert not list((tmp_path / "other").glob("*"))


@pytest.mark.parametrize("folder", ["run", "faces"])
def test_a_second_run_into_a_folder_stops_and_names_the_first(tmp_path, options, folder):
    with shared.only_run_in(tmp_path / folder), pytest.raises(SystemExit, match=f"{folder} is in use by "):
        finetune_emotion.main(options)


def test_photos_without_faces_are_one_line(tmp_path, options):
    shutil.rmtree(tmp_path / "faces")
    for name in CLASSES:
        (tmp_path / "empty" / name).mkdir(parents=True)
        for side in (64, 65):
            Image.new("RGB", (side, side)).save(tmp_path / "empty" / name / f"{side}.png")
    with pytest.raises(SystemExit, match="no photo has a single face"):
        finetune_emotion.main([*options, "--data-dir", str(tmp_path / "empty")])


def test_a_class_without_a_face_is_refused_until_a_correction_gives_it_one(tmp_path, photos_dir, options):
    (photos_dir / "bored").mkdir()
    for side in (64, 65):
        Image.new("RGB", (side, side)).save(photos_dir / "bored" / f"{side}.png")
    with pytest.raises(SystemExit) as stop:
        finetune_emotion.main(options)
    assert stop.value.code.startswith("error: bored: no photo with a single face is left; add photos, ")
    (photos_dir / "corrections.csv").write_text("path,label\nhappy/0.jpg,bored\n")
    finetune_emotion.main(options)
    best = shared.load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["classes"] == ["angry", "bored", "happy"]


# --- from faces to train and val ---


@pytest.fixture
def copies(sample_photo):
    """Eight faces as they may come: whole, scaled, brighter, and the next."""
    with Image.open(sample_photo) as montage:
        faces = [montage.crop((x, y, x + 400, y + 400)).convert("L") for y in (60, 540) for x in (60, 540)]
    versions = []
    for face in faces:
        versions += [face, face.resize((60, 60)), face.point(lambda value: min(value * 1.2, 255))]
    arrays = [np.asarray(version.resize((96, 96))) for version in versions]
    return torch.from_numpy(np.stack(arrays))[:, None]


def test_near_duplicates_are_one_group(copies):
    groups = finetune_emotion.group_duplicates(finetune_emotion.hash_faces(copies))
    assert groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_split_keeps_groups_together_and_gives_each_class_its_share():
    labels = torch.tensor([0] * 60 + [1] * 20)
    groups = torch.arange(80) // 2
    is_val = finetune_emotion.split_groups(labels, groups, NAMES[:80], 0.2, seed=0)
    assert is_val[::2].equal(is_val[1::2])
    assert [int(is_val[labels == label].sum()) for label in (0, 1)] == [12, 4]


def test_a_split_follows_its_seed():
    labels, groups = torch.arange(50) % 2, torch.arange(50)
    first, same, other = (
        finetune_emotion.split_groups(labels, groups, NAMES[:50], 0.2, seed) for seed in (3, 3, 4)
    )
    assert first.equal(same)
    assert not first.equal(other)


def test_photos_that_come_later_move_hardly_any_to_the_other_side():
    """Else a second run would be judged by what the model that it began with has learned."""
    groups = torch.arange(1000) // 2
    whole = finetune_emotion.split_groups(torch.zeros(1000).long(), groups, NAMES, 0.2, seed=0)
    was_there = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.9
    names = [name for name, was in zip(NAMES, was_there, strict=True) if was]
    part = finetune_emotion.split_groups(
        torch.zeros(len(names)).long(), groups[was_there], names, 0.2, seed=0
    )
    learned_before = (whole[was_there] & ~part).sum() / whole.sum()
    assert learned_before < 0.1


def test_large_groups_are_held_out_no_oftener_than_others():
    groups = torch.cat([torch.arange(700) // 10, torch.arange(70, 370)])  # 70 of ten faces, 300 of one
    is_val = finetune_emotion.split_groups(torch.zeros(1000).long(), groups, NAMES, 0.3, seed=0)
    assert 0.2 < is_val[:700].float().mean() < 0.4


def test_a_correction_moves_no_face_to_the_other_side(tmp_path):
    faces_dir = make_faces(tmp_path / "faces", 10, CLASSES)
    records = [
        {"label": name, "reason": None, "sha256": f"{name} {i}"}
        | dict.fromkeys(("photo", "crop"), f"{name}/{i:05}.png")
        for name in CLASSES
        for i in range(10)
    ]

    def load(corrections):
        return finetune_emotion.load_labelled(
            records, faces_dir, CLASSES, corrections, val_fraction=0.3, seed=0
        )

    plain = load({})
    corrected = load({"angry/00000.png": "happy", "happy/00003.png": "", "happy/00004.png": "happy"})
    left = [i for i in range(20) if i != 13]
    assert corrected.records == [plain.records[i] for i in left]
    assert corrected.is_val.equal(plain.is_val[left])
    assert corrected.images.equal(plain.images[left])
    assert (corrected.labels != plain.labels[left]).nonzero().tolist() == [[0]]
    assert corrected.is_corrected.nonzero().tolist() == [[0], [13]]


def test_rehearsal_joins_fer_to_every_batch_as_the_network_sees_it():
    batches = functools.partial(
        shared.FaceBatches, batch_size=4, image_size=32, device=torch.device("cpu"), seed=0
    )
    images, labels = torch.full((13, 1, 48, 48), 128, dtype=torch.uint8), torch.zeros(13).long()
    is_val = torch.arange(13) >= 10
    faces = finetune_emotion.LabelledFaces([], [], images, labels, torch.arange(13), is_val, is_val)
    random = torch.randint(0, 256, (3, 5, 1, 48, 48), generator=torch.Generator().manual_seed(0)).byte()
    fer = {
        split: {"fer": (part, torch.ones(5).long())}
        for split, part in zip(shared.SPLITS, random, strict=True)
    }
    net = shared.gray_resnet(ARCH, 2)
    data, sizes = finetune_emotion.training_data(
        net,
        faces,
        fer,
        batches,
        collections={"fer": shared.Collection(None)},
        classes=CLASSES,
        parent={"classes": CLASSES},
        share=0.5,
    )
    assert sizes == {
        "photos train": "10 images (angry 10, happy 0)",
        "fer train": "5 images (angry 0, happy 5)",
    }
    with torch.no_grad():
        seen = net(shared.normalize_faces(data.others.images, 32)).softmax(1)
    assert data.others.targets.allclose(seen, atol=0.01)  # it may run in bfloat16
    seen = data.others.targets
    targets = [targets for _, targets in data.train(1)]
    assert [len(part) for part in targets] == [6, 7, 4]  # of FER's 5 the last joins the batch before it
    for part, num_photos in zip(targets, (4, 4, 2), strict=True):
        assert part[:num_photos].equal(torch.tensor([[1.0, 0.0]] * num_photos))
        assert (torch.cdist(part[num_photos:], seen).amin(1) < 1e-4).all()
    assert len(data) == 17
    as_they_are = torch.cat([labels for _, labels in data.eval()])
    assert as_they_are.tolist() == [0] * 10 + [1] * 5  # an epoch has seven of FER's, but there are five
    again, other = (next(iter(data.train(epoch)))[0] for epoch in (1, 2))
    assert again.equal(next(iter(data.train(1)))[0])
    assert not again.equal(other)


def test_photos_that_fer_is_judged_on_are_not_learned(tmp_path, fer_dir, options, mixed, capsys):
    """One photo's face stands in FER's test, smaller and brighter: of two to learn from one is left."""
    finetune_emotion.main(options)
    records = read_index(tmp_path / "faces")
    faces = finetune_emotion.load_labelled(records, tmp_path / "faces", CLASSES, {}, val_fraction=0.5, seed=0)
    leaked = Image.fromarray(faces.images[~faces.is_val][0, 0].numpy())
    leaked.resize((48, 48)).point(lambda value: min(value * 1.1, 255)).save(
        fer_dir / "test" / "happy" / "0.png"
    )
    capsys.readouterr()
    finetune_emotion.main([*mixed, "--out-dir", str(tmp_path / "mixed")])
    assert "train: 1 images" in capsys.readouterr().out


# --- doubts about labels ---


def test_cross_validation_learns_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=generator)
    noise = torch.randn(200, 50, generator=generator)
    clear = noise + 4 * labels[:, None]
    groups = torch.arange(200)
    probs = finetune_emotion.cross_validate(clear, labels, groups, 2)
    assert probs.sum(1).allclose(torch.ones(200))
    assert (probs.argmax(1) == labels).float().mean() > 0.98
    # A head that had seen the faces it judges would remember these; so would one that had seen their copies.
    copies = torch.cat([noise, noise])
    probs = finetune_emotion.cross_validate(copies, labels.repeat(2), groups.repeat(2), 2)
    assert 0.35 < (probs.argmax(1) == labels.repeat(2)).float().mean() < 0.65


def test_doubt_is_the_margin_by_which_another_class_is_likelier():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    assert finetune_emotion.doubt(probs, torch.tensor([0, 1])).tolist() == pytest.approx([-0.5, 0.5])


def test_corrections_are_checked(tmp_path):
    path = tmp_path / "corrections.csv"
    path.write_text('\ufeffpath,label\r\n"angry/a, b.jpg",happy\r\nangry/c.jpg,\r\n', encoding="utf-8")
    assert finetune_emotion.read_corrections(path, CLASSES) == {"angry/a, b.jpg": "happy", "angry/c.jpg": ""}
    path.write_text("path,label\nangry/a.jpg,hapy\n")
    with pytest.raises(
        ValueError, match=f"{path} is not .*, line 2: it has the label 'hapy', expected empty or"
    ):
        finetune_emotion.read_corrections(path, CLASSES)
    for content, words in {
        "angry/a.jpg;happy\n": "line 1: it lacks label, path",
        "path,label\nangry/a.jpg,happy\n../a.jpg,happy\n": r"line 3: '\.\./a\.jpg' leads out of",
        "path,label\n/etc/passwd,happy\n": "line 2: '/etc/passwd' leads out of",
        "path,label\na\0.jpg,happy\n": "is of an unknown kind, not text",
        "\n<html>": "is a web page",
        f"path,label\n{'x' * 10**6},happy\n": "field larger than field limit",
        "path,label\nangry/a.jpg\n": "line 2: it has more or fewer columns than the first",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            finetune_emotion.read_corrections(path, CLASSES)
    path.write_bytes("path,label\nü.jpg,happy\n".encode("latin-1"))
    with pytest.raises(ValueError, match="it is not in UTF-8"):
        finetune_emotion.read_corrections(path, CLASSES)
    with pytest.raises(FileNotFoundError):
        finetune_emotion.read_corrections(tmp_path / "none.csv", CLASSES)


# --- training ---


def test_only_the_last_stage_and_the_head_learn_and_frozen_batch_norm_stays(
    tmp_path, options, fer_checkpoint
):
    finetune_emotion.main([*options, "--epochs", "2"])  # the first step of a run has a learning rate of 0
    changed = weights_that_changed(fer_checkpoint, tmp_path / "run" / "last.pt")
    assert {name.split(".")[0] for name in changed} == {"layer4", "fc"}
    assert "layer4.0.bn1.running_mean" in changed  # so the frozen ones' would be, if they drifted


def test_unfreeze_means_what_it_says(tmp_path, options, fer_checkpoint):
    finetune_emotion.main([*options, "--unfreeze", "fc", "--epochs", "2"])
    assert weights_that_changed(fer_checkpoint, tmp_path / "run" / "last.pt") == {"fc.weight", "fc.bias"}


def test_held_out_faces_are_judged_as_they_are(tmp_path, options, fer_checkpoint, monkeypatch):
    finetune_emotion.main(options)
    monkeypatch.setitem(sys.modules, "openvino", None)  # PyTorch classifies, as it judges: in float32
    records = read_index(tmp_path / "faces")
    faces = finetune_emotion.load_labelled(records, tmp_path / "faces", CLASSES, {}, val_fraction=0.5, seed=0)
    classifier = shared.Classifier(fer_checkpoint, "cpu")
    crops = [Image.fromarray(image[0].numpy()) for image in faces.images[faces.is_val]]
    probs = torch.from_numpy(classifier.predict_crops(crops))
    before = json.loads((tmp_path / "run" / "emotion.json").read_text())["before"]["photos val"]
    expected = torch.nn.functional.nll_loss(probs.log(), faces.labels[faces.is_val]).item()
    assert before["loss"] == pytest.approx(expected, abs=1e-4)


def test_fer_is_learned_again_and_reported(tmp_path, mixed, capsys):
    finetune_emotion.main([*mixed, "--mix-share", "2"])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "emotion.json").read_text())
    sizes = {name: result["n"] for name, result in results["after"].items()}
    assert sizes == {"photos val": 2, "fer val": 10, "fer test": 12}
    assert "fer train: 32 images (angry 16, happy 16)" in out
    row = next(line for line in out.splitlines() if line.startswith("fer test   after"))
    assert row.split()[3:5] == ["12", f"{results['after']['fer test']['acc']:.1%}"]
    assert "50% of the way: fer val" in out


def test_a_class_without_held_out_faces_has_a_dash_for_its_recall(tmp_path, capsys):
    figures = {
        "photos val": shared.judge(torch.eye(3)[:2], torch.tensor([0, 0]), 1.0, ("calm", "happy", "sad"))
    }
    finetune_emotion.report_change({"before": figures, "after": figures}, ("calm", "happy", "sad"), tmp_path)
    _, *rows, _ = capsys.readouterr().out.splitlines()
    assert [row.split()[3:] for row in rows] == [["2", "50.0%", "50.0%", "50.0%", "-", "-"]] * 2


def test_draw_back_goes_no_further_than_it_must(tmp_path, fer_dir, fer_checkpoint):
    """The new weights call all happy; a blend of both heads is right on all of val up to half of the way."""
    start = shared.load_checkpoint(fer_checkpoint)
    images, labels, _ = shared.load_faces(fer_dir, "val", CLASSES)
    faces = shared.FaceBatches(images, torch.zeros_like(labels), 4, 32, torch.device("cpu"))
    val = {"photos": faces, "fer": faces}
    run = shared.Run(tmp_path, "emotion", ARCH, CLASSES, CLASSES, 32, 0.0, {})
    head = {"fc.weight": torch.zeros(2, FEATURES), "fc.bias": torch.tensor([1.0, 0.0])}
    start["model"] |= head
    trained = {**start, "model": {**start["model"], "fc.bias": torch.tensor([-0.5, 0.0])}}
    draw_back = functools.partial(
        finetune_emotion.draw_back, trained, start["model"], val, run=run, parent=start
    )
    blended = draw_back(lowest={"fer": 0.9})
    assert blended["model"]["fc.bias"].tolist() == [0.25, 0.0]
    with pytest.raises(ValueError, match="none is called best"):
        draw_back(lowest={"fer": 1.1})


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, mixed, start):
    mixed += ["--epochs", "4", "--lr", "0.01", "--ema", "0.9"]
    stop = [ROOT / "tests" / "stop_at.py", "SIGKILL", 3, "last.pt", "finetune_emotion.py"]
    assert start(*stop, *mixed).wait() == -signal.SIGKILL
    last = tmp_path / "run" / "last.pt"
    assert shared.load_checkpoint(last)["epoch"] == 2
    finetune_emotion.main(["--resume", str(last)])
    finetune_emotion.main([*mixed, "--out-dir", str(tmp_path / "whole")])
    for name in ("last.pt", "undrawn.pt", "best.pt"):
        assert not weights_that_changed(last.with_name(name), tmp_path / "whole" / name)
    assert weights_that_changed(tmp_path / "fer.pt", last)


def test_resuming_a_finished_run_draws_back_no_further(tmp_path, mixed):
    # Two steps, for the first of all has a rate of 0.
    finetune_emotion.main([*mixed, "--batch-size", "1", "--lr", "0.01"])
    best, undrawn = (shared.load_checkpoint(tmp_path / "run" / f"{name}.pt") for name in ("best", "undrawn"))
    assert not best["model"]["fc.weight"].equal(undrawn["model"]["fc.weight"])
    finetune_emotion.main(["--resume", str(tmp_path / "run" / "last.pt")])
    again = shared.load_checkpoint(tmp_path / "run" / "best.pt")
    assert all(value.equal(again["model"][name]) for name, value in best["model"].items())


def test_a_run_without_rehearsal_is_resumed_without(tmp_path, fer_dir, options, monkeypatch):
    (tmp_path / "data").mkdir()
    fer_dir.rename(tmp_path / finetune_emotion.FER_DIR)
    monkeypatch.chdir(tmp_path)
    finetune_emotion.main(options)
    finetune_emotion.main(["--resume", str(tmp_path / "run" / "last.pt"), "--epochs", "2"])
    assert not (tmp_path / "run" / "undrawn.pt").exists()
    assert shared.load_checkpoint(tmp_path / "run" / "best.pt")["config"]["mix"] == []


def test_a_model_that_forgot_fer_is_not_called_best(tmp_path, mixed, monkeypatch):
    monkeypatch.setattr(finetune_emotion, "BLENDS", ())  # as if none of them went back far enough
    with pytest.raises(SystemExit, match="none is called best"):
        finetune_emotion.main(mixed)
    assert not (tmp_path / "run" / "best.pt").exists()
    assert (tmp_path / "run" / "last.pt").exists()


def test_corrections_beside_the_photos_are_obeyed(tmp_path, photos_dir, options, capsys):
    with (photos_dir / "corrections.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), ("angry/0.jpg", "happy"), ("happy/0.jpg", "happy")])
        csv.writer(file).writerow(("google/happy/1.jpg", "angry"))
    finetune_emotion.main(options)
    out, err = capsys.readouterr()
    assert f"3 corrections in {photos_dir / 'corrections.csv'}\n" in out
    assert "corrections of no photo looked at (1): google/happy/1.jpg\n" in err
    counts = [line for line in out.splitlines() if line.startswith(("photos train: ", "photos val: "))]
    assert sum("angry 1" in line for line in counts) == 1
    assert sum(int(line.split("happy ")[1].strip(")")) for line in counts) == 3


# --- how good a model is on photos ---


def test_evaluate_judges_photos_and_counts_what_it_cannot(tmp_path, photos_dir, fer_checkpoint, capsys):
    (photos_dir / "bored").mkdir()
    shutil.copy(photos_dir / "angry" / "0.jpg", photos_dir / "bored")
    before = sorted(tmp_path.rglob("*"))
    options = ["--evaluate", str(fer_checkpoint), "--data-dir", str(photos_dir)]
    finetune_emotion.main(options)
    out, err = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before  # without --out-dir nothing is written
    assert "left out, not learned by the model: bored" in err
    counts = [line.split() for line in out.splitlines()[1:4]]
    assert counts == [["angry", *"2010"], ["happy", *"2101"], ["total", *"4111"]]
    assert "of 4, mean recall" in out
    finetune_emotion.main([*options, "--out-dir", str(tmp_path / "out"), "--csv", str(tmp_path / "t.csv")])
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    judged = [row for row in rows if row["emotion"]]
    figures = json.loads((tmp_path / "out" / "photos.json").read_text())
    assert figures["acc"] == sum(row["label"] == row["emotion"] for row in judged) / 4
    with Image.open(tmp_path / "out" / "photos_mistakes.png") as sheet:
        assert sheet.size[0] == 1024


def test_a_sheet_of_mistakes_has_room_for_long_names(tmp_path):
    face = Image.new("L", (96, 96))
    draw = functools.partial(finetune_emotion.draw_mistakes, path=tmp_path / "sheet.png")
    widths = []
    for name in ("bored", "mildly-disappointed-but-polite"):
        draw([(face, f"{name}, said\nangry 0.90")] * 9)
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.height == 2 * (128 + 34)
            widths.append(sheet.width)
    assert widths[0] == 8 * 128 < widths[1]


def test_evaluate_takes_faces_that_are_cut_already(tmp_path, fer_checkpoint, capsys):
    faces = make_faces(tmp_path / "faces", 5, CLASSES)
    finetune_emotion.main(["--evaluate", str(fer_checkpoint), "--data-dir", str(faces), "--cropped"])
    assert "of 10, mean recall" in capsys.readouterr().out


def test_evaluate_keeps_no_large_photo_in_memory(tmp_path, fer_checkpoint, capsys):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.new("RGB", (2000, 2000)).save(tmp_path / name / "0.jpg")  # 12 MB in memory
        for i in range(1, 15):
            shutil.copy(tmp_path / name / "0.jpg", tmp_path / name / f"{i}.jpg")
    options = ["--evaluate", str(fer_checkpoint), "--data-dir", str(tmp_path), "--cropped"]
    finetune_emotion.main([*options, "--limit", "2"])  # so the networks are loaded
    with address_space_limit(200 * 2**20):
        finetune_emotion.main(options)
    assert "of 30, mean recall" in capsys.readouterr().out


def test_faces_that_are_cut_already_are_learned_from(tmp_path, options, capsys):
    make_faces(tmp_path / "ready", 5, CLASSES)
    finetune_emotion.main([*options, "--data-dir", str(tmp_path / "ready"), "--cropped"])
    counts = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert counts == [["angry", "5", "0"], ["happy", "5", "0"], ["total", "10", "0"]]
    assert shared.load_checkpoint(tmp_path / "run" / "best.pt")["classes"] == list(CLASSES)


def test_of_a_face_that_is_cut_already_the_central_square_is_taken(tmp_path):
    wide = Image.new("L", (200, 100))
    wide.paste(255, (50, 0, 150, 100))
    for name in CLASSES:
        (tmp_path / "ready" / name).mkdir(parents=True)
        wide.save(tmp_path / "ready" / name / "0.png")
    cut(tmp_path / "ready", None)
    with Image.open(tmp_path / "faces" / "angry" / "0.png.png") as face:
        assert face.getextrema() == (255, 255)
    index_path = tmp_path / "faces" / "index.jsonl"
    squashed = {"margin": 0.1, "largest_face": False}  # what an earlier version noted, and did
    older = [{**record, "settings": squashed} for record in read_index(tmp_path / "faces")]
    index_path.write_text("".join(json.dumps(record) + "\n" for record in older))
    records = cut(tmp_path / "ready", None)
    assert all(record["settings"] != squashed for record in records)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (["--csv", "table.csv"], "--csv is for --evaluate"),
        (["--csv", "table.xlsx", "--evaluate", "best.pt"], "--csv cannot write table.xlsx"),
        (["--review", "--evaluate", "best.pt"], "--evaluate and --review are two tasks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, added, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_emotion.main([*options, *added])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {reason}")


def test_evaluate_names_what_the_model_knows_where_it_knows_no_folder(tmp_path, fer_checkpoint):
    faces = make_faces(tmp_path / "faces", 2, ("bored", "calm"))
    with pytest.raises(SystemExit) as stop:
        finetune_emotion.main(["--evaluate", str(fer_checkpoint), "--data-dir", str(faces), "--cropped"])
    assert stop.value.code.endswith(f"has learned none of the folders in {faces}; it knows angry, happy")


def test_own_classes_are_learned_without_rehearsal(tmp_path, photos_dir, options, capsys):
    """Folders of names that no model knows: the head is theirs alone."""
    for old, new in (("angry", "bored"), ("happy", "attentive")):
        (photos_dir / old).rename(photos_dir / new)
    finetune_emotion.main([*options, "--faces-dir", str(tmp_path / "own_faces")])
    best = shared.load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["classes"] == best["default_classes"] == ["attentive", "bored"]
    assert best["temperature"] == 1.0  # not the parent's, of another head; two faces are too few to fit one


def test_rows_of_new_classes_are_fitted_and_known_rows_stay(tmp_path):
    """Noise, each class with its own bar: random weights tell them apart as soon as the head is fitted."""
    classes = ("angry", "bored", "calm", "confused")
    images, labels, _ = shared.load_faces(make_faces(tmp_path / "mine", 30, classes), "train", classes)
    torch.manual_seed(0)
    net = shared.gray_resnet(ARCH, 4).eval()
    before = net.fc.weight.detach().clone()
    faces = shared.FaceBatches(images, labels, 16, 48, torch.device("cpu"))
    parent = {"classes": ["angry"], "temperature": 3.0, "temperature_all": 2.0}
    started = finetune_emotion.fit_new_rows(net, faces, classes, parent)
    assert (started["temperature"], started["temperature_all"]) == (1.0, 1.0)
    assert net.fc.weight[0].equal(before[0])
    logits, _ = shared.evaluate(net, faces.eval())
    is_new = labels > 0
    assert (logits[is_new][:, 1:].argmax(1) + 1 == labels[is_new]).float().mean() > 0.8
    knowing = {**parent, "classes": classes}
    assert finetune_emotion.fit_new_rows(net, faces, classes, knowing) is knowing


def test_rehearsal_keeps_what_the_photos_do_not_show(tmp_path, fer_dir, mixed):
    """A network of seven classes, photos of two: it goes on knowing seven, and says the two."""
    torch.manual_seed(0)
    classes = sorted([*FIVE, "fearful", "neutral"])
    for split in shared.SPLITS:
        make_faces(fer_dir / split, 4, ("fearful", "neutral"))
    parent = write_checkpoint(tmp_path / "seven.pt", shared.gray_resnet(ARCH, 7), classes, crop_margin=0.1)
    finetune_emotion.main([*mixed, "--init", str(parent)])
    best = shared.load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["classes"] == classes
    assert best["default_classes"] == ["angry", "happy"]


def test_without_fer_nothing_is_rehearsed_and_it_says_so(tmp_path, options, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finetune_emotion.main([option for option in options if option != "--no-mix"])
    assert "data/fer is not there, so no faces are rehearsed" in capsys.readouterr().err


def test_a_collection_of_the_name_photos_is_refused(tmp_path, fer_dir, options):
    photos = fer_dir.rename(tmp_path / "photos")
    with pytest.raises(SystemExit, match=f"^error: {photos} has the name that the report has for --data-dir"):
        finetune_emotion.main([*options, "--mix", str(photos)])

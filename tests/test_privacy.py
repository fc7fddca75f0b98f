"""Faces that no picture shows, copies without labels, and no copies."""

import io
import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from test_detect_video import OUTPUTS, SAMPLE, read_video, write_video

import detect_emotions
import model as shared
from detect_emotions import HIDDEN_AROUND, Frame, hide_heads, hide_in_frames, overlaps

BOXES = {  # of the sample's faces, with their labels
    "happy": [(156, 119, 315, 324), (616, 94, 819, 366)],
    "sad": [(128, 620, 365, 910), (634, 560, 806, 807)],
}


def patch_sizes(path, boxes):
    """How many colours there are in the middle of each box: a face has thousands."""
    with Image.open(path) as image:
        middles = [
            image.convert("RGB").crop((x0 + 20, y0 + 20, x1 - 20, y1 - 20)) for x0, y0, x1, y1 in boxes
        ]
    return [len(middle.getcolors(2**20)) for middle in middles]


@pytest.fixture
def photo(tmp_path):
    with Image.open(SAMPLE) as image:
        image.save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_no_finder_sees_a_blurred_face_and_all_else_stays_as_it_was(run, finder, photo, tmp_path):
    assert run(photo, "--blur", "all", "--no-labels")[0] == 0
    with Image.open(photo) as before, Image.open(tmp_path / "x_emotions.png") as after:
        assert len(finder.find(before.convert("RGB")).boxes) == 4
        assert len(finder.find(after.convert("RGB")).boxes) == 0
        changed = (np.asarray(before.convert("RGB")) != np.asarray(after)).any(2)
    for x0, y0, x1, y1 in itertools.chain(*BOXES.values()):
        changed[
            max(0, y0 - (y1 - y0)) : y1 + (y1 - y0) // 3, max(0, x0 - (x1 - x0) // 2) : x1 + (x1 - x0) // 2
        ] = 0
    assert not changed.any()


@pytest.mark.slow
def test_hardly_a_face_of_real_photos_is_found_after_blurring_by_another_finder(finder, real_data):
    """facenet-pytorch's MTCNN, and only faces that ours had not found."""
    from facenet_pytorch import MTCNN

    other, before, after = MTCNN(keep_all=True), 0, []
    for path in shared.list_images(real_data / "photos"):
        image = shared.open_picture(path)
        image.thumbnail((1600, 1600))
        boxes = finder.find(image).boxes
        found, probs = other.detect(hide_heads(image, boxes))
        before += len(boxes)
        if found is not None:
            after += list(
                overlaps(found[probs > 0.9], boxes).sum(1)
                / (found[:, 2:] - found[:, :2]).prod(1)[probs > 0.9]
            )
    assert before > 130
    assert sum(share > 0.5 for share in after) == 0
    assert len(after) < 5


def test_blur_hides_the_heads_of_one_label_only(run, photo, tmp_path):
    assert run(photo, "--blur", "sad", "--no-labels")[0] == 0
    assert max(patch_sizes(tmp_path / "x_emotions.png", BOXES["sad"])) < 30
    assert min(patch_sizes(tmp_path / "x_emotions.png", BOXES["happy"])) > 1000


def test_unsure_faces_are_blurred_whatever_label_is_asked_for(run, photo, tmp_path):
    assert run(photo, "--blur", "angry", "--unsure", 0.95, "--no-labels")[0] == 0
    assert max(patch_sizes(tmp_path / "x_emotions.png", BOXES["sad"])) < 30
    assert min(patch_sizes(tmp_path / "x_emotions.png", BOXES["happy"])) > 1000


@pytest.mark.parametrize("names", [["bored"], ["sad", SAMPLE]])
def test_label_that_the_model_lacks_is_one_line(run, names):
    code, out, err = run(SAMPLE, "--blur", *names)
    assert (code, out) == (1, "")
    assert (
        f"--blur {names[-1]} is none of angry, disgusted, happy, sad, surprised, or all; put INPUT before"
        in err
    )
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_no_frame_of_a_large_video_goes_out_before_its_faces_are_found(run, tmp_path, monkeypatch):
    """So few frames fit into memory that none can wait for the next search of the usual rhythm."""
    monkeypatch.setattr(detect_emotions, "DELAY_PIXELS", 3 * 960 * 960)
    monkeypatch.setattr(detect_emotions, "BATCH_PIXELS", 960 * 960)
    monkeypatch.setattr(detect_emotions, "is_cut", lambda *_: False)  # a face may come in quietly
    image = shared.load_photo(SAMPLE)
    without = image.copy()
    without.paste("gray", (560, 40, 860, 420))  # where one of the happy faces is
    write_video(tmp_path / "clip.mp4", [without] * 11 + [image] * 14)
    assert run(tmp_path / "clip.mp4", "--blur", "all", "--no-labels")[0] == 0
    for number, frame in enumerate(read_video(tmp_path / "clip_emotions.mp4")[0]):
        Image.fromarray(frame).save(tmp_path / "frame.png")
        assert max(patch_sizes(tmp_path / "frame.png", BOXES["happy"][1:])) < 1000, number


def test_face_of_a_slow_video_is_hidden_in_the_frames_beside(run, finder, tmp_path):
    """One frame a second; in the second frame noise stands where the faces are, and none is found."""
    image = shared.load_photo(SAMPLE)
    noise = np.random.default_rng(0).integers(0, 256, (480, 960, 3), np.uint8)
    middle = image.copy()
    middle.paste(Image.fromarray(noise), (0, 0))
    middle.paste("gray", (0, 480, 960, 960))
    assert len(finder.find(middle).boxes) == 0
    write_video(tmp_path / "clip.mkv", [image, middle, image], rate=1, time_base=Fraction(1))
    assert run(tmp_path / "clip.mkv", "--blur", "all", "--no-labels")[0] == 0
    frame = read_video(tmp_path / "clip_emotions.mp4")[0][1]
    Image.fromarray(frame).save(tmp_path / "frame.png")
    assert max(patch_sizes(tmp_path / "frame.png", BOXES["happy"])) < 1000


def test_blur_does_again_what_was_labelled_without_it(run, photo, tmp_path):
    assert run(tmp_path)[0] == 0
    assert run(tmp_path, "--blur", "all")[0] == 0
    assert max(patch_sizes(tmp_path / "x_emotions.png", BOXES["happy"])) < 500  # the label's letters


def test_crops_show_no_blurred_face(run, finder, photo, tmp_path):
    assert run(photo, "--blur", "all", "--save-crops", tmp_path / "crops")[0] == 0
    crops = list(tmp_path.glob("crops/*/*.png"))
    assert len(crops) == 4
    for path in crops:
        with Image.open(path) as image:
            assert len(finder.find(image.convert("RGB").resize((240, 240))).boxes) == 0


def test_copy_without_labels_has_the_pixels_of_the_photo(run, photo, tmp_path):
    assert run(photo, "--no-labels")[0] == 0
    with Image.open(photo) as before, Image.open(tmp_path / "x_emotions.png") as after:
        assert before.tobytes() == after.tobytes()


def test_no_copies_writes_tables_only_and_takes_no_photo_for_finished(run, photo, tmp_path):
    write_video(tmp_path / "clip.mp4", [Image.new("RGB", (64, 64))] * 3)
    for _ in range(2):
        code, out, _ = run(tmp_path, "--no-copies", "--out-dir", tmp_path / "out")
        assert (code, len(out.splitlines())) == (0, 4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(OUTPUTS[1:])


def test_hide_heads_reaches_over_the_edge_and_leaves_the_image_alone():
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(noise)
    boxes = [(-10, -10, 30, 30), (100, 70, 140, 110), (300, 300, 320, 320)]
    hidden = np.asarray(hide_heads(image, boxes))
    assert (np.asarray(image) == noise).all()
    assert (hidden[:25, :25] != noise[:25, :25]).any(2).mean() > 0.99
    assert (hidden[75:, 105:] != noise[75:, 105:]).any(2).mean() > 0.99
    assert (hidden[:50, 60:] == noise[:50, 60:]).all()


@pytest.mark.parametrize("look_ahead", [0, HIDDEN_AROUND])
def test_face_is_hidden_before_and_after_it_is_seen_and_in_between(look_ahead):
    """Seen from 2 to 4 s but for a gap, to be hidden at 3 s: half a second around that."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))

    def followed():
        for i in range(60):
            seen = 20 <= i <= 40 and i not in {28, 29}
            face = {"track": 1, "box": (40, 30, 60, 60), "emotion": "sad" if i == 30 else "happy"}
            yield Frame(i, Fraction(i, 10), Fraction(1, 10), noise), [face] * seen

    results = list(hide_in_frames(followed(), {"sad"}, look_ahead))
    assert [frame.number for frame, _ in results] == list(range(60))
    changed = [frame.number for frame, _ in results if frame.image.tobytes() != noise.tobytes()]
    assert changed == list(range(30 - round(10 * look_ahead), 36))


def test_face_of_a_slide_show_leaves_the_slides_beside_to_be_seen():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (360, 640, 3), np.uint8))
    face = {"track": 1, "box": (300, 150, 360, 210), "emotion": "sad"}
    slides = [(Frame(i, Fraction(5 * i), Fraction(5), noise), [face] * (i == 1)) for i in range(3)]
    for frame, _ in hide_in_frames(slides, {"sad"}, 7.5, 7.5):
        changed = (np.asarray(frame.image) != np.asarray(noise)).any(2)
        assert changed[150:210, 300:360].mean() > 0.9
        assert changed.mean() < 0.2


@pytest.mark.slow
def test_frames_of_any_size_wait_in_bounded_memory():
    newest = 0

    def followed():
        nonlocal newest
        for newest in range(200):
            yield Frame(newest, Fraction(newest, 1000), Fraction(1, 1000), big), []

    big = Image.new("RGB", (4000, 4000))
    assert max(newest - frame.number for frame, _ in hide_in_frames(followed(), {"sad"}, HIDDEN_AROUND)) < 20


def test_no_frame_of_a_blurred_video_shows_a_face_that_comes_between_searches(run, finder, tmp_path):
    with Image.open(SAMPLE) as image:
        person = image.crop((0, 0, 440, 480)).resize((165, 180))
    images = []
    for i in range(50):  # it comes from the left, too slowly for a cut, and goes at once
        images.append(Image.new("RGB", (320, 180), "gray"))
        images[-1].paste(person, (min(6 * i - 165, 80), 0))
    write_video(tmp_path / "clip.mp4", [*images, *[Image.new("RGB", (320, 180), "gray")] * 10])
    assert run(tmp_path / "clip.mp4", "--blur", "all", "--no-labels", "--search-every", 9)[0] == 0
    frames, _, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert len(frames) == 60
    sources = finder.find_all(images)
    assert sum(len(faces.boxes) for faces in sources) > 20
    copies = finder.find_all([Image.fromarray(frame) for frame in frames])
    assert sum(len(faces.boxes) for faces in copies) == 0


def thumbnail_exif(thumbnail):
    """EXIF that has nothing but a JPEG thumbnail, as cameras add it."""
    entries = [(0x0103, 3, 6), (0x0201, 4, 8 + 6 + 2 + 3 * 12 + 4), (0x0202, 4, len(thumbnail))]
    first = struct.pack("<HI", 0, 14)  # no entry; then comes the thumbnail's directory
    second = struct.pack("<H", 3) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + struct.pack("<I", 0) + thumbnail


def test_copy_has_neither_the_thumbnail_nor_the_second_picture_of_its_photo(run, tmp_path):
    with Image.open(SAMPLE) as image:
        small, file = image.resize((96, 96)), io.BytesIO()
        small.save(file, "JPEG")
        image.save(tmp_path / "x.jpg", exif=thumbnail_exif(file.getvalue()))
    with (tmp_path / "x.jpg").open("ab") as photo:
        photo.write(file.getvalue())  # where phones keep a film or the picture before it was changed
    assert (tmp_path / "x.jpg").read_bytes().count(b"\xff\xd8\xff") == 3
    assert run(tmp_path / "x.jpg", "--blur", "all")[0] == 0
    copy = (tmp_path / "x_emotions.jpg").read_bytes()
    assert copy.count(b"\xff\xd8\xff") == 1
    assert copy.endswith(b"\xff\xd9")

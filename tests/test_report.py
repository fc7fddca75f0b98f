"""The page of detect_emotions.py --report: what it holds, and how it works in a real browser, offline."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import FIVE, file_size_limit, set_size
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_detect_video import SAMPLE, SIZE, write_video

import model as shared
from detect_emotions import MARK, REPORT_PAGE, Kit, class_colors, open_report

NASTY = "a <b>'\"&\n</script><script>document.title='taken'</script>.png".replace("/", "\u2215")
SAMPLE_LABELS = ["sad", "happy", "happy", "sad"]


def page_data(path):
    """Return the head of a report, its inputs, and what failed."""
    text = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1]
    head, *inputs, last = map(json.loads, text.splitlines())
    return head, inputs, last["failed"]


def picture(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def clip(tmp_path):
    """A video of a happy face for 2 s, then of nobody for 1 s."""
    with Image.open(SAMPLE) as image:
        person = image.crop((0, 0, 440, 480)).resize((165, 180))
    shot = Image.new("RGB", SIZE, "gray")
    shot.paste(person, (60, 0))
    return write_video(tmp_path / "clip #1.mp4", [shot] * 50 + [Image.new("RGB", SIZE, "gray")] * 25)


def test_report_holds_the_faces_that_json_prints(run, tmp_path):
    code, out, _ = run(SAMPLE, "--json", "--report", tmp_path / "r.html", "--out-dir", tmp_path)
    assert code == 0
    head, [photo], failed = page_data(tmp_path / "r.html")
    record = json.loads(out)
    assert [head["labels"][face["label"]]["name"] for face in photo["faces"]] == SAMPLE_LABELS
    assert head["classes"] == list(FIVE)
    assert shared.file_digest(shared.DEFAULT_MODEL).startswith(head["digest"])
    assert (photo["file"], photo["size"], failed) == (str(SAMPLE), [960, 960], [])
    for face, expected in zip(photo["faces"], record["faces"], strict=True):
        assert np.abs(np.array(face["box"]) * 0.96 - expected["box"]).max() < 1
        assert np.abs(np.array(face["probs"]) / 1000 - [*expected["probs"].values()]).max() < 0.001
        assert picture(face["crop"]).size == (96, 96)
    assert picture(photo["poster"]).size == (880, 880)
    assert MARK in (tmp_path / "r.html").read_text()


def test_report_of_a_video_has_its_tracks_over_time_and_finds_its_copy(run, clip, tmp_path):
    assert run(clip, "--report", tmp_path / "page" / "r.html", "--start", 1)[0] == 0
    head, [video], _ = page_data(tmp_path / "page" / "r.html")
    [face] = video["faces"]
    assert (video["start"], video["end"], video["offset"], video["num_faces"]) == (1, 3, 1, 1)
    assert video["video"] == "../clip%20%231_emotions.mp4"
    assert (head["labels"][face["label"]]["name"], face["number"], face["times"]) == ("happy", 1, [1, 2])
    lane = np.frombuffer(base64.b64decode(face["lane"]), np.uint8).reshape(-1, len(head["classes"]))
    assert (lane.argmax(1)[:75] == head["classes"].index("happy")).all()
    assert (np.abs(lane.astype(int).sum(1)[:75] - 255) < 4).all()
    assert not lane[90:].any()


@pytest.mark.parametrize("options", [[], ["--blur", "all"]])
def test_report_without_copies_plays_the_video_itself_unless_faces_are_hidden(run, clip, tmp_path, options):
    assert run(clip, "--report", tmp_path / "r.html", "--no-copies", *options)[0] == 0
    _, [video], _ = page_data(tmp_path / "r.html")
    assert video.get("video") == (None if options else "clip%20%231.mp4")


def test_report_shows_no_blurred_face(run, clip, finder, tmp_path):
    assert run(SAMPLE, clip, "--report", tmp_path / "r.html", "--out-dir", tmp_path, "--blur", "all")[0] == 0
    _, inputs, _ = page_data(tmp_path / "r.html")
    faces = [face for each in inputs for face in each["faces"]]
    assert len(faces) == 5
    assert all(len(finder.find(picture(each["poster"])).boxes) == 0 for each in inputs)
    assert all(len(finder.find(picture(face["crop"]).resize((240, 240))).boxes) == 0 for face in faces)


def test_names_cannot_act_on_the_page(run, tmp_path):
    shutil.copy(SAMPLE, tmp_path / NASTY)
    assert run(tmp_path / NASTY, "--report", tmp_path / "r.html", "--out-dir", tmp_path / "out")[0] == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<") == REPORT_PAGE.read_text(encoding="utf-8").count("<")
    _, [photo], _ = page_data(tmp_path / "r.html")
    assert photo["file"] == str(tmp_path / NASTY).replace("\n", "\\n")


def test_inputs_that_failed_are_listed_and_the_others_reported(run, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    report = tmp_path / "r.html"
    assert run(tmp_path / "bad.jpg", SAMPLE, "--report", report, "--out-dir", tmp_path / "out")[0] == 1
    _, [photo], [failure] = page_data(report)
    assert photo["file"] == str(SAMPLE)
    assert str(tmp_path / "bad.jpg") in failure


def test_report_is_of_all_inputs_again_each_time(run, tmp_path):
    shutil.copy(SAMPLE, tmp_path / "x.jpg")
    for _ in range(2):
        assert run(tmp_path, "--report", tmp_path / "r.html")[0] == 0
        assert [each["file"] for each in page_data(tmp_path / "r.html")[1]] == [str(tmp_path / "x.jpg")]


def test_page_that_is_no_report_is_replaced_only_by_overwrite(run, tmp_path):
    report = tmp_path / "r.html"
    report.write_text("mine")
    code, _, err = run(SAMPLE, "--report", report, "--out-dir", tmp_path)
    assert (code, report.read_text()) == (1, "mine")
    assert "--overwrite" in err
    assert run(SAMPLE, "--report", report, "--out-dir", tmp_path, "--overwrite")[0] == 0
    assert MARK in report.read_text()


def test_two_results_in_one_file_are_one_line(run, tmp_path):
    code, _, err = run(SAMPLE, "--report", tmp_path / "x", "--csv", tmp_path / "x", "--out-dir", tmp_path)
    assert code == 1
    assert f"--report {tmp_path / 'x'} would overwrite another" in err
    assert not (tmp_path / "x").exists()


def test_report_on_a_full_disk_is_one_line_and_leaves_the_earlier_one(run, tmp_path):
    options = [SAMPLE, "--report", tmp_path / "r.html", "--out-dir", tmp_path, "--no-copies"]
    assert run(*options)[0] == 0
    before = (tmp_path / "r.html").read_bytes()
    with file_size_limit(len(before) // 2):
        code, _, err = run(*options)
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"cannot write {tmp_path / 'r.html'}: File too large" in err
    assert (tmp_path / "r.html").read_bytes() == before


@pytest.fixture
def crowd(finder, classifier, tmp_path):
    """Write the report of 2,000 faces in 50 photos."""
    kit = Kit(finder, classifier, class_colors(classifier.classes))
    rng = np.random.default_rng(0)
    with (
        Image.open(SAMPLE) as image,
        open_report(tmp_path / "crowd.html", kit, shared.DEFAULT_MODEL, {}) as report,
    ):
        for number in range(50):
            faces = []
            for _ in range(40):
                x, y = rng.integers(0, 860, 2)
                probs = rng.dirichlet(np.ones(5) / 2).round(4).tolist()
                emotion = classifier.classes[int(np.argmax(probs))]
                probs = dict(zip(classifier.classes, probs, strict=True))
                faces.append({"box": (x, y, x + 90, y + 100), "emotion": emotion, "probs": probs})
            report.add_photo({"file": f"crowd/{number:03}.jpg", "faces": faces}, image)
    return tmp_path / "crowd.html"


def test_report_of_2000_faces_is_small_beside_its_pictures(crowd):
    text = re.sub(r'("crop"|"poster"): "[^"]*"', "", crowd.read_text(encoding="utf-8"))
    assert len(text) < 300_000
    assert crowd.stat().st_size < 20_000_000


def visible(browser, selector):
    return [each for each in browser.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]


@pytest.mark.slow
def test_2000_faces_are_filtered_sorted_and_printed(browser, crowd):
    _, photos, _ = page_data(crowd)
    faces = [face for photo in photos for face in photo["faces"]]
    browser.get(crowd.as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text == "2000 faces in 50 photos"
    angry = sum(face["label"] == 0 for face in faces)
    sure = sum(face["label"] == 0 and max(face["probs"]) >= 900 for face in faces)
    chip = browser.find_element(By.CSS_SELECTOR, ".chip")
    chip.send_keys(Keys.ENTER)
    assert (chip.get_attribute("aria-pressed"), chip.text) == ("true", f"angry {angry}")
    assert browser.find_element(By.ID, "count").text == f"{angry} of 2000 faces"
    slider = browser.find_element(By.ID, "sure")
    slider.send_keys(Keys.END, *[Keys.ARROW_LEFT] * 10)
    assert browser.find_element(By.ID, "count").text == f"{sure} of 2000 faces"
    assert len(browser.find_elements(By.CSS_SELECTOR, ".face:not([hidden])")) == sure
    browser.find_element(By.CSS_SELECTOR, "[data-view=table]").click()
    assert len(visible(browser, "tbody tr")) == sure
    browser.find_element(By.XPATH, "//th/button[text()='probability']").click()
    shown = [float(row.text.split(" %")[0].split()[-1]) for row in visible(browser, "tbody tr")]
    assert shown == sorted(shown, reverse=True)
    assert browser.find_element(By.CSS_SELECTOR, "th[aria-sort=descending]").text.startswith("probability")
    visible(browser, "td a")[0].click()
    assert "face" in browser.switch_to.active_element.get_attribute("class")
    slider.send_keys(Keys.HOME)  # a fifth of all: on a busy machine the driver does not wait for 2000
    pages = base64.b64decode(browser.print_page())
    assert pages.count(b"/Type /Page\n") > 5
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_page_jumps_in_the_video_and_shows_nasty_names(run, browser, clip, tmp_path):
    shutil.copy(SAMPLE, tmp_path / NASTY)
    report = tmp_path / "r.html"
    assert run(tmp_path / NASTY, clip, "--report", report)[0] == 0
    browser.get(report.as_uri())
    assert browser.title == "5 faces in 1 photo and 1 video"
    assert visible(browser, "h2")[0].text == NASTY.replace("\n", "\\n")
    assert all(each.get_attribute("alt") for each in visible(browser, "#cards img"))
    box = visible(browser, "figure:not(:has(video)) .box")[1]
    assert box.get_attribute("aria-label").startswith("face 2: happy")
    box.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.text.startswith("happy")
    time = browser.find_element(By.CSS_SELECTOR, ".timeline input")
    browser.execute_script("arguments[0].scrollIntoView()", time)
    lane = browser.find_element(By.CSS_SELECTOR, ".lane svg")
    lane.click()  # in the middle
    assert re.fullmatch(r"0:01\.5 · face 1 happy \d+ %", browser.find_element(By.CLASS_NAME, "tip").text)
    now = "return document.querySelector('video').currentTime"
    assert browser.execute_script(now) == pytest.approx(1.5, abs=0.02)
    time.send_keys(Keys.END)
    assert browser.execute_script(now) == pytest.approx(3, abs=0.1)
    assert time.get_attribute("aria-valuetext") == "0:03.0"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_page_says_that_its_video_has_gone(run, browser, clip, tmp_path):
    assert run(clip, "--report", tmp_path / "r.html")[0] == 0
    (tmp_path / "clip #1_emotions.mp4").unlink()
    browser.get((tmp_path / "r.html").as_uri())
    lane = browser.find_element(By.CSS_SELECTOR, ".lane svg")
    lane.click()
    WebDriverWait(browser, 60).until_not(lambda browser: browser.find_elements(By.TAG_NAME, "video"))
    assert "not beside this page" in browser.find_element(By.TAG_NAME, "main").text
    lane.click()
    assert browser.find_element(By.CLASS_NAME, "tip").is_displayed()


@pytest.mark.slow
def test_page_without_faces_has_a_table_to_sort(run, browser, tmp_path):
    Image.new("RGB", (99, 99)).save(tmp_path / "x.png")
    assert run(tmp_path / "x.png", "--report", tmp_path / "r.html")[0] == 0
    browser.get((tmp_path / "r.html").as_uri())
    browser.find_element(By.CSS_SELECTOR, "[data-view=table]").click()
    browser.find_element(By.XPATH, "//th/button[text()='file']").click()
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_page_rounds_a_time_to_a_full_minute(run, browser, clip, tmp_path):
    assert run(clip, "--report", tmp_path / "r.html")[0] == 0
    text, count = re.subn(r'"end": [\d.]+', '"end": 59.96', (tmp_path / "r.html").read_text(encoding="utf-8"))
    assert count == 1
    (tmp_path / "r.html").write_text(text, encoding="utf-8")
    browser.get((tmp_path / "r.html").as_uri())
    assert " · 1:00.0 · " in browser.find_element(By.CSS_SELECTOR, "h2 + p").text


@pytest.mark.slow
def test_focus_by_keyboard_is_seen_on_a_face(run, browser, tmp_path):
    assert run(SAMPLE, "--report", tmp_path / "r.html", "--out-dir", tmp_path)[0] == 0
    browser.get((tmp_path / "r.html").as_uri())
    browser.find_element(By.CLASS_NAME, "box").send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.value_of_css_property("outline-style") == "solid"


@pytest.mark.slow
def test_printed_table_is_as_wide_as_the_paper_at_most(browser, crowd):
    set_size(browser, 718, 1047)  # A4 with margins of 1 cm
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.get(crowd.as_uri())
    browser.execute_script("document.querySelector('[data-view=table]').click()")
    frame = browser.find_element(By.CLASS_NAME, "scroll")
    assert int(frame.get_property("scrollWidth")) <= int(frame.get_property("clientWidth")) <= 718


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_page_fits_any_width(browser, crowd, width):
    set_size(browser, width)
    browser.get(crowd.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width

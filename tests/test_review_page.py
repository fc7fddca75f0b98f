"""The page of finetune_emotion.py --review in a real browser, offline, and a run with what it exports."""

import csv
import re
import time

import pytest
import torch
from conftest import make_faces, set_size, write_checkpoint
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.color import Color
from selenium.webdriver.support.ui import Select
from test_detect_emotions import linear_rgb
from tiny_resnet import ARCH

import finetune_emotion
import model as shared

pytestmark = pytest.mark.slow
CLASSES = ("angry", "happy")
NASTY = 'angry/a, "b" </script><b>.png'  # what a CSV and an HTML page must quote


@pytest.fixture
def page(tmp_path, capsys):
    """A review of eight faces, all doubted, the first ones most; one was corrected before."""
    faces_dir = make_faces(tmp_path / "faces", 4, CLASSES)
    names = [f"{name}/{i:05}.png" for name in CLASSES for i in range(4)]
    records = [
        {
            "photo": name,
            "label": name.split("/")[0],
            "crop": name,
            "reason": None,
            "blur": 1.5,
            "sha256": name,
        }
        for name in names
    ]
    records[1]["photo"] = NASTY
    corrections = {"happy/00003.png": "happy", "happy/gone.png": ""}
    faces = finetune_emotion.load_labelled(
        records, faces_dir, CLASSES, corrections, val_fraction=0.25, seed=0
    )
    wrong = torch.linspace(0.9, 0.6, 8)
    own = torch.nn.functional.one_hot(faces.labels, 2)
    probs = torch.where(own == 1, 1 - wrong[:, None], wrong[:, None])
    finetune_emotion.write_review(
        tmp_path / "run" / "review.html",
        faces,
        probs,
        CLASSES,
        corrections=corrections,
        corrections_path=tmp_path / "corrections.csv",
    )
    assert capsys.readouterr().out.startswith("7 of 8 labels look wrong; ")
    return tmp_path / "run" / "review.html"


def export(browser, tmp_path):
    """Click the link; return the rows of the file that comes."""
    path = tmp_path / "downloads" / "corrections.csv"
    browser.find_element(By.ID, "export").click()
    for _ in range(100):
        if path.exists():
            break
        time.sleep(0.1)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_ticks_and_labels_are_exported_and_kept(tmp_path, browser, page):
    browser.get(page.as_uri())
    cards = browser.find_elements(By.TAG_NAME, "article")
    photos = [card.get_attribute("data-photo") for card in cards]
    assert photos == ["angry/00000.png", NASTY, "angry/00002.png", "angry/00003.png"] + [
        f"happy/0000{i}.png" for i in range(3)
    ]
    assert [share.text for share in cards[0].find_elements(By.CLASS_NAME, "share")] == ["10 %", "90 %"]
    image = cards[0].find_element(By.TAG_NAME, "img")
    assert browser.execute_script("return arguments[0].naturalWidth", image) == 48
    assert photos[1] in cards[1].text
    cards[0].find_element(By.CSS_SELECTOR, "input").click()
    Select(cards[1].find_element(By.CSS_SELECTOR, "select")).select_by_value("happy")
    Select(cards[2].find_element(By.CSS_SELECTOR, "select")).select_by_value("angry")
    verdicts = [card.find_element(By.CLASS_NAME, "verdict").text for card in cards]
    assert verdicts == ["left out", "now happy", "fine", "", "", "", ""]
    assert browser.find_element(By.ID, "count").text.startswith("3 of 7 looked at: 1 left out, 1 relabelled")
    browser.refresh()
    expected = [
        ["path", "label"],
        ["happy/00003.png", "happy"],
        ["happy/gone.png", ""],
        ["angry/00000.png", ""],
        [NASTY, "happy"],
        ["angry/00002.png", "angry"],
    ]
    assert export(browser, tmp_path) == expected
    assert finetune_emotion.read_corrections(tmp_path / "downloads" / "corrections.csv", CLASSES) == dict(
        expected[1:]
    )
    assert browser.get_log("browser") == []


def test_the_keyboard_is_enough(tmp_path, browser, page):
    browser.get(page.as_uri())
    for key in ("x", "2", Keys.ENTER, Keys.ARROW_RIGHT, "x", Keys.ARROW_LEFT, "u"):
        browser.switch_to.active_element.send_keys(key)
    rows = export(browser, tmp_path)
    assert rows[3:] == [["angry/00000.png", ""], [NASTY, "happy"], ["angry/00002.png", "angry"]]


def test_a_filter_shows_one_label(browser, page):
    browser.get(page.as_uri())
    Select(browser.find_element(By.ID, "filter")).select_by_value("happy")
    shown = [card for card in browser.find_elements(By.TAG_NAME, "article") if card.is_displayed()]
    assert [card.get_attribute("data-photo") for card in shown] == [f"happy/0000{i}.png" for i in range(3)]


def test_what_the_browser_cannot_keep_is_not_lost_without_a_question(tmp_path, browser, page):
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    asks = "return !dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    browser.get(page.as_uri())
    assert not browser.execute_script(asks)
    browser.switch_to.active_element.send_keys("x")
    assert browser.execute_script(asks)
    assert ["angry/00000.png", ""] in export(browser, tmp_path)
    assert not browser.execute_script(asks)


def test_nothing_to_review_is_said_in_the_middle(tmp_path, browser, page):
    text = re.sub(r'"faces": \[.*\]', '"faces": []', page.read_text(encoding="utf-8"))
    (tmp_path / "empty.html").write_text(text, encoding="utf-8")
    browser.get((tmp_path / "empty.html").as_uri())
    said = browser.find_element(By.CSS_SELECTOR, "main > p")
    assert (said.value_of_css_property("text-align"), said.text[:17]) == ("center", "Nothing to review")
    assert browser.find_element(By.CSS_SELECTOR, "[role=status]").text.startswith("0 of 0 looked at")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_told_from_what_is_behind_it(scheme, browser, page):
    """WCAG 2.1 asks for a contrast of 4.5."""

    def luminance(selector, name):
        color = browser.find_element(By.CSS_SELECTOR, selector).value_of_css_property(name)
        return linear_rgb(Color.from_string(color).hex) @ (0.2126, 0.7152, 0.0722)

    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    for key in ("x", "2", Keys.ENTER):
        browser.switch_to.active_element.send_keys(key)
    texts = dict.fromkeys(("#help", "#count"), "body")
    texts |= dict.fromkeys((".path", ".drop .verdict", ".change .verdict", ".fine .verdict"), "article")
    for text, behind in texts.items():
        darker, lighter = sorted((luminance(text, "color"), luminance(behind, "background-color")))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, text


@pytest.mark.parametrize("width", [320, 390, 1600])
def test_page_fits_any_width(width, browser, page):
    set_size(browser, width)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for card in browser.find_elements(By.TAG_NAME, "article"):
        assert int(card.get_property("scrollWidth")) <= int(card.get_property("clientWidth"))


def test_a_run_learns_what_was_reviewed(tmp_path, browser, sample_photo, capsys):
    """From photos whose labels are doubted by way of the page to a training run."""
    from PIL import Image

    with Image.open(sample_photo) as montage:
        people = [montage.crop((x, y, x + 480, y + 480)) for x in (0, 480) for y in (0, 480)]
    for i, person in enumerate([*people, people[0].rotate(20)]):
        folder = tmp_path / "photos" / CLASSES[i > 1]
        folder.mkdir(parents=True, exist_ok=True)
        person.save(folder / f"{i}.jpg")
    torch.manual_seed(0)
    net = shared.gray_resnet(ARCH, 2)
    net.fc.weight.data.zero_()
    net.fc.bias.data = torch.tensor([30.0, 0.0])  # to it all faces are angry
    write_checkpoint(tmp_path / "fer.pt", net, CLASSES)
    options = f"--data-dir {tmp_path}/photos --faces-dir {tmp_path}/faces --init {tmp_path}/fer.pt --no-mix"
    options += f" --out-dir {tmp_path}/run --epochs 1 --image-size 64 --val-fraction 0.5"
    options = options.split()
    finetune_emotion.main([*options, "--review"])
    out = capsys.readouterr().out
    browser.get((tmp_path / "run" / "review.html").as_uri())
    cards = browser.find_elements(By.TAG_NAME, "article")
    assert f"{len(cards)} of 5 labels look wrong" in out
    left_out, relabelled, *others = cards
    left_out.find_element(By.CSS_SELECTOR, "input").click()
    Select(relabelled.find_element(By.CSS_SELECTOR, "select")).select_by_value("angry")
    assert [card.get_attribute("data-photo").split("/")[0] for card in others] == ["happy"]
    labels = {left_out.get_attribute("data-photo"): "", relabelled.get_attribute("data-photo"): "angry"}
    assert dict(export(browser, tmp_path)[1:]) == labels
    finetune_emotion.main([*options, "--corrections", str(tmp_path / "downloads" / "corrections.csv")])
    out = capsys.readouterr().out
    assert "2 corrections in" in out
    assert (
        sum(
            int(line.split()[2])
            for line in out.splitlines()
            if line.startswith(("photos train: ", "photos val: "))
        )
        == 4
    )

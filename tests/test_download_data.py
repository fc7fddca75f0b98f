import pytest
from PIL import Image

import download_data


def test_remove_unreadable_throws_out_only_what_is_no_picture(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    assert download_data.remove_unreadable(sorted(tmp_path.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_without_a_browser_or_the_internet_it_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # neither Chrome nor chromedriver
    monkeypatch.setenv("SE_OFFLINE", "true")  # Selenium's switch against fetching one
    with pytest.raises(SystemExit) as stop:
        download_data.main(["--emotions", "happy", "--limit", "1", "--out-dir", str(tmp_path / "google")])
    assert "the search for 'happy face' failed" in stop.value.code
    assert "it needs Chrome or Chromium and the internet" in stop.value.code
    assert "\n" not in stop.value.code

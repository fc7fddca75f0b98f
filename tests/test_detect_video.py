import contextlib
import csv
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import FIVE, file_size_limit
from PIL import Image, ImageDraw

import detect_emotions
import model as shared
from detect_emotions import (
    CUT,
    NUM_BINS,
    NUM_PICTURED,
    Frame,
    Kit,
    Summary,
    Track,
    Tracker,
    Video,
    box_ious,
    clock_time,
    draw_faces,
    find_sources,
    follow_faces,
    in_background,
    is_cut,
    leave_out_finished,
    match_boxes,
    plan_outputs,
    save_image,
)

SAMPLE = shared.DEFAULT_MODEL.with_name("sample.jpg")  # 960x960, four portraits
SIZE, RATE = (320, 180), 25
OUTPUTS = ("clip_emotions.mp4", "clip_emotions.csv", "clip_emotions_tracks.csv", "clip_emotions_timeline.png")


@pytest.fixture(scope="module")
def astronaut():
    """A portrait of one happy face."""
    with Image.open(SAMPLE) as image:
        return image.crop((0, 0, 440, 480)).resize((165, 180))


@pytest.fixture(scope="module")
def moving(astronaut):
    """Give frames in which the portrait moves to the right."""

    def moving(num_frames, size=SIZE, step=2):
        for i in range(num_frames):
            image = Image.new("RGB", size, "gray")
            image.paste(astronaut, (i * step, 0))
            yield image

    return moving


def write_video(
    path,
    images,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=RATE,
    time_base=Fraction(1, RATE),
    times=None,
    sound=None,
    seconds=None,
    aspect=None,
    container=None,
    options=None,
):
    """Write images as a video, by default one each tick of `time_base`, and a tone, by default as long."""
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, time_base
        tone = output.add_stream(sound, rate=44100, layout="mono") if sound else None
        num_frames = 0
        for i, image in enumerate(images):
            if not i:
                stream.width, stream.height = image.size
                stream.codec_context.sample_aspect_ratio = aspect or 0
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = times[i] if times else i, time_base
            output.mux(stream.encode(frame))
            num_frames += 1
        output.mux(stream.encode(None))
        if tone:
            wave = np.sin(np.arange(round(44100 * (seconds or num_frames / RATE))) / 10).astype(np.float32)[
                None
            ]
            frame = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, 0
            fifo = av.AudioFifo()
            fifo.write(frame)
            resampler = av.AudioResampler(tone.format.name, "mono", 44100)
            while part := fifo.read(tone.frame_size or 1024, partial=True):
                for converted in resampler.resample(part):
                    output.mux(tone.encode(converted))
            output.mux(tone.encode(None))
    return path


def read_video(path):
    """Return a video's images as arrays, its times in s, and its streams' codec names."""
    with av.open(str(path)) as container:
        codecs = [stream.codec_context.codec.canonical_name for stream in container.streams]
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames], codecs


def read_sound(path):
    """Return the bytes of each packet of a video's sound, and the times in s at which they begin."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [bytes(packet) for packet in packets], [
            float(packet.pts * packet.time_base) for packet in packets
        ]


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- what it writes of a video ---


def test_video_gets_a_labelled_copy_tables_and_a_plot(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", moving(25), sound="aac")
    code, out, err = run(clip)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", *OUTPUTS}
    name, counts, emotion, share = out.rstrip().split("\t")
    assert (name, counts, emotion) == (str(clip), "1 track, 1.0 s", "happy")
    assert float(share) > 0.5

    before, times, _ = read_video(clip)
    after, times_after, codecs = read_video(tmp_path / "clip_emotions.mp4")
    assert codecs == ["h264", "aac"]
    assert times_after == pytest.approx(times)
    rows = read_table(tmp_path / "clip_emotions.csv")
    assert [(int(row["frame"]), row["track"]) for row in rows] == [(i, "1") for i in range(25)]
    np.testing.assert_allclose([float(row["time"]) for row in rows], times, atol=1e-4)
    for i, row in enumerate(rows):
        x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
        marked = np.array([(58 + 2 * i, 56, 124 + 2 * i, 125)])  # by hand; 2 pixels further each frame
        assert box_ious(np.array([(x0, y0, x1, y1)]), marked) > 0.6  # they differ in the forehead's share
        changed = np.abs(after[i].astype(int) - before[i]).max(2) > 60
        assert changed[round(y0) : round(y1), round(x0) - 4 : round(x0) + 5].any(1).mean() > 0.8  # the box
        assert changed[:, round(x1) + 60 :].sum() == 0
        probs = [float(row[f"prob_{name}"]) for name in FIVE]
        assert sum(probs) == pytest.approx(1, abs=0.001)
        assert float(row["prob"]) == probs[FIVE.index(row["emotion"])]

    (track,) = read_table(tmp_path / "clip_emotions_tracks.csv")
    assert {key: track[key] for key in ("track", "first", "last", "seconds", "emotion")} == {
        "track": "1",
        "first": "0.0",
        "last": "1.0",
        "seconds": "1.0",
        "emotion": "happy",
    }
    assert sum(float(track[f"share_{name}"]) for name in FIVE) == pytest.approx(1, abs=0.001)
    with Image.open(tmp_path / "clip_emotions_timeline.png") as plot:
        colors = {color for count, color in plot.convert("RGB").getcolors(1 << 24) if count > 500}
    assert (240, 228, 66) in colors  # happy


def test_video_plays_from_its_beginning(run, moving, tmp_path):
    run(write_video(tmp_path / "clip.mp4", moving(5)))
    data = (tmp_path / "clip_emotions.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser need not load all first
    assert b"avc1" in data


def test_sound_is_copied_packet_by_packet_where_it_fits(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", moving(25), sound="aac")
    run(clip)
    packets, times = read_sound(clip)
    copied, copied_times = read_sound(tmp_path / "clip_emotions.mp4")
    assert len(copied) >= len(packets) - 2  # one before the first frame, one after the last
    first = packets.index(copied[0])
    assert packets[first : first + len(copied)] == copied
    assert copied_times == pytest.approx(times[first : first + len(copied)], abs=0.001)


def test_sound_that_does_not_fit_becomes_aac(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.mov", moving(25), sound="pcm_s16le")
    assert run(clip)[0] == 0
    _, _, codecs = read_video(tmp_path / "clip_emotions.mp4")
    assert codecs == ["h264", "aac"]
    with av.open(str(tmp_path / "clip_emotions.mp4")) as container:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(wave) / 44100 == pytest.approx(1, abs=0.05)
    crossings = np.flatnonzero(np.diff(np.sign(wave[5000:-5000])))
    assert np.diff(crossings).mean() == pytest.approx(10 * math.pi, rel=0.01)  # the tone of `write_video`


def test_variable_frame_rate_is_kept(run, moving, tmp_path):
    times = [0, 10, 15, 60, 200, 203, 400]
    clip = write_video(tmp_path / "clip.mkv", moving(7, step=0), time_base=Fraction(1, 1000), times=times)
    assert run(clip)[0] == 0
    _, after, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert after == pytest.approx([value / 1000 for value in times])
    rows = read_table(tmp_path / "clip_emotions.csv")
    assert [float(row["time"]) for row in rows] == [value / 1000 for value in times]


TURNS = {  # by the display matrix: where it takes the x axis and the y axis
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("matrix", TURNS)
def test_turned_or_mirrored_video_becomes_upright_with_its_pixel_aspect(run, moving, tmp_path, matrix):
    stored = list(moving(3))
    clip = write_video(tmp_path / "clip.mp4", stored, aspect=Fraction(4, 3))
    data = bytearray(clip.read_bytes())
    start = data.index(b"tkhd") + 44  # in ISO/IEC 14496-12; rows of three numbers, the last for a shift
    for i, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[start + i : start + i + 4] = struct.pack(">i", value << 16)
    clip.write_bytes(data)
    assert run(clip)[0] == 0
    after, _, _ = read_video(tmp_path / "clip_emotions.mp4")
    upright = stored[0] if TURNS[matrix] is None else stored[0].transpose(TURNS[matrix])
    assert np.median(np.abs(after[0].astype(int) - np.asarray(upright))) < 4
    with av.open(str(tmp_path / "clip_emotions.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0
        is_on_its_side = matrix[0] == 0
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3) ** (
            -1 if is_on_its_side else 1
        )


def test_odd_sides_grow_by_one_pixel(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.avi", moving(3, (321, 181)), codec="ffv1", pix_fmt="bgr0")
    assert run(clip)[0] == 0
    after, _, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert after[0].shape == (182, 322, 3)
    original = np.asarray(next(moving(1, (321, 181)))).astype(int)
    assert np.median(np.abs(after[0][:181, :321] - original)) < 4
    assert np.abs(after[0][:, 321].astype(int) - after[0][:, 320]).max() < 12


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv444p10le"])
def test_colors_are_kept(run, tmp_path, pix_fmt):
    bars = Image.new("RGB", SIZE)
    for i, color in enumerate(("white", "red", "lime", "blue", "gray", "black", "orange", "purple")):
        ImageDraw.Draw(bars).rectangle((40 * i, 0, 40 * i + 39, 180), color)
    run(write_video(tmp_path / "clip.mp4", [bars] * 2, pix_fmt=pix_fmt))
    before, _, _ = read_video(tmp_path / "clip.mp4")
    after, _, _ = read_video(tmp_path / "clip_emotions.mp4")
    centers = slice(20, None, 40)
    np.testing.assert_allclose(after[0][90, centers].astype(int), before[0][90, centers], atol=8)


def test_start_and_end_cut_picture_and_sound(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", moving(50), sound="aac")
    assert run(clip, "--start", "0:00:00.5", "--end", 1.5)[0] == 0
    after, times, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert (len(after), times[0], times[-1]) == (25, 0, pytest.approx(0.96))
    _, sound = read_sound(tmp_path / "clip_emotions.mp4")
    assert (sound[0], sound[-1]) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    rows = read_table(tmp_path / "clip_emotions.csv")
    assert [float(rows[i]["time"]) for i in (0, -1)] == [0.52, 1.48]  # the frame at 0.5 began at 0.48
    assert [int(row["frame"]) for row in rows] == list(range(25))
    assert run(clip, "--start", 100)[0] == 1


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("1.25", 1.25), ("2:03", 123), ("1:00:01.5", 3601.5)])
def test_clock_time_reads_seconds_minutes_and_hours(text, value):
    assert clock_time(text) == value


def test_no_video_writes_only_the_data(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", moving(3))
    assert run(clip, "--no-video", "--out-dir", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(OUTPUTS[1:])


def test_json_has_an_object_for_each_frame_in_the_schema_of_photos(run, moving, tmp_path):
    images = [*moving(3), *[Image.new("RGB", SIZE)] * 2]
    images[0].save(tmp_path / "photo.png")
    clip = write_video(tmp_path / "clip.mp4", images)
    code, out, err = run("--json", tmp_path / "photo.png", clip)
    photo, *frames = map(json.loads, out.splitlines())
    assert (code, err, len(frames)) == (0, "", 5)
    for i, record in enumerate(frames):
        assert set(record) == set(photo) | {"frame", "time"}
        assert (record["file"], record["frame"], record["time"]) == (str(clip), i, i / RATE)
        assert (record["width"], record["height"]) == SIZE
        assert len(record["faces"]) == (i < 3)
        for face in record["faces"]:
            assert set(face) == set(photo["faces"][0]) | {"track"}


def test_video_without_a_face_is_a_result(run, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", [Image.new("RGB", SIZE)] * 5)
    assert run(clip) == (0, "", f"{clip}: no face found\n")
    assert read_table(tmp_path / "clip_emotions_tracks.csv") == []
    assert len(read_video(tmp_path / "clip_emotions.mp4")[0]) == 5


# --- sound in step with the picture ---


def write_beeps(
    path, starts=(0, 0), *, codec="libx264", sound="aac", rate=48000, layout="mono", keyframes=RATE, length=3
):
    """Write picture and sound, `length` s from their `starts` on; each full second a flash and a beep."""
    with av.open(str(path), "w") as output:
        options = {"g": str(keyframes), "sc_threshold": "0"}  # no others where the picture changes
        picture = output.add_stream(codec, rate=RATE, options=options)
        picture.width, picture.height, picture.pix_fmt = 160, 120, "yuv420p"
        tone = output.add_stream(sound, rate=rate, layout=layout)
        first, num_samples = round(starts[0] * RATE), 1024
        for i in range(first, first + length * RATE):
            color = "white" if i % RATE < 3 else "black"
            frame = av.VideoFrame.from_image(Image.new("RGB", (160, 120), color))
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        begin = round(starts[1] * rate)
        for start in range(begin, begin + length * rate, num_samples):
            seconds = np.arange(start, start + num_samples) / rate
            is_loud = (seconds % 1 < 0.1) & (seconds < starts[1] + length)
            wave = (np.sin(2 * np.pi * 1000 * seconds) * is_loud).astype(np.float32)
            channels = 1 if layout == "mono" else 2
            frame = av.AudioFrame.from_ndarray(np.tile(wave, (channels, 1)), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            output.mux(tone.encode(frame))
        output.mux(tone.encode(None))
    return path


@pytest.fixture
def label(run):
    """Label a video without a face; return the exit code and what there is on stderr beside that."""

    def label(path, *options):
        code, out, err = run(path, *options)
        assert out == ""
        return code, err.removeprefix(f"{path}: no face found\n")

    return label


def flashes_and_beeps(path):
    """Return the times at which a video's flashes and beeps begin, s, from its time stamps and samples."""
    with av.open(str(path)) as container:
        lights = [
            (frame.time, frame.to_ndarray(format="gray").mean() > 128) for frame in container.decode(video=0)
        ]
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    loud = [
        frame.time + np.flatnonzero(np.abs(samples) > 0.3) / frame.sample_rate
        for frame in frames
        for samples in [
            frame.to_ndarray().ravel()[:: 1 if frame.format.is_planar else frame.layout.nb_channels]
        ]
    ]
    return tuple(
        [float(after) for before, after in itertools.pairwise([-1, *times]) if after - before > 0.5]
        for times in ([time for time, is_light in lights if is_light], np.concatenate(loud))
    )


CONTAINERS = {
    ".ts": ("libx264", "aac"),
    ".mpg": ("mpeg2video", "mp2"),
    ".mov": ("libx264", "pcm_s16le"),
    ".mkv": ("libx264", "libopus"),
}


@pytest.mark.parametrize("starts", [(1, 1), (1.52, 0), (0, 1.52)])
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_sound_keeps_its_distance_to_the_picture(label, tmp_path, suffix, starts):
    codec, sound = CONTAINERS[suffix]
    clip = write_beeps(tmp_path / f"clip{suffix}", starts, codec=codec, sound=sound)
    assert label(clip) == (0, "")
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    first, end = starts[0], starts[0] + 3
    seconds = range(math.ceil(first), math.ceil(end))
    assert flashes == pytest.approx([second - first for second in seconds], abs=0.01)
    audible = [second - first for second in seconds if starts[1] <= second < starts[1] + 3]
    assert [beep for beep in beeps if beep < 2.97] == pytest.approx(audible, abs=0.03)


def test_cut_sound_keeps_its_distance_to_the_picture(label, tmp_path):
    for codec, clip in (("aac", tmp_path / "clip.ts"), ("ac3", tmp_path / "clip.vob")):
        write_beeps(clip, (1, 1), codec="mpeg2video", sound=codec)
        assert label(clip, "--start", 0.5, "--end", 2.5) == (0, "")
        flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
        assert flashes == pytest.approx([0.48, 1.48], abs=0.03)
        assert beeps == pytest.approx(flashes, abs=0.03)


@pytest.mark.parametrize("sound", ["pcm_s16le", "libopus", "ac3"])
def test_a_hole_in_a_file_is_named_and_the_sound_after_it_in_step(label, tmp_path, sound):
    clip = write_beeps(tmp_path / "clip.mkv", sound=sound, length=10)
    data = clip.read_bytes()
    start, end = (int(len(data) * share) for share in (0.4, 0.6))
    clip.write_bytes(data[:start] + bytes(end - start) + data[end:])
    code, err = label(clip)
    assert code == 1
    assert re.fullmatch(rf"error: {clip}: .*[23].\d s in between are missing; the rest is labelled\n", err)
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    for times in (flashes, beeps):  # of the picture, the first after the hole may be lost
        assert [time for time in times if time > 7.5] == pytest.approx([8, 9], abs=0.03)
        assert times[:4] == pytest.approx([0, 1, 2, 3], abs=0.03)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_pauses_of_the_picture_are_no_hole_and_keep_their_length(run, moving, tmp_path, suffix):
    ticks = [*range(5), *range(130, 135), 300, *range(400, 405)]
    clip = write_video(tmp_path / f"clip{suffix}", moving(len(ticks), step=0), times=ticks)
    code, _, err = run(clip)
    assert (code, err) == (0, "")
    _, times, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert times == pytest.approx([tick / RATE for tick in ticks], abs=0.001)


@pytest.mark.parametrize(
    ("suffix", "sound", "rate"),
    [
        (".avi", "pcm_s16le", 11_024),
        (".mkv", "pcm_s16le", 11_127),
        (".mkv", "flac", 192_000),
        (".mkv", "pcm_s16le", 192_000),
        (".mkv", "mp3", 8_000),
    ],
)
def test_sound_of_any_rate_is_kept(label, tmp_path, suffix, sound, rate):
    clip = write_beeps(tmp_path / f"clip{suffix}", codec="mpeg4", sound=sound, rate=rate)
    assert label(clip) == (0, "")
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    assert flashes == pytest.approx([0, 1, 2], abs=0.01)
    assert beeps == pytest.approx(flashes, abs=0.03)


def test_sound_whose_format_changes_is_kept(label, tmp_path):
    parts = [
        write_beeps(tmp_path / "a.ts", (0, 0), codec="mpeg2video", sound="mp2", rate=44100),
        write_beeps(tmp_path / "b.ts", (3.4, 3.4), codec="mpeg2video", sound="mp2", layout="stereo"),
    ]
    clip = tmp_path / "clip.ts"
    clip.write_bytes(b"".join(part.read_bytes() for part in parts))
    label(clip)
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    assert flashes == pytest.approx([0, 1, 2, 4, 5, 6], abs=0.05)  # muxers shift each part by up to a frame
    assert beeps == pytest.approx(flashes, abs=0.03)


def test_sound_that_cannot_be_decoded_is_left_out_with_a_line(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.avi", codec="mpeg4", sound="pcm_s16le")
    data = bytearray(clip.read_bytes())
    start = data.index(b"strf", data.index(b"auds")) + 8
    data[start : start + 2] = b"\x99\x99"  # no codec has this number
    clip.write_bytes(data)
    message = "sound was left out: none of it can be decoded; the rest is labelled"
    assert label(clip) == (1, f"error: {clip}: {message}\n")
    assert read_video(tmp_path / "clip_emotions.mp4")[2] == ["h264"]


def test_damaged_sound_does_not_stop_the_picture(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts")
    data, rng = np.frombuffer(clip.read_bytes(), np.uint8).copy(), np.random.default_rng(0)
    places = rng.integers(188 * 10, len(data), 200)
    places = places[places % 188 >= 4]  # the packets' headers stay
    data[places] = rng.integers(0, 256, len(places))
    clip.write_bytes(data.tobytes())
    code, err = label(clip)
    assert (code, len(err.splitlines())) == (1, 1)
    images, _, codecs = read_video(tmp_path / "clip_emotions.mp4")
    assert len(images) > 60
    assert codecs == ["h264", "aac"]


# --- what goes wrong ---


def test_late_first_keyframe_is_one_line(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts")
    data = clip.read_bytes()
    clip.write_bytes(data[188 * (len(data) // 188 // 5) :])
    code, err = label(clip)
    assert code == 1
    assert re.fullmatch(
        rf"error: {clip}: what comes before 0\.\d s cannot be read; the rest is labelled\n", err
    )
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    assert flashes == pytest.approx([0, 1], abs=0.01)
    assert beeps == pytest.approx(flashes, abs=0.03)


def test_start_between_keyframes_loses_nothing(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts", keyframes=250)
    assert label(clip, "--start", 0.5) == (0, "")
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    assert flashes == pytest.approx([0.48, 1.48], abs=0.01)
    assert beeps == pytest.approx(flashes, abs=0.03)


def test_gap_is_one_line_and_leaves_all_in_step(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts")
    data, packets = clip.read_bytes(), clip.stat().st_size // 188
    clip.write_bytes(data[: 188 * (packets * 4 // 10)] + data[188 * (packets * 6 // 10) :])
    code, err = label(clip)
    assert (code, len(err.splitlines())) == (1, 1)
    assert re.search(r"0\.\d s in between are missing; the rest is labelled", err)
    before, after = flashes_and_beeps(clip), flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    for times, times_after in zip(before, after, strict=True):
        assert times_after == pytest.approx([time - before[0][0] for time in times], abs=0.01)


def test_damage_counts_only_where_it_is_before_the_end_that_was_asked_for(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts")
    data, packets = clip.read_bytes(), clip.stat().st_size // 188
    clip.write_bytes(data[: 188 * (packets * 4 // 10)] + data[188 * (packets * 6 // 10) :])
    for end, is_damaged in ((0.5, False), (2.5, True)):
        code, err = label(clip, "--end", end)
        assert (code, "in between are missing; the rest is labelled" in err) == (is_damaged, is_damaged)


def test_videos_joined_end_to_end_go_on(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts", codec="mpeg2video", sound="mp2")
    clip.write_bytes(clip.read_bytes() * 2)
    label(clip)
    flashes, beeps = flashes_and_beeps(tmp_path / "clip_emotions.mp4")
    assert flashes == pytest.approx(range(6), abs=0.05)
    assert beeps == pytest.approx(flashes, abs=0.03)


def test_damaged_time_is_that_of_one_picture_only(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.ts", codec="mpeg2video", sound="mp2")
    data = bytearray(clip.read_bytes())
    start = data.index(b"\0\0\1\xe0", len(data) // 2)  # of a picture, see ISO/IEC 13818-1
    data[start + 10] ^= 4  # of its time: 1.5 hours
    clip.write_bytes(data)
    assert label(clip)[0] == 0
    _, times, _ = read_video(tmp_path / "clip_emotions.mp4")
    assert times == pytest.approx([i / RATE for i in range(75)], abs=0.001)


@pytest.mark.parametrize(
    "tag",
    ["3.0 seconds", "-0:00:03.000000000", "00:10:03.000000000", "00:00:01.000000000", "99999999999:00:00"],
)
def test_duration_tag_is_only_a_hint(label, tmp_path, tag):
    clip = write_beeps(tmp_path / "clip.mkv", (0.52, 0))
    data = clip.read_bytes()
    assert data.count(b"00:00:03.520000000") == 1
    clip.write_bytes(data.replace(b"00:00:03.520000000", tag.encode().ljust(18, b"\0")))
    assert label(clip) == (0, "")


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_lost_end_is_one_line(label, tmp_path, suffix):
    clip = write_beeps(tmp_path / f"clip{suffix}", codec="mpeg4", sound="pcm_s16le")
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    code, err = label(clip)
    assert (code, len(err.splitlines())) == (1, 1)
    assert " of 3.0 s, or its header is wrong; the rest is labelled" in err


@pytest.mark.parametrize(("size", "codec"), [((100_000, 2), "ffv1"), ((6400, 6400), "mjpeg")])
def test_frames_that_are_too_large_are_one_line(label, tmp_path, size, codec):
    pix_fmt = "bgr0" if codec == "ffv1" else "yuvj420p"
    clip = write_video(tmp_path / "clip.mkv", [Image.new("RGB", size)], codec=codec, pix_fmt=pix_fmt)
    message = f"has frames of {size[0]}x{size[1]} pixels, which is too large; scale it down first"
    assert label(clip) == (1, f"error: {clip} {message}\n")


@pytest.mark.slow
def test_pictures_of_100_000_frames_take_little_memory(start, tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    count, side = 100_000, 64
    gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    gif += (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0") * count + b";"
    png = bytearray(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)))
    png += chunk(b"acTL", struct.pack(">II", count, 0))
    pixels = zlib.compress(bytes((side + 1) * side))
    for i in range(count):
        png += chunk(b"fcTL", struct.pack(">IIIIIHHBB", max(0, 2 * i - 1), side, side, 0, 0, 1, 25, 0, 0))
        png += chunk(b"fdAT", struct.pack(">I", 2 * i) + pixels) if i else chunk(b"IDAT", pixels)
    (tmp_path / "a.gif").write_bytes(gif)
    (tmp_path / "b.png").write_bytes(png + chunk(b"IEND", b""))
    # Not ru_maxrss: a process inherits that of the one that starts it.
    measured = "import re, detect_emotions as d; d.main({}); "
    measured += r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    process = start("-c", measured.replace("{}", repr([str(tmp_path), "--json"])))
    *records, peak = process.communicate()[0].splitlines()
    assert len(records) == 2
    assert int(peak) < 1_500_000  # KiB on Linux


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {} RTP/AVP 96\n",
    "DASH": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{}</BaseURL></MPD>",
    "redirection": "[Reference]\nRef1={}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_file_that_points_elsewhere_is_not_followed(label, tmp_path, kind):
    other = write_beeps(tmp_path / "other.ts")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        for target in (other, f"http://127.0.0.1:{server.getsockname()[1]}/clip.ts"):
            clip = tmp_path / "clip.mp4"
            clip.write_text(PLAYLISTS[kind].format(target))
            code, err = label(clip)
            assert (code, len(err.splitlines())) == (1, 1)
            assert err.startswith(f"error: {clip} is not a video that can be read: ")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not list(tmp_path.glob("*_emotions*"))


@pytest.mark.parametrize(
    "name", ["concat:other.ts|other.ts", "pipe:0", "file:other.ts", "http:other.ts", "a:b.mp4"]
)
def test_name_with_a_colon_is_that_of_a_file(label, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_beeps(tmp_path / "other.ts")
    code, err = label(name)
    assert code == 1
    assert "No such file" in err
    Path("other.ts").rename(name)
    assert label(name) == (0, "")


def test_picture_that_cannot_be_decoded_is_one_line(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.avi", codec="mpeg4", sound="pcm_s16le")
    clip.write_bytes(clip.read_bytes().replace(b"FMP4", b"ZZZ9"))
    message = "has a picture of a kind that FFmpeg cannot decode; convert it"
    assert label(clip) == (1, f"error: {clip} {message}\n")


def test_output_that_cannot_be_written_is_one_cause_and_one_path(label, tmp_path):
    clip = write_beeps(tmp_path / "clip.mp4")
    (tmp_path / OUTPUTS[3]).mkdir()
    code, err = label(clip)
    assert (code, err.rstrip()) == (1, f"error: cannot write {tmp_path / OUTPUTS[3]}: Is a directory")
    (tmp_path / OUTPUTS[3]).rmdir()
    assert label(clip) == (0, "")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for limit in (0, 1000):  # the video's header fails, its frames
        with file_size_limit(limit):
            assert label(clip) == (1, f"error: cannot write the outputs of {clip}: File too large\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_pictures_leave_the_memory_once_they_are_read(tmp_path):
    write_video(tmp_path / "clip.mp4", [Image.new("RGB", (64, 48))] * 30)
    gc.collect()
    gc.disable()
    try:
        with contextlib.closing(detect_emotions.Video(tmp_path / "clip.mp4", 0, math.inf)) as video:
            assert len(list(video.frames())) == 30
        assert sum(type(each) is av.VideoFrame for each in gc.get_objects()) < 5
    finally:
        gc.enable()


def test_truncated_video_is_labelled_as_far_as_it_goes(run, real_data, tmp_path):
    clip = tmp_path / "clip.mp4"
    whole = real_data / "video" / "single_face.mp4"
    with av.open(str(whole)) as source, av.open(str(clip), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    code, out, err = run(clip)
    assert code == 1
    assert out.startswith(f"{clip}\t1 track, ")
    assert err.startswith(f"error: {clip}: ")
    assert "of 2.4 s" in err
    assert len(err.splitlines()) == 1
    assert 10 < len(read_video(tmp_path / "clip_emotions.mp4")[0]) < 62


def test_video_that_was_read_in_part_is_not_finished(run, tmp_path):
    clip = write_beeps(tmp_path / "clip.avi", codec="mpeg4", sound="pcm_s16le")
    whole, out, table = (
        clip.read_bytes(),
        ("--out-dir", tmp_path / "out"),
        ("--csv", tmp_path / "out" / "t.csv"),
    )
    clip.write_bytes(whole[: len(whole) // 2])
    for options in (table, table, ()):
        code, _, err = run(tmp_path, *out, *options)
        assert (code, " of 3.0 s, or its header is wrong; the rest is labelled" in err) == (1, True)
    before = clip.stat()
    clip.write_bytes(whole)
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))  # as after an error in reading
    for is_finished in (False, True):
        code, _, err = run(tmp_path, *out)
        assert (code, "finished before" in err) == (0, is_finished)


def test_bad_videos_do_not_lose_the_good_one(run, moving, tmp_path):
    good = write_video(tmp_path / "clip.mp4", moving(3))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:1500])  # without its index
    (tmp_path / "empty.mkv").touch()
    code, out, err = run(tmp_path)
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(good)]
    *errors, left_out = err.splitlines()
    assert (len(errors), left_out) == (3, "left out: failed, see above 3")
    for name in ("text.mp4", "cut.mp4", "empty.mkv"):
        assert f"error: {tmp_path / name} is not a video that can be read: " in err
    bad = {"text.mp4", "cut.mp4", "empty.mkv"}
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", *OUTPUTS} | bad


def test_sound_without_picture_is_one_line(run, tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    code, out, err = run(path)
    assert (code, out) == (1, "")
    assert err == f"error: {path} has no picture, only sound; name a video\n"


@pytest.mark.slow
def test_interrupt_leaves_no_half_output(start, moving, tmp_path):
    write_video(tmp_path / "a.mp4", moving(3))
    write_video(tmp_path / "b.mp4", moving(400, step=0))
    process = start(detect_emotions.__file__, tmp_path, "--json")
    for _ in range(20):  # well into the second
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "interrupted\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.mp4", "b.mp4", *(name.replace("clip", "a") for name in OUTPUTS)}


# --- folders and patterns ---


@pytest.fixture
def album(astronaut, moving, tmp_path):
    """A folder with a photo, a video, a text, and another photo in a subfolder."""
    folder = tmp_path / "album"
    (folder / "deeper").mkdir(parents=True)
    astronaut.save(folder / "photo.png")
    astronaut.save(folder / "deeper" / "photo.png")
    (folder / "notes.txt").write_text("not for this")
    write_video(folder / "clip.mp4", moving(3))
    return folder


def test_folder_is_labelled_once(run, album):
    def printed(*args):
        code, out, err = run(album, *args)
        assert code == 0
        return [Path(line.split("\t")[0]).name for line in out.splitlines()], err

    others = "left out: subfolder (see --recursive) 1, unknown suffix 1"
    assert printed() == (["clip.mp4", "photo.png"], f"{others}\n")
    made = {path: path.stat().st_mtime_ns for path in album.iterdir()}
    assert len(made) == 4 + len(OUTPUTS) + 1
    others = "left out: subfolder (see --recursive) 1, made by this program 5, unknown suffix 1"
    assert printed() == ([], f"{others}, finished before (--overwrite does it again) 2\n")
    assert {path: path.stat().st_mtime_ns for path in album.iterdir()} == made
    (album / "clip_emotions_tracks.csv").unlink()
    assert printed()[0] == ["clip.mp4"]
    os.utime(album / "photo.png", (time.time() + 9, time.time() + 9))  # changed since
    assert printed()[0] == ["photo.png"]
    assert printed("--overwrite")[0] == ["clip.mp4", "photo.png"]


def test_recursive_looks_into_subfolders_and_returns_them(run, album, tmp_path):
    assert run(album, "--recursive", "--out-dir", tmp_path / "out")[0] == 0
    out = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert out == {"photo_emotions.png", "deeper/photo_emotions.png", *OUTPUTS}


VIDEO_KINDS = {
    ".vob": ("vob", "mpeg2video"),
    ".mxf": ("mxf", "mpeg2video"),
    ".f4v": ("f4v", "libx264"),
    ".3g2": ("3g2", "libx264"),
    ".m2v": ("mpeg2video", "mpeg2video"),
    ".qt": ("mov", "libx264"),
    ".jpg": ("mp4", "libx264"),
    ".png": ("avi", "mpeg4"),
}


@pytest.mark.parametrize("suffix", VIDEO_KINDS)
def test_video_is_one_whatever_its_suffix(run, moving, tmp_path, suffix):
    container, codec = VIDEO_KINDS[suffix]
    clip = write_video(tmp_path / f"clip{suffix}", moving(5), codec=codec, container=container)
    for source in (tmp_path, clip):
        code, out, err = run(source, "--overwrite")
        assert (code, err) == (0, "")
        assert out.startswith(f"{clip}\t1 track, 0.2 s\t")
    assert {path.name for path in tmp_path.iterdir()} == {clip.name, *OUTPUTS}


def test_photo_is_one_whatever_its_suffix(run, astronaut, tmp_path):
    astronaut.save(tmp_path / "photo.mp4", "PNG")
    assert run(tmp_path)[::2] == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"photo.mp4", "photo_emotions.png"}


def test_patterns_find_files_where_the_shell_does_not(album):
    def found(pattern):
        return [
            str(source.path.relative_to(album))
            for source in find_sources([str(album / pattern)], False, None, Counter())
        ]

    save_image(Image.open(album / "photo.png"), album / "photo_emotions.png")
    save_image(Image.open(album / "photo.png"), album / "clip_emotions_timeline.png")
    assert found("*.png") == ["photo.png"]
    assert found("**/p*.png") == ["deeper/photo.png", "photo.png"]
    assert found("*") == ["clip.mp4", "photo.png"]
    with pytest.raises(ValueError, match="has no photos or videos"):
        found("*.jpg")


def test_a_named_file_is_done_again(album):
    save_image(Image.open(album / "photo.png"), album / "photo_emotions.png")
    for inputs, left in (([album / "photo.png"], 1), ([album], 1), ([album, album / "photo.png"], 2)):
        sources = find_sources(list(map(str, inputs)), False, None, Counter())
        plan = plan_outputs(sources, True, {}, Counter())
        assert len(leave_out_finished(plan, [], Counter())) == left


def test_json_of_a_folder_tells_of_all(run, album):
    assert run(album)[0] == 0
    assert len(run(album, "--json")[1].splitlines()) == 1 + 3


# --- tracks ---


def box_at(x, y, side=40):
    return np.array([x, y, x + side, y + side], np.float32)


class FixedFinder:
    """Stands for the cascade where a test says what it sees."""

    min_prob = 0.9

    def __init__(self):
        self.refined = []

    def refine(self, image, boxes):
        self.refined.append(len(boxes))
        gone = np.array([box[0] > 200 for box in boxes], bool)
        return faces_at(*boxes, probs=np.where(gone, 0.1, 0.99))


def faces_at(*boxes, probs=None):
    probs = np.full(len(boxes), 0.99) if probs is None else probs
    return shared.Faces(np.array(boxes, np.float32).reshape(-1, 4), probs, np.zeros((len(boxes), 5, 2)))


@pytest.fixture
def follow():
    """Follow faces through frames a tenth of a second apart; return the track numbers in each frame."""

    def follow(*founds):
        tracker, image = Tracker(FixedFinder()), Image.new("RGB", (640, 360))
        return [
            [sighting.track.number for sighting in tracker.follow(image, i / 10, found)]
            for i, found in enumerate(founds)
        ]

    return follow


def test_tracks_keep_their_numbers_whatever_the_order(follow):
    left, right = box_at(10, 10), box_at(100, 10)
    assert follow(faces_at(left, right), faces_at(right, left), None, faces_at(left)) == [[1, 2]] * 4


def test_track_survives_a_short_loss_and_not_a_long_one(follow):
    face, nobody = faces_at(box_at(300, 10)), faces_at()  # `FixedFinder` sees no face there
    assert follow(face, nobody, nobody, nobody, face) == [[1], [], [], [], [1]]
    assert follow(face, *[nobody] * 6, face) == [[1], *[[]] * 6, [2]]


def test_track_follows_a_steady_motion_through_a_loss(follow):
    moving = [faces_at(box_at(210 + 15 * i, 10)) for i in range(9)]
    assert follow(*moving[:5], faces_at(), faces_at(), faces_at(), moving[8])[-1] == [1]


def test_box_that_drifts_off_takes_no_other_faces_place():
    class DriftingFinder(FixedFinder):
        def refine(self, image, boxes):
            return faces_at(*[box_at(400, 100), box_at(38, 10, 100)][: len(boxes)])  # the first is elsewhere

    tracker, image = Tracker(DriftingFinder()), Image.new("RGB", (640, 360))
    tracker.follow(image, 0, faces_at(box_at(10, 10, 100), box_at(45, 10, 100)))
    [sighting] = tracker.follow(image, 0.1, None)
    assert sighting.track.number == 2
    assert sighting.box.tolist() == box_at(38, 10, 100).tolist()


def test_two_tracks_of_one_face_become_one(follow):
    apart = faces_at(box_at(10, 10), box_at(60, 10))
    together = faces_at(box_at(32, 10), box_at(36, 10))
    numbers = follow(apart, faces_at(box_at(24, 10), box_at(48, 10)), together, None)
    assert numbers == [[1, 2], [1, 2], [1], [1]]


def test_face_that_leaves_the_image_ends(follow):
    leaving = [faces_at(box_at(30 - 20 * i, 10)) for i in range(4)]
    assert follow(*leaving, None, None)[3:] == [[1], [], []]


def test_box_that_the_last_stage_makes_jump_stays_until_the_next_search():
    class JumpyFinder(FixedFinder):
        def refine(self, image, boxes):
            return faces_at(*(box_at(box[0], box[1], 15) for box in boxes))

    tracker, image, face = Tracker(JumpyFinder()), Image.new("RGB", (640, 360)), faces_at(box_at(0, 10))
    for i, found in enumerate([face, None, None, face]):
        (sighting,) = tracker.follow(image, i / 10, found)
        assert sighting.track.number == 1
        np.testing.assert_allclose(sighting.box, box_at(0, 10))
    assert tracker.follow(image, 0.4, faces_at()) == []


@pytest.fixture(scope="module")
def people():
    """Two heads, as large as `box_at` and its surroundings."""
    with Image.open(SAMPLE) as image:
        return [image.crop((x, 0, x + 480, 480)).resize((120, 120)) for x in (0, 480)]


@pytest.fixture
def returns(people):
    """Show people for half a second each, (who, x), at most once a cut; return the numbers that they get."""

    def returns(*shown, rejoin=10, cuts=()):
        tracker, numbers = Tracker(FixedFinder(), rejoin), []
        for i, (who, x) in enumerate(shown):
            if i in cuts:
                tracker.forget_places()
            image, found = Image.new("RGB", (640, 360), "gray"), faces_at()
            if who is not None:
                image.paste(people[who], (x - 40, 60))
                found = faces_at(box_at(x, 100))
            for j in range(6):
                seen = tracker.follow(image, i + j / 10, found)
            numbers.append([sighting.track.number for sighting in seen])
        return numbers

    return returns


@pytest.mark.parametrize("cuts", [(), (1, 2)])
def test_face_that_comes_back_keeps_its_number_wherever_it_is(returns, cuts):
    shown = [(0, 240), (None, 0), (0, 240), (None, 0), (0, 480)]
    assert returns(*shown, cuts=cuts) == [[1], [], [1], [], [1]]
    assert returns(*shown, cuts=cuts, rejoin=0) == [[1], [], [2], [], [3]]


def test_another_person_gets_a_number_of_their_own(returns):
    shown = [(0, 240), (None, 0), (1, 240), (None, 0), (0, 240), (None, 0), (1, 480)]
    assert returns(*shown) == [[1], [], [2], [], [1], [], [2]]
    assert returns((0, 240), (1, 240), (0, 240), (1, 240), cuts=(1, 2, 3)) == [[1], [2], [1], [2]]


def test_face_that_was_away_for_longer_gets_a_new_number(returns):
    shown = [(0, 240), *[(None, 0)] * 4, (0, 240)]
    assert returns(*shown, rejoin=3)[-1] == [2]
    assert returns(*shown, rejoin=6)[-1] == [1]


def test_match_boxes_pairs_the_best_first():
    boxes = np.array([box_at(0, 0), box_at(20, 0)])
    assert match_boxes(boxes, np.array([box_at(8, 0)])) == {0: 0}
    assert match_boxes(boxes, np.array([box_at(18, 0), box_at(2, 0)])) == {0: 1, 1: 0}
    assert match_boxes(boxes, np.array([box_at(300, 0)])) == {}
    assert match_boxes(np.empty((0, 4)), boxes) == {}


def test_search_comes_with_each_cut_and_in_time(run, astronaut, moving, tmp_path, monkeypatch):
    searched = []
    find_all = shared.FaceFinder.find_all

    def spy(finder, images):
        searched.extend(np.asarray(image)[100, 310].tolist() for image in images)
        return find_all(finder, images)

    monkeypatch.setattr(shared.FaceFinder, "find_all", spy)
    other = Image.new("RGB", SIZE, (200, 250, 200))
    other.paste(astronaut, (100, 0))
    images = [*moving(10, step=0), *[other] * 10]
    clip = write_video(tmp_path / "clip.mp4", images)
    assert run(clip, "--no-video", "--search-every", 0.2, "--rejoin", 0)[0] == 0
    assert [color[1] > 200 for color in searched] == [False, False, True, True]  # frames 0, 5, 10, 15
    tracks = [row["track"] for row in read_table(tmp_path / "clip_emotions.csv")]
    assert tracks == ["1"] * 10 + ["2"] * 10  # a cut ends all tracks
    searched.clear()
    assert run(clip, "--no-video", "--search-every", 0)[0] == 0
    assert len(searched) == 20


def test_cut_is_told_from_motion(real_data):
    previous, ends = None, []
    for name in ("single_face", "no_face", "fer_woman2"):
        frames = Video(real_data / "video" / f"{name}.mp4", 0, 2).frames()
        thumbnails = [np.asarray(f.image.resize((32, 18), 0).convert("L"), float) for f in frames]
        assert not any(map(is_cut, thumbnails[1:], thumbnails))
        if previous is not None:
            ends.append(is_cut(thumbnails[0], previous))
        previous = thumbnails[-1]
    assert ends == [True, True]
    assert CUT < 57


def test_refined_boxes_stay_on_the_face(run, real_data, tmp_path):
    boxes = {}
    for search_every in (0, 99):
        out_dir = tmp_path / str(search_every)
        clip = real_data / "video" / "single_face.mp4"
        run(
            clip,
            "--no-video",
            "--out-dir",
            out_dir,
            "--search-every",
            search_every,
            "--every",
            99,
            "--end",
            1,
        )
        rows = read_table(out_dir / "single_face_emotions.csv")
        boxes[search_every] = np.array(
            [[float(row[key]) for key in ("x0", "y0", "x1", "y1")] for row in rows]
        )
    searched, refined = boxes[0], boxes[99]  # the latter after one search
    assert len(searched) == len(refined) == 30
    ious = box_ious(searched, refined).diagonal()
    assert np.median(ious) > 0.9
    assert min(ious[-10:]) > 0.8


# --- smoothing and drawing ---


def smoothed(values, time, *, is_centred=False, step=0.1, time_constant=0.5):
    """Smooth the probabilities of the second of two classes, one each `step` s."""
    track = Track(box_at(0, 0), 0.0)
    track.samples = [(i * step, np.array([1 - value, value])) for i, value in enumerate(values)]
    return track.smooth(time, time_constant, is_centred)[1]


def test_smoothing_follows_its_time_constant():
    for step in (0.1, 0.05):  # however often it is read
        count = round(1 / step)
        values = [0.0] * 3 * count + [1.0] * (count // 2)
        now = (len(values) - 1) * step
        assert smoothed(values, now, step=step) == pytest.approx(1 - math.exp(-1), abs=0.01)
        assert smoothed(values, now, step=step, time_constant=0) == 1


def test_centred_smoothing_has_no_lag_and_removes_as_much_noise():
    values = [0.0] * 20 + [1.0] * 21
    assert smoothed(values, 1.95, is_centred=True) == pytest.approx(0.5, abs=0.001)
    noise = np.random.default_rng(0).uniform(0, 1, 401)
    causal, centred = (
        np.std(
            [
                smoothed(noise[i - 20 : i + 21][: 41 if is_centred else 21], 2.0, is_centred=is_centred)
                for i in range(20, 380)
            ]
        )
        for is_centred in (False, True)
    )
    assert centred == pytest.approx(causal, rel=0.15)


def test_label_changes_only_when_another_emotion_clearly_leads():
    def labels(smooth):
        track, seen = Track(box_at(0, 0), 0.0), []
        for i in range(20):
            track.samples.append((i / 10, np.array([0.5, 0.5]) + (0.04, -0.04) * np.array((-1) ** i)))
            track.smooth(i / 10, smooth, False)
            seen.append(track.emotion)
        return seen

    assert labels(0.5) == [0] * 20
    assert labels(0) == [0, 1] * 10


class FixedClassifier:
    """Says that a bright image's faces are happy, a dark one's sad."""

    classes = ("happy", "sad")

    def predict_all(self, images, boxes):
        is_bright = [image.getpixel((0, 0))[0] > 124 for image in images]
        return [
            np.tile([[0.9, 0.1]] if bright else [[0.1, 0.9]], (len(part), 1))
            for bright, part in zip(is_bright, boxes, strict=True)
        ]


@pytest.mark.parametrize(("is_live", "low", "high"), [(False, -0.01, 0.06), (True, 0.2, 0.6)])
def test_label_of_a_file_changes_when_the_face_does_and_of_a_camera_later(is_live, low, high):
    class OneFace(FixedFinder):
        def find_all(self, images):
            return [faces_at(box_at(100, 100))] * len(images)

    read = []

    def frames():
        for i in range(100):
            read.append(i)
            color = "gray" if i < 50 else (120, 120, 120)
            yield Frame(i, Fraction(i, 25), Fraction(1, 25), Image.new("RGB", SIZE, color))

    kit = Kit(OneFace(), FixedClassifier(), {}, every=1, search_every=0, rejoin=0)
    labels = []
    for frame, faces in follow_faces(frames(), kit, batch_size=4, is_live=is_live):
        labels.append(faces[0]["emotion"])
        assert len(read) - frame.number <= (4 if is_live else 4 + 13)  # it looks ahead half a second
    change = labels.index("sad") / 25 - 2
    assert (labels.count("happy"), low < change < high) == (labels.index("sad"), True)


def test_drawn_label_stands_still_when_the_face_does():
    rng = np.random.default_rng(0)
    wall, drawn, pictures = Image.new("RGB", (320, 180)), {}, []
    for _ in range(30):
        box = (np.array([100, 60, 160, 130]) + rng.uniform(-1, 1, 4)).tolist()
        face = {"track": 1, "box": box, "emotion": "happy", "prob": 0.8 + rng.uniform(-0.02, 0.02)}
        pictures.append(np.asarray(draw_faces(wall, [face], {"happy": "#F0E442"}, None, drawn)))
    changes = [(after != before).any() for before, after in itertools.pairwise(pictures)]
    assert sum(changes) <= 3


def test_drawn_box_follows_a_face_that_moves():
    drawn = {}
    for x in range(0, 100, 10):
        face = {"track": 1, "box": [x, 60, x + 60, 130], "emotion": "happy", "prob": 0.8}
        draw_faces(Image.new("RGB", (320, 180)), [face], {"happy": "#F0E442"}, None, drawn)
        assert abs(drawn[1].box[0] - x) <= 0.04 * 70 + 1e-9


def test_label_in_a_video_has_the_number_of_its_track():
    face, drawn = {"box": [100, 60, 160, 130], "emotion": "happy", "prob": 0.8}, []
    for track in ({}, {"track": 3}, {"track": 4}):
        drawn.append(draw_faces(Image.new("RGB", (320, 180)), [face | track], {"happy": "#F0E442"}))
    assert len({image.tobytes() for image in drawn}) == 3
    (left, right), (farther_left, farther_right) = (
        np.flatnonzero((np.asarray(image)[:58] > 0).any((0, 2)))[[0, -1]] for image in drawn[:2]
    )
    assert farther_right - farther_left > right - left + 5


def test_label_keeps_its_place_until_another_is_much_better():
    def place(box, drawn):
        face = {"track": 1, "box": box, "emotion": "happy", "prob": 0.8}
        draw_faces(Image.new("RGB", (320, 180)), [face], {"happy": "#F0E442"}, None, drawn)
        return drawn[1].place

    drawn = {}
    below = place([100, 5, 160, 75], drawn)
    assert place([100, 25, 160, 95], drawn) == below  # alone it would stand above
    assert place([100, 25, 160, 95], {}) != below
    assert place([100, 105, 160, 180], drawn) != below  # there is no room below any more


# --- summary ---


def frame_at(seconds, duration=0.1):
    return Frame(
        0, Fraction(seconds).limit_denominator(1000), Fraction(duration).limit_denominator(1000), WALL
    )


WALL = Image.new("RGB", SIZE)


def face_of(track, emotion="happy", prob=0.8):
    probs = dict.fromkeys(FIVE, (1 - prob) / 4) | {emotion: prob}
    return {"track": track, "box": [10.0, 10.0, 60.0, 70.0], "emotion": emotion, "prob": prob, "probs": probs}


def test_summary_counts_the_seconds_of_each_emotion(capsys):
    summary = Summary(FIVE)
    for i in range(10):
        summary.add(
            frame_at(i / 10), [face_of(1, "happy" if i < 6 else "sad")] + [face_of(2, "angry")] * (i > 7)
        )
    first, second = summary.tracks().to_dict("records")
    assert first == {
        "track": 1,
        "faces": 10,
        "first": 0,
        "last": 1,
        "seconds": 1,
        "emotion": "happy",
        "share_angry": 0,
        "share_disgusted": 0,
        "share_happy": 0.6,
        "share_sad": 0.4,
        "share_surprised": 0,
        "prob": 0.8,
        "changes": 1,
    }
    assert list(second.values())[:6] == [2, 2, 0.2, 0.8, 1, "angry"]
    summary.print_line(Path("x.mp4"), "text")
    assert capsys.readouterr().out == "x.mp4\t2 tracks, 1.0 s\thappy\t0.50\n"


def test_summary_keeps_means_when_its_bins_double():
    summary = Summary(FIVE)
    for i in range(10 * NUM_BINS):
        summary.add(frame_at(i / 10), [face_of(1, prob=0.9 if i < 5 * NUM_BINS else 0.3)])
    ((times, means),) = summary.runs(1)
    assert times[-1] == pytest.approx(NUM_BINS)
    assert len(times) <= NUM_BINS + 1
    assert means[times < NUM_BINS / 2 - 4, 2] == pytest.approx(0.9)
    assert means[times > NUM_BINS / 2 + 4, 2] == pytest.approx(0.3)


def test_summary_keeps_pictures_of_the_longest_tracks_only():
    summary = Summary(FIVE)
    number = 0
    for track in range(1, 3 * NUM_PICTURED):
        for _ in range(1 + track % 7):
            summary.add(frame_at(number / 10), [face_of(track)])
            number += 1
    assert len(summary.pictures) == NUM_PICTURED
    tracks = summary.tracks()
    assert len(tracks) == 3 * NUM_PICTURED - 1
    kept = tracks[tracks["track"].isin(list(summary.pictures)[:-1])]
    assert kept["seconds"].min() >= 0.5


def test_timeline_of_a_frame_a_second_has_no_gaps():
    summary = Summary(FIVE)
    for i in range(30):
        summary.add(frame_at(i, duration=1), [face_of(1)])
    [(times, _)] = summary.runs(1)
    assert (times[0], times[-1]) == (0, 30)
    assert (summary.sample(1, np.arange(0.5, 30)).sum(1) > 0).all()


def test_timeline_has_a_gap_where_the_face_was_away(tmp_path):
    summary = Summary(FIVE)
    for i in range(30):
        summary.add(frame_at(i / 10), [face_of(1)] * (i < 10 or i >= 20))
    runs = [(times[0], times[-1]) for times, _ in summary.runs(1)]
    np.testing.assert_allclose(runs, [(0, 1), (2, 3)], atol=0.01)


# --- threads ---


def test_in_background_keeps_order_and_is_ahead_but_never_far():
    made, is_ahead = [], threading.Event()

    def make():
        for i in range(20):
            made.append(i)
            if i:
                is_ahead.set()
            yield i

    for i, item in enumerate(in_background(make(), 3)):
        assert item == i
        assert is_ahead.wait(60)  # made while the first item is in hand
        assert len(made) <= i + 1 + 3 + 1


def test_in_background_passes_errors_on():
    def fail():
        yield 1
        raise ValueError("told")

    items = in_background(fail(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="told"):
        next(items)


# --- live window and camera ---


@pytest.fixture
def screen(tmp_path):
    """A virtual screen: its name, and a function that reads its pixels."""
    if not shutil.which("Xvfb"):
        pytest.skip("no Xvfb, on which a window can open; apt-get install xvfb")
    read_end, write_end = os.pipe()
    command = ["Xvfb", "-displayfd", str(write_end), "-screen", "0", "640x480x24", "-fbdir", tmp_path]
    server = subprocess.Popen(command, pass_fds=[write_end], stderr=subprocess.DEVNULL)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        name = f":{file.readline().strip()}"

    def pixels():
        data = (tmp_path / "Xvfb_screen0").read_bytes()
        header = struct.unpack(">25I", data[:100])  # of the X window dump format: sizes, counts
        start, width, height, row_bytes = header[0] + 12 * header[19], header[4], header[5], header[12]
        rows = np.frombuffer(data[start : start + row_bytes * height], np.uint8)
        return rows.reshape(height, row_bytes // 4, 4)[:, :width, 2::-1]

    yield name, pixels
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "camera"])
def test_live_window_shows_the_labelled_frames(start, moving, screen, tmp_path, source):
    name, pixels = screen
    num_frames = 100 if source == "file" else 400  # that a camera does not wait for
    clip = write_video(tmp_path / "clip.mp4", moving(num_frames, step=0))
    options = [clip, "--show", "--no-video"] if source == "file" else ["--camera", clip]
    process = start(detect_emotions.__file__, *options, env={**os.environ, "DISPLAY": name}, stderr=None)
    yellow = 0  # the label's
    while process.poll() is None:
        yellow = max(yellow, (np.abs(pixels().astype(int) - (240, 228, 66)).max(2) < 12).sum())
        time.sleep(0.02)
    assert process.returncode == 0
    assert process.stdout.read().split("\t")[2] == "happy"
    assert yellow > 300
    names = {path.name for path in tmp_path.iterdir()} - {"Xvfb_screen0"}
    assert names == {"clip.mp4", *(OUTPUTS[1:] if source == "file" else ())}


class FakeScreen:
    """Stands for OpenCV's windows and for the clock, which goes on only while a picture is shown."""

    error, WINDOW_AUTOSIZE, WINDOW_GUI_NORMAL, WND_PROP_VISIBLE = RuntimeError, 0, 0, 0

    def __init__(self):
        self.now, self.waits_ms = 1000.0, []

    def monotonic(self):
        return self.now

    def waitKey(self, wait_ms):  # noqa: N802
        self.waits_ms.append(wait_ms)
        self.now += wait_ms / 1000
        return -1

    def namedWindow(self, *_):  # noqa: N802
        pass

    imshow = namedWindow

    def getWindowProperty(self, *_):  # noqa: N802
        return 1


def test_each_video_in_the_window_keeps_its_own_pace(run, moving, tmp_path, monkeypatch):
    screen = FakeScreen()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(detect_emotions, "load_opencv", lambda: screen)
    monkeypatch.setattr(detect_emotions, "time", screen)
    clips = [write_video(tmp_path / f"{name}.mp4", moving(5, step=0)) for name in "ab"]
    assert run(*clips, "--show", "--no-video")[0] == 0
    assert screen.waits_ms == [5, 35, 40, 40, 40] * 2  # the first picture is shown for a moment


def test_a_video_that_q_ended_is_labelled_again(run, moving, tmp_path, monkeypatch):
    screen = FakeScreen()
    monkeypatch.setattr(screen, "waitKey", lambda _: ord("q"))
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "clip.mp4", moving(5, step=0))
    with monkeypatch.context() as patch:
        patch.setenv("DISPLAY", ":0")
        patch.setattr(detect_emotions, "load_opencv", lambda: screen)
        assert run(tmp_path / "in", "--show", "--out-dir", tmp_path)[0] == 0
    assert len(read_video(tmp_path / "clip_emotions.mp4")[0]) == 1
    assert run(tmp_path / "in", "--out-dir", tmp_path)[0] == 0
    assert len(read_video(tmp_path / "clip_emotions.mp4")[0]) == 5


def test_camera_is_recorded_into_the_folder(run, moving, tmp_path):
    clip = write_video(tmp_path / "clip.avi", moving(12), codec="mpeg4")
    code, out, err = run("--camera", clip, "--out-dir", tmp_path / "out")
    assert (code, err, out.split("\t")[2]) == (0, "", "happy")
    stem = detect_emotions.camera_name(str(clip))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        name.replace("clip", stem) for name in OUTPUTS
    }
    _, times, _ = read_video(tmp_path / "out" / f"{stem}_emotions.mp4")
    assert len(times) == 12
    assert times == sorted(set(times))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_camera_and_keeps_what_was_recorded(start, moving, tmp_path, stop):
    clip = write_video(tmp_path / "clip.avi", moving(1000, step=0), codec="mpeg4")
    process = start(detect_emotions.__file__, "--camera", clip, "--out-dir", tmp_path / "out", "--json")
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(stop)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    stem = detect_emotions.camera_name(str(clip))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        name.replace("clip", stem) for name in OUTPUTS
    }
    _, times, _ = read_video(tmp_path / "out" / f"{stem}_emotions.mp4")
    assert len(times) == 20 + len(out.splitlines()) < 1000


def test_camera_that_is_not_there_is_one_line_however_often(run, tmp_path):
    for _ in range(2):
        code, out, err = run("--camera", 77, "--json", "--csv", tmp_path / "faces.csv")
        assert (code, out) == (1, "")
        assert err == "error: camera 77 does not open; is it there, and does no other program use it?\n"


def test_password_of_a_camera_is_told_to_nobody(run):
    assert detect_emotions.camera_name("rtsp://admin:p@ss@host/a@1") == "camerartsp_host_a_1"
    code, _, err = run("--camera", "rtsp://admin:secret@127.0.0.1:9/x", "--json")
    assert (code, "camera rtsp://127.0.0.1:9/x does not open" in err, "secret" in err) == (1, True, False)


@pytest.mark.parametrize("rate", [-1.0, 0.0, 1e-5, math.inf, math.nan, 1e9])
def test_camera_whose_frame_rate_is_nonsense_is_recorded(run, moving, tmp_path, monkeypatch, rate):
    import cv2

    class Capture:
        def __init__(self, *args, capture=cv2.VideoCapture):
            self.capture = capture(*args)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, name):
            return rate if name == cv2.CAP_PROP_FPS else self.capture.get(name)

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    clip = write_video(tmp_path / "clip.avi", moving(3), codec="mpeg4")
    assert run("--camera", clip, "--out-dir", tmp_path / "out")[0] == 0
    assert len(read_video(*(tmp_path / "out").glob("*.mp4"))[0]) == 3


def test_window_without_a_screen_is_one_line(run, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    code, out, err = run("--camera", 0)
    assert (code, out) == (1, "")
    assert err == "error: there is no screen for a live window; leave --show out, or record by --out-dir"


def test_window_without_opencv_names_the_remedy(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, out, err = run(SAMPLE, "--show")
    assert (code, out) == (1, "")
    assert "apt-get install libgl1 libglib2.0-0" in err
    assert len(err.splitlines()) == 1


BURSTS = [0, 2000, 4000, 6000, 8000, *range(10_000, 10_240, 30), 15_000, 20_000]  # ms, as of a screen


@pytest.mark.parametrize("codec", ["libx264", "libvpx"])
def test_bursts_in_a_matroska_video_of_a_low_mean_rate_keep_their_times(moving, tmp_path, codec):
    """The file says that each frame lasts two seconds."""
    how = {"codec": codec, "rate": Fraction(1, 2), "time_base": Fraction(1, 1000), "times": BURSTS}
    clip = write_video(tmp_path / "clip.mkv", moving(len(BURSTS)), **how)
    with contextlib.closing(Video(clip, 0, math.inf)) as video:
        frames = list(video.frames())
    assert [round(1000 * frame.time) for frame in frames] == BURSTS
    assert [round(1000 * frame.duration) for frame in frames[:-1]] == np.diff(BURSTS).tolist()
    assert video.lost == []


def test_frames_of_a_browsers_recording_last_until_the_next(moving, tmp_path):
    """It does not say how long a frame lasts, and FFmpeg then takes a millisecond."""
    times = [0, 41, 70, 108, 141, 171, 199, 240]
    how = {"codec": "libvpx", "time_base": Fraction(1, 1000), "times": times}
    clip = write_video(tmp_path / "clip.webm", moving(len(times)), **how)
    data = bytearray(clip.read_bytes())
    start = data.index(bytes.fromhex("23e383"))  # DefaultDuration
    length = 2 + (data[start + 3] & 0x7F)
    data[start : start + 2 + length] = bytes([0xEC, 0x80 | length]) + bytes(length)  # Void
    clip.write_bytes(data)
    with contextlib.closing(Video(clip, 0, math.inf)) as video:
        frames = list(video.frames())
    assert [round(1000 * frame.duration) for frame in frames[:-1]] == np.diff(times).tolist()


@pytest.mark.parametrize(("options", "seconds"), [((), 3), (("--end", 0.2), 0.2)])
def test_sound_after_the_last_picture_stays_unless_the_end_is_cut_off(
    run, moving, tmp_path, options, seconds
):
    clip = write_video(tmp_path / "clip.mp4", moving(10), sound="aac", seconds=3)
    assert run(clip, *options)[0] == 0
    with av.open(str(tmp_path / "clip_emotions.mp4")) as container:
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(seconds, abs=0.1)

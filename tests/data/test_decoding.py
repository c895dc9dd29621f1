"""Decoding against PIL's own conversions, NumPy and torchvision: modes, orientations, sizes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from ekd_lightning.data.decoding import decode_all, fitted, read_images, to_rgb
from ekd_lightning.errors import UserError

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8))
ALPHA = RNG.integers(0, 256, (9, 7), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_are_pils_own_conversion(mode):
    image = COLOURS.convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(pixels(to_rgb(image)), pixels(image.convert("RGB")))


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparent_pixels_show_white(mode):
    colours = COLOURS.convert("L").convert("RGB") if mode in ("LA", "La") else COLOURS
    image = colours.copy()
    image.putalpha(Image.fromarray(ALPHA))
    expected = over_white(pixels(colours), ALPHA)
    if mode in ("RGBA", "RGBa"):
        image = image.convert(mode)
    elif mode == "PA":
        image = colours.convert("P")
        expected = over_white(pixels(image.convert("RGB")), ALPHA)
        image.putalpha(Image.fromarray(ALPHA))
    else:
        image = image.convert("LA").convert(mode)
    assert image.mode == mode
    tolerance = 3 if mode.endswith("a") else 1  # premultiplied colours are rounded once more
    off = np.abs(pixels(to_rgb(image)) - expected)
    assert off[ALPHA > 100].max() <= tolerance
    assert off.max() <= 1 or mode.endswith("a")


def test_a_transparent_palette_entry_shows_white():
    image = COLOURS.convert("P")
    image.info["transparency"] = int(pixels(image)[0, 0])
    expected = pixels(image.convert("RGB"))
    expected[pixels(image) == pixels(image)[0, 0]] = 255
    assert np.array_equal(pixels(to_rgb(image)), expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_high_byte(form):
    levels = RNG.integers(0, 1 << 16, (9, 7)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, form)
    found = pixels(to_rgb(Image.open(file)))
    assert np.array_equal(found, np.repeat((levels >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("largest", [1, 255])
def test_floating_point_grey(largest):
    levels = np.linspace(0, largest, 63, dtype=np.float32).reshape(9, 7)
    found = pixels(to_rgb(Image.fromarray(levels)))
    assert np.array_equal(found[..., 1], np.round(levels * (255 / largest)))


TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
    8: lambda x: np.rot90(x, -1),
}
"""How the pixels of an upright image are stored under each EXIF orientation."""


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_obeyed(orientation):
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](np.asarray(COLOURS))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert np.array_equal(pixels(to_rgb(Image.open(file))), pixels(COLOURS))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_squares_are_torchvisions_resize_and_centre_crop(height, width, side):
    image = Image.fromarray(np.random.default_rng(height * 61 + width).integers(0, 256, (height, width, 3), np.uint8))
    reference = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])
    assert np.array_equal(pixels(fitted(image, (side, side))), pixels(reference(image)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_any_size_is_covered_and_cut_in_one_direction_only(height, width, H, W):
    """A picture whose rows and columns count up: the cut side loses as much on either end, the other nothing."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    found = fitted(Image.fromarray(ramp), (H, W))
    assert found.size == (W, H)
    assert pixels(found)[..., 2].max() == 0  # nothing from outside, which would be black anyway, and no noise
    whole = pixels(Image.fromarray(ramp).resize((W, H), Image.Resampling.BILINEAR))
    uncut = 1 if height * W > width * H else 0
    if height > 1 and width > 1:
        assert np.abs(pixels(found)[..., uncut] - whole[..., uncut]).max() <= 1


def decoded(tmp_path, images, size):
    found = decode_all(tmp_path / "pixels", images.__getitem__, len(images), size, "")
    return found, np.fromfile(tmp_path / "pixels", np.uint8).reshape(-1, 3, *found.size)


@pytest.mark.parametrize("size", [24, (16, 24)])
def test_files_for_a_student_are_read_as_those_of_a_data_set(tmp_path, size):
    large = Image.fromarray(RNG.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    files = [tmp_path / name for name in ("large.jpg", "clear.png")]
    large.save(files[0])  # decoded at a reduced size
    large.convert("RGBA").save(files[1])
    shape = (size, size) if isinstance(size, int) else size
    expected = decoded(tmp_path, [file.read_bytes() for file in files], shape)[1]
    assert np.array_equal(read_images(files, size).numpy(), expected)
    assert read_images([], size).shape == (0, 3, *shape)
    assert np.array_equal(read_images(files[0], size).numpy(), expected[:1])
    assert np.array_equal(read_images(str(files[0]), size).numpy(), expected[:1])
    files[1].write_text("text")
    with pytest.raises(UserError, match=r"clear.png: is not an image$"):
        read_images(map(str, files), size)
    with pytest.raises(UserError, match=r"none.png: cannot be read"):
        read_images([tmp_path / "none.png"], size)


def test_all_are_written_in_order_and_broken_ones_told(tmp_path):
    images = [Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(20)]
    found, rows = decoded(tmp_path, [b"", *images, b"text"], (8, 8))
    for row, image in zip(rows[1:-1], images, strict=True):
        assert np.array_equal(row.transpose(1, 2, 0), np.asarray(image))
    assert found.broken == {0: "has zero bytes", 21: "is not an image"}
    assert len(set(found.digests)) == 21


def test_one_size_is_found_or_asked_for(tmp_path):
    images = [Image.new("RGB", (7, 9))] * 3
    assert decoded(tmp_path, [b"", *images], None)[0].size == (9, 7)
    with pytest.raises(UserError, match=r"data\.image_size=null: images differ in size \(9×7 and 8×8\)"):
        decoded(tmp_path, [*images, Image.new("RGB", (8, 8))], None)
    photograph = io.BytesIO()
    Image.new("RGB", (96, 80)).save(photograph, "JPEG")
    with pytest.raises(UserError, match=r"differ in size \(9×7 and 80×96\): give data\.image_size"):
        decoded(tmp_path, [*images, photograph.getvalue()], None)


def test_a_full_disk_is_no_broken_image(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        decoded(tmp_path, [Image.new("RGB", (7, 9))], None)

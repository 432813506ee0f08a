import io

import numpy as np
import pytest
from PIL import Image

from effvit.data.sources.images import load_image, read_image, read_jpeg
from effvit.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def content(path):
    return path.read_bytes(), path


def test_png_of_the_right_size_is_read_pixel_by_pixel(tmp_path):
    image, done = read_image(*content(save(tmp_path / "a.png", Image.fromarray(NOISE))), 32)
    assert np.array_equal(image, NOISE) and image.dtype == np.uint8 and done == []


@pytest.mark.parametrize(
    ("mode", "kind", "suffix"),
    [
        ("L", "grayscale", "jpg"),
        ("1", "grayscale", "png"),
        ("LA", "grayscale", "png"),
        ("P", "palette", "png"),
        ("RGBA", "transparent", "png"),
        ("CMYK", "CMYK", "jpg"),
    ],
)
def test_other_colour_modes_become_rgb_and_are_named(tmp_path, mode, kind, suffix):
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(NOISE).convert(mode))
    image, done = read_image(*content(path), 32)
    assert image.shape == (32, 32, 3) and done == [f"{kind} converted to RGB"]
    with Image.open(path) as peer:
        assert np.array_equal(image, np.asarray(peer.convert("RGB")))


def test_sixteen_bit_grayscale_is_scaled_not_clipped(tmp_path):
    deep = (np.arange(64 * 64) * 16).reshape(64, 64).astype(np.uint16)
    image = load_image(save(tmp_path / "a.png", Image.fromarray(deep)), 64)
    assert np.array_equal(image, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_content_decides_and_not_the_suffix(tmp_path):
    path = tmp_path / "really_a_png.JPEG"
    Image.fromarray(NOISE).save(path, format="PNG")
    assert np.array_equal(load_image(path, 32), NOISE)


@pytest.mark.parametrize(
    ("size", "stored"), [((70000, 2), (40, 2)), ((200, 68000), (82, 1640)), ((1640, 82), (1640, 82))]
)
def test_strip_is_stored_as_far_as_a_view_can_show_it(tmp_path, size, stored):
    jpeg, done = read_jpeg(*content(save(tmp_path / "a.png", Image.new("RGB", size, (90, 90, 90)))), 72)
    assert Image.open(io.BytesIO(jpeg)).size == stored and done == (["reduced"] if size[0] == 200 else [])


@pytest.mark.parametrize("shape", [(64, 128, 3), (128, 64, 3)])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path, shape):
    bars = np.zeros(shape, np.uint8)
    centre = (slice(None), slice(32, 96)) if shape[1] > shape[0] else (slice(32, 96), slice(None))
    bars[centre] = 200
    image, done = read_image(*content(save(tmp_path / "a.png", Image.fromarray(bars))), 32)
    assert image.shape == (32, 32, 3) and done == ["resized"]
    assert np.all(image[2:-2, 2:-2] == 200)  # away from the edge, where the filter sees the black beyond the crop


def test_orientation_of_the_camera_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right to see it upright
    path = save(tmp_path / "a.png", Image.fromarray(NOISE), exif=exif)
    assert np.array_equal(load_image(path, 32), np.rot90(NOISE, -1))


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_image_is_an_error_that_names_the_file(tmp_path, kind, fraction):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format=kind)
    path = tmp_path / "cut.img"
    path.write_bytes(buffer.getvalue()[: int(buffer.tell() * fraction)])
    with pytest.raises(UserError, match=r"cut\.img"):
        load_image(path, 32)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_what_is_not_a_known_image_is_an_error_that_names_the_formats(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg: not an image \(expected JPEG, PNG, WEBP or BMP\)"):
        load_image(path, 32)


def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", Image.fromarray(NOISE))
    for limit in (1000, 500):  # Pillow warns above the limit and fails above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=rf"bomb\.png: more than {limit} pixels"):
            load_image(path, 32)


def test_missing_file_keeps_the_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png", 32)

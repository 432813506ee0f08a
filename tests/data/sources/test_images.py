import io

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from PIL.JpegImagePlugin import JpegImageFile

from effvit.data.sources import images
from effvit.data.sources.images import is_image, load_image, read_jpeg, read_square
from effvit.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def read(path, size):
    image, done = read_square(path.read_bytes(), path.name, size)
    return np.asarray(image), done


def test_png_of_the_right_size_is_read_pixel_by_pixel(tmp_path):
    image, done = read(save(tmp_path / "a.png", Image.fromarray(NOISE)), 32)
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
    image, done = read(path, 32)
    assert image.shape == (32, 32, 3) and done == [f"{kind} converted to RGB"]
    with Image.open(path) as peer:
        assert np.array_equal(image, np.asarray(peer.convert("RGB")))


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("GIF", "gif"), ("TIFF", "tif"), ("TIFF", "tiff"), ("PPM", "ppm"), ("BMP", "bmp"), ("WEBP", "webp")],
)
def test_every_format_is_read_as_pillow_reads_it(tmp_path, format, suffix):
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(NOISE).convert("P" if format == "GIF" else "RGB"))
    assert is_image(path.name, None)
    image, done = read(path, 32)
    with Image.open(path) as peer:
        assert peer.format == format and np.array_equal(image, np.asarray(peer.convert("RGB")))
    assert done == (["palette converted to RGB"] if format == "GIF" else [])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read_as_pillow_reads_it(tmp_path):
    path = save(tmp_path / "a.avif", Image.fromarray(NOISE))
    with Image.open(path) as peer:
        assert np.array_equal(read(path, 32)[0], np.asarray(peer.convert("RGB")))


def test_avif_that_this_pillow_cannot_read_is_answered_with_the_version_that_can(tmp_path, monkeypatch):
    path = tmp_path / "a.avif"
    path.write_bytes(b"\0\0\0\x20ftypavif" + bytes(100))
    monkeypatch.setattr(images, "_OPENED", ("JPEG", "PNG"))
    with pytest.raises(UserError, match=r"a\.avif: AVIF, which Pillow .* cannot read here; install Pillow 11\.3"):
        load_image(path, 32)


@pytest.mark.parametrize("levels", [1, 255, 65535])
def test_portable_maps_are_read_at_any_depth(tmp_path, levels):
    grey = (np.arange(32 * 32).reshape(32, 32) * 61) % (levels + 1)
    kind = (b"P4", b"P5", b"P5")[(1, 255, 65535).index(levels)]
    head = b"%s\n32 32\n" % kind + (b"" if levels == 1 else b"%d\n" % levels)
    body = np.packbits(1 - grey, axis=1) if levels == 1 else grey.astype(">u2" if levels > 255 else np.uint8)
    (tmp_path / "a.pgm").write_bytes(head + body.tobytes())
    image, done = read(tmp_path / "a.pgm", 32)
    assert np.array_equal(image[..., 0], grey * 255 // levels if levels < 256 else grey >> 8)
    assert done == ["grayscale converted to RGB"]


def frames(count):
    return [Image.new("RGB", (32, 32), (200, 9 * i, 60)) for i in range(count)]


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_read_and_the_others_are_not_decoded(tmp_path, format):
    path, (first, *others) = tmp_path / f"a.{format.lower()}", frames(5)
    first.save(path, save_all=True, append_images=others, **({"lossless": True} if format == "WEBP" else {}))
    image, done = read(path, 32)
    assert np.array_equal(image, np.asarray(first)) and "first of several frames taken" in done
    still = save(tmp_path / f"b.{format.lower()}", first)
    assert "first of several frames taken" not in read(still, 32)[1]
    if format in ("GIF", "TIFF"):  # the others need not even be there
        whole, least = path.read_bytes(), still.stat().st_size + 1
        for end in range(least, len(whole)) if format == "GIF" else [len(whole) - 20]:
            path.write_bytes(whole[:end])
            assert np.array_equal(read(path, 32)[0], np.asarray(first))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (NOISE[..., 0].astype(np.float32) / 255, "floating-point numbers"),
        (NOISE[..., 0].astype(np.int32) * 1000, "more than 16 bits"),
        (NOISE[..., 0].astype(np.int32) - 1000, "more than 16 bits"),
    ],
)
def test_levels_of_unknown_range_are_refused_rather_than_shown_wrong(tmp_path, pixels, reason):
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=rf"a\.tif: pixels .*{reason}.*; convert it to 8 bits per channel"):
        load_image(path, 32)


def test_tiff_that_pillow_cannot_read_is_said_to_be_one(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(NOISE))
    whole = bytearray(path.read_bytes())
    at = whole.index(np.array([8, 8, 8], "<u2").tobytes())
    whole[at : at + 6] = np.array([24, 24, 24], "<u2").tobytes()
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.tif: TIFF of a kind that Pillow cannot read; convert it"):
        load_image(path, 32)


def frame(format):
    buffer = io.BytesIO()
    frames(1)[0].save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "is_one"),
    [
        ("clip.gif.1", frame("GIF")[:50], True),
        ("clip", frame("PPM"), True),
        ("IMG_1.dng", b"II*\0" + bytes(60), False),
        ("IMG_1.heic", b"\0\0\0\x18ftypmif1" + bytes(60), False),
        ("notes", b"P1 is my first point\n", False),
        ("notes", b"BMW and others\n", False),
    ],
)
def test_what_begins_like_an_image_is_one_but_not_raw_files_and_texts(name, content, is_one):
    assert is_image(name, lambda: io.BytesIO(content)) == is_one


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
    path = save(tmp_path / "a.png", Image.new("RGB", size, (90, 90, 90)))
    jpeg = read_jpeg(path.read_bytes(), path.name, 72)
    assert Image.open(io.BytesIO(jpeg.content)).size == jpeg.image.size == stored
    assert jpeg.done == (["reduced"] if size[0] == 200 else [])


@pytest.mark.parametrize("shape", [(64, 128, 3), (128, 64, 3)])
def test_shorter_side_is_resized_and_the_centre_cropped(tmp_path, shape):
    bars = np.zeros(shape, np.uint8)
    centre = (slice(None), slice(32, 96)) if shape[1] > shape[0] else (slice(32, 96), slice(None))
    bars[centre] = 200
    image, done = read(save(tmp_path / "a.png", Image.fromarray(bars)), 32)
    assert image.shape == (32, 32, 3) and done == ["resized"]
    assert np.all(image[2:-2, 2:-2] == 200)  # away from the edge, where the filter sees the black beyond the crop


def test_orientation_of_the_camera_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to the right to see it upright
    path = save(tmp_path / "a.png", Image.fromarray(NOISE), exif=exif)
    assert np.array_equal(load_image(path, 32), np.rot90(NOISE, -1))


def with_exif(jpeg, exif):
    """Put an APP1 segment after the first one of a JPEG."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[end:]


@pytest.mark.parametrize("options", [{}, {"dpi": (72, 72)}])
@pytest.mark.parametrize("exif", [b"Exif\0\0GARBAGEGARBAGE", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_is_ignored_with_a_count_and_the_picture_is_read(tmp_path, options, exif):
    whole = save(tmp_path / "a.jpg", Image.fromarray(NOISE), **options).read_bytes()
    (tmp_path / "b.jpg").write_bytes(with_exif(whole, exif))
    image, done = read(tmp_path / "b.jpg", 32)
    assert np.array_equal(image, read(tmp_path / "a.jpg", 32)[0])
    assert done == (["unreadable Exif ignored"] if b"GARBAGE" in exif else done)
    jpeg = read_jpeg((tmp_path / "b.jpg").read_bytes(), "b.jpg", 224)
    assert jpeg.content == (tmp_path / "b.jpg").read_bytes() and jpeg.done == done
    assert np.array_equal(load_image(tmp_path / "b.jpg", 224, "jpeg"), load_image(tmp_path / "a.jpg", 224, "jpeg"))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_unreadable_exif_of_other_formats_is_ignored_as_well(tmp_path, kind):
    path = save(tmp_path / f"a.{kind}", Image.new("RGB", (32, 32), (255, 0, 0)), exif=b"GARBAGEGARBAGE", lossless=True)
    image, done = read(path, 32)
    assert np.array_equal(image, np.full((32, 32, 3), (255, 0, 0))) and done == ["unreadable Exif ignored"]


def photo(width, height):
    """Soft colours, as a camera's, with an edge."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    pixels = np.stack([255 * x, 255 * y, 120 + 100 * (x + y > 1)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_at_no_less_than_twice_the_side_and_look_the_same(tmp_path, monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", photo(1200, 900), quality=95, exif=exif)
    content, load, seen = path.read_bytes(), JpegImageFile.load, []
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (seen.append(self.size), load(self))[1])
    square, done = read_square(content, "a.jpg", 32)
    jpeg = read_jpeg(content, "a.jpg", 72)
    assert set(seen) == {(150, 113), (300, 225)}  # an eighth: 113 of 64; a quarter: 225 of 164
    assert (done, jpeg.done) == (["resized"], ["reduced"])
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, mode, size: None)
    for reduced, whole in (
        (square, read_square(content, "a.jpg", 32)[0]),
        (jpeg.image, read_jpeg(content, "a.jpg", 72).image),
    ):
        assert reduced.size == whole.size
        assert np.abs(np.asarray(reduced, float) - np.asarray(whole, float)).mean() < 1


@pytest.mark.parametrize("side", [32, 127])
def test_jpegs_of_less_than_four_times_the_side_are_read_in_full(tmp_path, side):
    path = save(tmp_path / "a.jpg", photo(side, side))
    with Image.open(path) as peer:
        expected = ImageOps.fit(peer, (32, 32), method=Image.Resampling.BICUBIC)
    assert np.array_equal(load_image(path, 32), np.asarray(expected))


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
    with pytest.raises(
        UserError, match=r"a\.jpg: not an image \(expected JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM or AVIF\)"
    ):
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

"""Every odd image file is decoded as Pillow shows it, or refused with its name."""

from __future__ import annotations

import io
import multiprocessing
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tasks.data import images

SHARED = Path(__file__).parents[1] / "../shared/data"


def picture(height: int = 12, width: int = 20) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 12, y * 20, (x + y) * 8], axis=2).astype(np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def refused(source: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        images.decode(source)
    assert Path(source).name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
def test_modes_decode_as_pillow_converts_them(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    source = save(image, tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"))
    pixels = images.decode(source)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    with Image.open(source) as again:
        np.testing.assert_array_equal(pixels, np.asarray(again.convert("RGB")))
    assert images.size(source) == pixels.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = save(Image.fromarray(picture()), tmp_path / f"a.{suffix}", exif=exif)
    pixels = images.decode(source)
    assert pixels.shape[:2] == ((20, 12) if orientation >= 5 else (12, 20))
    assert images.size(source) == pixels.shape[:2]
    with Image.open(source) as again:
        np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(again).convert("RGB")))


def test_sixteen_bit_grey_is_scaled_over_its_full_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 128 * 257, 65535], [128, 129, 40000, 65406]], np.uint16)
    for suffix in ("png", "tif"):
        pixels = images.decode(save(Image.fromarray(values), tmp_path / f"a.{suffix}"))
        np.testing.assert_array_equal(pixels[..., 0], np.round(values / 257).astype(np.uint8))
        assert (pixels == pixels[..., :1]).all()


def test_float_and_wide_integers_are_refused(tmp_path: Path) -> None:
    assert "floating-point" in refused(save(Image.fromarray(np.ones((3, 3), np.float32)), tmp_path / "float.tif"))
    assert "70000" in refused(save(Image.fromarray(np.full((3, 3), 70000, np.int32)), tmp_path / "wide.tif"))


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 255, 0, 128
    pixels = images.decode(save(Image.fromarray(rgba), tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    np.testing.assert_allclose(pixels[0, 2], [227, 127, 127], atol=1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    pixels = images.decode(save(palette, tmp_path / "p.png", transparency=1))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_with_alpha_lies_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[100, 255], [100, 0], [100, 128]]], np.uint8)
    found = images.decode(save(Image.fromarray(pixels, "LA"), tmp_path / "a.png"))
    assert found[0, :2].tolist() == [[100] * 3, [255] * 3]
    np.testing.assert_allclose(found[0, 2], [177] * 3, atol=1)


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    """Pillow cannot write it: the file is put together by hand."""
    values = np.array([[[0, 257, 65535], [40000, 128 * 257, 1000]]], np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png((2, 1, 16, 2, 0, 0, 0), b"\0" + values.astype(">u2").tobytes()))
    np.testing.assert_allclose(images.decode(str(path)), values / 257, atol=1)
    assert images.size(str(path)) == (1, 2)


Chunk = tuple[bytes, bytes]


def png(header: tuple[int, ...], rows: bytes, before: Sequence[Chunk] = (), after: Sequence[Chunk] = ()) -> bytes:
    """A PNG file of a header, unfiltered rows, and other chunks before and behind the pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *header)), *before, (b"IDAT", zlib.compress(rows)), *after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [*chunks, (b"IEND", b"")])


def test_a_pngs_orientation_is_found_behind_its_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = b"".join(b"\0" + bytes(20) for _ in range(12))
    header = (20, 12, 8, 0, 0, 0, 0)
    for name, file, wanted in (
        ("behind.png", png(header, rows, after=[(b"eXIf", exif.tobytes()[6:])]), (20, 12)),
        ("text.png", png(header, rows, [(b"tEXt", b"Comment\0held upright")]), (12, 20)),
    ):
        (tmp_path / name).write_bytes(file)
        assert images.size(str(tmp_path / name)) == images.decode(str(tmp_path / name)).shape[:2] == wanted


def test_the_size_of_a_large_png_is_read_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8)).save(path)
    read = 0
    opened = Path.open

    def counted(self: Path, *words: str) -> io.BufferedReader:
        file = opened(self, *words, buffering=0)

        class Counted(type(file)):
            def read(self, count: int = -1) -> bytes:
                nonlocal read
                found = super().read(count)
                read += len(found)
                return found

        file.close()
        return Counted(self, "rb")

    monkeypatch.setattr(Path, "open", counted)
    assert images.size(str(path)) == (600, 900)
    assert 0 < read < 0.01 * path.stat().st_size


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animations_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(picture() // (k + 1)) for k in range(3)]
    path = tmp_path / f"moving.{suffix}"
    source = save(frames[0], path, save_all=True, append_images=frames[1:])
    assert "of 3 frames" in refused(source)
    with pytest.raises(ValueError, match="3 frames"):
        images.size(source)
    single = save(frames[0], tmp_path / f"still.{suffix}")
    assert images.decode(single).shape == (12, 20, 3)


def test_a_phones_mpo_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.fromarray(picture()), Image.fromarray(255 - picture())
    source = save(first, tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert np.abs(images.decode(source).astype(int) - picture()).mean() < 12


def test_size_reads_the_header_alone(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8))
    for suffix in ("png", "jpg", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        if suffix in ("png", "jpg"):
            path.write_bytes(path.read_bytes()[:1000])
            refused(str(path))
        assert images.size(str(path)) == (300, 200)


def test_broken_files_are_named_with_reason_and_fix(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    broken = {
        "cut.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "head.jpg": whole.getvalue()[:30],
        "empty.jpg": b"",
        "note.jpg": b"this is not an image",
        "noise.png": bytes(range(64)),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    assert "truncated" in refused(str(tmp_path / "cut.jpg"))
    assert "restore or remove it" in refused(str(tmp_path / "cut.jpg"))
    refused(str(tmp_path / "head.jpg"))
    assert "it is empty" in refused(str(tmp_path / "empty.jpg"))
    assert "it is text" in refused(str(tmp_path / "note.jpg"))
    assert "starts with 00010203" in refused(str(tmp_path / "noise.png"))
    assert "is not an image" in refused(str(tmp_path / "script.eps"))
    assert "is missing" in refused(str(tmp_path / "gone.jpg"))
    refused(str(tmp_path))


@pytest.mark.parametrize("damage", range(12))
def test_a_flipped_byte_never_escapes_as_another_error(tmp_path: Path, damage: int) -> None:
    random = np.random.default_rng(damage)
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        source = save(Image.fromarray(picture()), tmp_path / f"a.{suffix}")
        content = bytearray(Path(source).read_bytes())
        for _ in range(4):
            content[int(random.integers(len(content)))] = int(random.integers(256))
        Path(source).write_bytes(content)
        try:
            assert images.decode(source).ndim == 3
        except ValueError as error:
            assert source in str(error)  # noqa: PT017 - either outcome is right


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    for side in (10_000, 20_000):  # above Pillow's bound, and above twice that
        source = save(Image.new("1", (side, side)), tmp_path / f"bomb{side}.png")
        assert f"limit of {images.MAX_PIXELS:,}" in refused(source)
        with pytest.raises(ValueError, match="over the limit"):
            images.size(source)


def test_masks_keep_their_indices(tmp_path: Path) -> None:
    indices = np.arange(16, dtype=np.uint8).reshape(2, 8)
    grey = save(Image.fromarray(indices), tmp_path / "grey.png")
    palette = Image.fromarray(indices, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tolist())
    for source in (
        grey,
        save(palette, tmp_path / "palette.png"),
        save(palette, tmp_path / "palette4.png", bits=4),
        save(Image.fromarray(indices.astype(np.uint16)), tmp_path / "sixteen.png"),
    ):
        np.testing.assert_array_equal(images.decode_mask(source), indices)
        assert images.decode_mask(source).dtype == np.uint8
    bits = save(Image.fromarray(indices > 7), tmp_path / "bits.png")
    np.testing.assert_array_equal(images.decode_mask(bits), indices > 7)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_low_bit_depth_are_not_stretched(tmp_path: Path, bits: int) -> None:
    """Written by hand, as Pillow has no writer for grey PNGs of 2 and 4 bits."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    count = 1 << bits
    row = int("".join(f"{value:0{bits}b}" for value in range(count)), 2).to_bytes(count * bits // 8, "big")
    header = struct.pack(">IIBBBBB", count, 1, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path = tmp_path / "low.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(images.decode_mask(str(path))[0], np.arange(count))


def test_masks_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rgb\.png is a mask in RGB colours; expected one class index"):
        images.decode_mask(save(Image.fromarray(picture()), tmp_path / "rgb.png"))
    with pytest.raises(ValueError, match=r"m\.jpg is a mask in JPEG"):
        images.decode_mask(save(Image.fromarray(picture()[..., 0]), tmp_path / "m.jpg"))
    with pytest.raises(ValueError, match="mask value 300"):
        images.decode_mask(save(Image.fromarray(np.full((2, 2), 300, np.uint16)), tmp_path / "big.png"))
    values = np.array([[0, 1, 2, 255], [7, 7, 9, 2]], np.uint8)
    source = save(Image.fromarray(values), tmp_path / "values.png")
    with pytest.raises(
        ValueError, match=r"values\.png has the mask value 7 in 2 pixels \(and 1 other values\).* 0 to 6"
    ):
        images.MaskFile(source, classes=7).load()
    np.testing.assert_array_equal(images.MaskFile(source, classes=10).load(), values)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for k in range(40):
            content = io.BytesIO()
            Image.fromarray(picture() // 4 + k).save(content, "PNG")
            file.writestr(f"train/{k}.png", content.getvalue())
        file.writestr("../outside.png", content.getvalue())
    return str(path)


def read_member(source: str) -> int:
    return int(images.decode(source)[0, 0, 0])


def test_members_of_a_zip(archive: str) -> None:
    source = f"{archive}!/train/7.png"
    np.testing.assert_array_equal(images.decode(source), picture() // 4 + 7)
    assert images.size(source) == (12, 20)
    assert images.open_zip(archive) is images.open_zip(archive)
    assert "not in the archive" in refused(f"{archive}!/train/99.png")
    assert "outside its archive" in refused(f"{archive}!/../outside.png")
    with pytest.raises(ValueError, match=r"none\.zip!/a\.png cannot be read"):
        images.decode(f"{archive[:-7]}none.zip!/a.png")


def test_zips_are_read_by_threads_and_forks_at_once(archive: str) -> None:
    sources = [f"{archive}!/train/{k}.png" for k in range(40)] * 5
    expected = list(range(40)) * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_member, sources)) == expected
    if "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(read_member, sources, chunksize=3) == expected


def test_a_corrupt_zip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    path.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"bad\.zip!/a\.png cannot be read"):
        images.decode(f"{path}!/a.png")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not there")
def test_real_photos_decode_as_pillow_does() -> None:
    for path in sorted((SHARED / "bccd/JPEGImages").glob("*.jpg"))[:10]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(images.decode(str(path)), np.asarray(image.convert("RGB")))
    member = "train/bird/0338.jpg"
    with zipfile.ZipFile(SHARED / "cifar10.zip") as file, Image.open(file.open(member)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(images.decode(f"{SHARED / 'cifar10.zip'}!/{member}"), expected)

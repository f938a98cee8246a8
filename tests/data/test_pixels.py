"""Pixels of image files of every kind; expectations are computed by hand."""

import io

import numpy as np
import pytest
from PIL import Image
from raw_images import encoded, picture

from nrcg.data.pixels import UnreadableImage, decode

GREY16 = np.array([[0, 257], [514, 65535]], np.uint16)


def flat(mode: str, colour: object, **info: object) -> bytes:
    return encoded(Image.new(mode, (4, 4), colour), **info)


def palette(transparency: int | None = None) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        pytest.param(flat("RGB", (1, 2, 3)), (1, 2, 3), id="colour"),
        pytest.param(flat("L", 77), (77, 77, 77), id="grey"),
        pytest.param(flat("1", 1), (255, 255, 255), id="black and white"),
        pytest.param(palette(), (10, 200, 30), id="palette"),
        pytest.param(palette(transparency=1), (255, 255, 255), id="transparent colour of a palette"),
        pytest.param(flat("RGBA", (0, 100, 200, 0)), (255, 255, 255), id="transparent"),
        pytest.param(flat("RGBA", (0, 100, 200, 255)), (0, 100, 200), id="opaque"),
        # 51 / 255 = 0.2 of the colour, 0.8 of white
        pytest.param(flat("RGBA", (0, 100, 200, 51)), (204, 224, 244), id="a fifth opaque"),
        pytest.param(flat("LA", (100, 51)), (224, 224, 224), id="grey with alpha"),
        pytest.param(flat("I;16", 257 * 33), (33, 33, 33), id="16 bits"),
        pytest.param(encoded(Image.new("I", (4, 4), 257 * 33), "TIFF"), (33, 33, 33), id="16 bits in 32"),
        pytest.param(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF"), (0, 0, 0), id="CMYK"),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(data, colour):
    pixels = decode(data, size=4, preprocessing="squash")
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= 1  # Pillow's rounding of alpha


def test_16_bits_are_divided_by_257():
    pixels = decode(encoded(Image.fromarray(GREY16)), size=2, preprocessing="squash")
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1], [2, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    """A picture that a camera stored turned or mirrored, with the note how to turn it back."""
    upright = np.array(picture(3, 12, 8))
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    expected = Image.fromarray(upright).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(data, size=8, preprocessing="squash"), expected)


@pytest.mark.parametrize(("width", "height"), [(178, 218), (218, 178), (65, 64), (64, 64), (1, 9), (5, 700)])
def test_resizing_is_that_of_torchvision(width, height):
    from torchvision import transforms

    image = picture(1, width, height)
    for preprocessing, steps in (
        ("squash", [transforms.Resize((64, 64))]),
        ("center_crop", [transforms.CenterCrop(min(width, height)), transforms.Resize((64, 64))]),
    ):
        expected = np.asarray(transforms.Compose(steps)(image))
        np.testing.assert_array_equal(decode(encoded(image), size=64, preprocessing=preprocessing), expected)


def test_the_centre_of_celeba_is_cut_out():
    """178 x 218: rows 20 to 197 are left."""
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[20:198] = 255
    data = encoded(Image.fromarray(pixels))
    assert decode(data, size=64, preprocessing="center_crop").min() == 255
    assert decode(data, size=64, preprocessing="squash").min() == 0


@pytest.mark.parametrize(("kind", "how"), [("GIF", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_is_taken(kind, how):
    data = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], **how)
    assert decode(data.getvalue(), size=4, preprocessing="squash")[0, 0].tolist() == [255, 0, 0]


JPEG, PNG = encoded(picture(0, 178, 218), "JPEG"), encoded(picture(0, 64, 64))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is no image", "no image that Pillow knows"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:100], "(?i)truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:60] + bytes(20) + PNG[80:], "."),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "more than 16 bits"),
    ],
    ids=["empty", "text", "half a JPEG", "a JPEG's start", "half a PNG", "a PNG with a hole", "float", "32 bits"],
)
def test_what_is_no_image_is_told_in_one_line(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data, size=8, preprocessing="squash")
    assert "\n" not in str(caught.value)


def test_an_unknown_preprocessing_is_a_value_error():
    with pytest.raises(ValueError, match="squash"):
        decode(PNG, size=8, preprocessing="stretch")

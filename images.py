"""
images.py: part of stage 6, one image: from a file to a square uint8 tensor, and images to a grid.

Rotation, transparency, 10 to 16 bits, floats, animations: all becomes RGB by one rule each.

    file or bytes -> decode_image -> RGB [H,W] -> random_crop or center_crop [R,R]
                  -> to_tensor -> uint8 [3,R,R]
    images and captions -> image_grid -> one PNG

Shapes: H W sides of an image, R resolution.
Run:    not a program; python data.py --data FOLDER shows its output
Source: random resized crop and no flip, as OpenVision 1 (paper sec 4)
Next:   folders.py
"""
import contextlib
import io
import math
import textwrap
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from runtime import atomic_write

Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow refuses twice as many: 250 megapixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # editors store whole logs
WHITE_LEVELS = (1, 255, 1023, 4095, 16383, 65535)


def open_image(source):
    """A PIL image of {"bytes", "path"}; the pixels are read when they are needed."""
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"])


def white_level(source):
    """The value of white in a gray image of more than 8 bits or of floats: the smallest of
    WHITE_LEVELS that no pixel exceeds. Of others 0, unread."""
    image = open_image(source)
    if image.mode[0] not in "IF":
        return 0
    highest = np.nan_to_num(np.asarray(image), posinf=0).max()
    return next((level for level in WHITE_LEVELS if level >= highest), highest)


def decode_image(source, min_side=math.inf, white=0):
    """RGB image of a PIL image or of {"bytes", "path"}: first frame, EXIF rotation applied,
    transparency on white. Gray of more than 8 bits is scaled so that `white`, or the image's own
    white level, becomes 255. A JPEG is read at a half, quarter or eighth of its size as long as its
    sides keep `min_side` pixels, which is several times faster for phone photos."""
    image = open_image(source)
    image.draft(None, (min_side, min_side))  # only JPEG does this
    image.load()  # raises where the file is not complete
    with contextlib.suppress(Exception):  # damaged EXIF data of a good image
        ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much as decoding
    level = white_level(image)
    if level:
        values = np.asarray(image, np.float32) * (255 / (white or level))
        image = Image.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, resolution):
    """The largest centered square, resized. Cropped first: a 1x5000 image never grows huge."""
    return ImageOps.fit(image, (resolution, resolution), Image.BICUBIC)


def random_crop(image, resolution, rng, min_scale):
    """Random resized crop: min_scale..1 of the area, aspect 3:4 to 4:3; else the center crop.

    DIFFERS: OpenVision 1 takes 40-100 % of the area, as the larger presets do. At 64 pixels little
    of an object is left then, so the laptop preset takes 80-100 %. OpenVision 1 also jitters colors
    and drops them at times; here the image is its own target and captions name colors, so they
    stay. Bicubic, where OpenVision 1 is bilinear."""
    W, H = image.size
    for _ in range(10):
        area = W * H * rng.uniform(min_scale, 1)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= W and height <= H:
            left, top = rng.uniform(0, W - width), rng.uniform(0, H - height)
            box = (left, top, left + width, top + height)
            return image.resize((resolution, resolution), Image.BICUBIC, box)
    return center_crop(image, resolution)


def to_tensor(image):
    """RGB image -> uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_uint8(images):
    """float in [-1,1] (clamped) -> uint8, rounded; uint8 passes unchanged."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def image_grid(columns, captions, row_names=(), cell_size=128):
    """One column per example: its images [3,H,W], uint8 or float in [-1,1], one under another and
    the caption below, eight columns side by side. Captions are cut to six lines. The names of the
    rows stand on the first column's images."""
    step = cell_size + 4
    texts = [textwrap.wrap(caption, cell_size // 6, max_lines=6) for caption in captions]
    height = len(columns[0]) * step + 16 * max(map(len, texts))
    num_rows = math.ceil(len(columns) / 8)
    grid = Image.new("RGB", (min(8, len(columns)) * step, num_rows * height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (images, lines) in enumerate(zip(columns, texts, strict=True)):
        left, top = i % 8 * step, i // 8 * height
        for image, name in zip_longest(images, row_names if i % 8 == 0 else (), fillvalue=""):
            cell = Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
            grid.paste(cell.resize((cell_size, cell_size), Image.NEAREST), (left, top))
            draw.text((left + 3, top), name, stroke_width=2, stroke_fill="black")
            top += step
        draw.text((left, top), "\n".join(lines), fill="black", font_size=11)
    return grid


def save_image_grid(path, *args, **options):
    """image_grid(*args, **options) as a file; its ending tells the format."""
    atomic_write(path, image_grid(*args, **options).save)

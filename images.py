"""
images.py: part of stage 6, one image: from a file to a square uint8 tensor, and images to a grid.

Files hold more than 8-bit RGB: rotation, transparency, 10 to 16 bits, floats, animations. All of it
becomes RGB here by one rule each, and large JPEGs are decoded at a reduced size.

    file or bytes -> decode_image -> RGB [H,W] -> random_crop or center_crop [R,R]
                  -> to_tensor -> uint8 [3,R,R]
    images and captions -> image_grid -> one PNG

Shapes: H W sides of an image, R resolution.
Run:    not a program; python data.py --data FOLDER shows its output
Source: random resized crop over 40-100 % of the area and no flip, as OpenVision 1 (paper sec 4)
Next:   folders.py
"""
import io
import math
import textwrap
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

Image.MAX_IMAGE_PIXELS = 125_000_000  # Pillow refuses twice as many: 250 megapixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # editors store whole logs
WHITE_LEVELS = (1, 255, 1023, 4095, 16383, 65535)


def open_image(source, min_side=None):
    """A loaded image from {"bytes", "path"}; a JPEG at a half, quarter or eighth of its size as
    long as its sides keep `min_side` pixels, which is six times faster for 12 megapixels."""
    if isinstance(source, Image.Image):
        return source
    image = Image.open(io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"])
    if min_side:
        image.draft(None, (min_side, min_side))  # only JPEG does this
    image.load()
    return image


def white_level(image):
    """The value of white in a gray image of more than 8 bits or of floats: the smallest of
    WHITE_LEVELS that no pixel exceeds, at least 1023 where 16 bits are declared. Else 0."""
    if image.mode[0] not in "IF":
        return 0
    least = {"F": 1, "I": 255}.get(image.mode, 1023)
    highest = max(least, math.ceil(np.nanmax(np.asarray(image))))
    return next((level for level in WHITE_LEVELS if level >= highest), highest)


def decode_image(source, min_side=None, white=0):
    """RGB image of a PIL image or of {"bytes", "path"}: first frame, EXIF rotation applied,
    transparency on white. Gray of more than 8 bits is scaled so that `white`, or the image's own
    white level, becomes 255. Raises on anything that is no complete image."""
    image = open_image(source, min_side)
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

    DIFFERS: OpenVision 1 also jitters colors and drops them at times; here the image is its own
    target and captions name colors, so they stay. Bicubic, where OpenVision 1 is bilinear."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(min_scale, 1)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= image.width and height <= image.height:
            left = rng.uniform(0, image.width - width)
            top = rng.uniform(0, image.height - height)
            box = (left, top, left + width, top + height)
            return image.resize((resolution, resolution), Image.BICUBIC, box=box)
    return center_crop(image, resolution)


def to_tensor(image):
    """RGB image -> uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_uint8(images):
    """float in [-1,1] (clamped) -> uint8, rounded; uint8 passes unchanged."""
    if images.dtype == torch.uint8:
        return images
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_pil(image):
    """float in [-1,1] (clamped) or uint8, [3,H,W] -> RGB image."""
    return Image.fromarray(to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy())


def image_grid(columns, captions, row_names=(), cell_size=128, max_lines=5, per_row=None):
    """One column per example: its images one under another and the caption below; `per_row` columns
    side by side. Letters that the font lacks are drawn as "?"."""
    per_row = min(per_row or len(columns), len(columns))
    step, margin = cell_size + 4, 72 if row_names else 4
    height = 8 + len(columns[0]) * step + 15 * max_lines
    size = (margin + per_row * step, height * math.ceil(len(columns) / per_row))
    grid = Image.new("RGB", size, "white")
    write = partial(ImageDraw.Draw(grid).text, fill="black", font_size=12, spacing=2)
    for i, (images, caption) in enumerate(zip(columns, captions, strict=True)):
        left, top = margin + i % per_row * step, 4 + i // per_row * height
        for j, image in enumerate(images):
            grid.paste(image.resize((cell_size, cell_size), Image.NEAREST), (left, top + j * step))
        drawable = caption.encode("latin-1", "replace").decode("latin-1")
        lines = textwrap.wrap(drawable, cell_size // 6)[:max_lines]
        write((left, top + len(images) * step - 2), "\n".join(lines))
        if left == margin:
            for j, name in enumerate(row_names):
                write((6, top + j * step + cell_size // 2), name)
    return grid

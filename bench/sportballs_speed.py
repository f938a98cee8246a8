"""How much faster is `nrcg.data.sportballs.render` than pasting one rotated sprite at a time?

Both draw the same attributes on the same cores in the same run, repeat by repeat in turn. The loop is timed on a
subset and scaled per image; ours draws all images. The loop is Pillow's, as one would write it: rotate the sprite
(bicubic), resize it to the ball (Lanczos), paste it with its alpha. The sprite is twice as wide as the largest
ball, as fine as our textures. `--loop small` resizes first and rotates the small sprite: less work per image and
a blurrier ball.
"""

import argparse
import os
import statistics
import time

import numpy as np
import torch
from PIL import Image

from nrcg.data import ball_textures, sportballs

SETTING = {"classes": sportballs.CLASSES, "diameter": (0.3, 0.7)}
PIECE = 2000  # images per call, as much as the data set writer draws at once


def sprite(name: str, side: int) -> Image.Image:
    """RGBA picture of a ball, `side` pixels wide."""
    picture = Image.fromarray(ball_textures.ball(name))
    axis = (np.arange(picture.width) + 0.5) / (picture.width / 2) - 1
    picture.putalpha(Image.fromarray((255 * (np.hypot(axis, axis[:, None]) < 1)).astype(np.uint8)))
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def paste_loop(sprites: list[Image.Image], num_images: int, image_size: int, small: bool) -> float:
    """Seconds to draw images 0 .. num_images - 1, one at a time."""
    start = time.perf_counter()
    drawn = sportballs.attributes(0, np.arange(num_images), image_size=image_size, **SETTING)
    degrees = np.rad2deg(drawn.rotation)
    images = np.empty((num_images, image_size, image_size, 3), np.uint8)
    for i in range(num_images):
        side = round(drawn.diameter[i])
        ball = sprites[drawn.label[i]]
        if small:
            ball = ball.resize((side, side), Image.Resampling.LANCZOS)
            ball = ball.rotate(degrees[i], Image.Resampling.BICUBIC)
        else:
            ball = ball.rotate(degrees[i], Image.Resampling.BICUBIC)
            ball = ball.resize((side, side), Image.Resampling.LANCZOS)
        canvas = Image.new("RGB", (image_size, image_size), "white")
        canvas.paste(ball, (round(drawn.x[i] - side / 2), round(drawn.y[i] - side / 2)), ball)
        images[i] = np.asarray(canvas)
    return time.perf_counter() - start


def ours(num_images: int, image_size: int) -> float:
    """Seconds to draw images 0 .. num_images - 1, textures made anew."""
    ball_textures._master.cache_clear()
    ball_textures.texture.cache_clear()
    start = time.perf_counter()
    for s in range(0, num_images, PIECE):
        sportballs.render(0, np.arange(s, min(s + PIECE, num_images)), image_size=image_size, **SETTING)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="images that ours draws")
    parser.add_argument("--loop-images", type=int, default=1000, help="images that the loop draws")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of ours; the loop has one")
    parser.add_argument("--loop", choices=("large", "small"), default="large", help="size of sprite it rotates")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    side = round(2 * SETTING["diameter"][1] * args.image_size)
    sprites = [sprite(name, side) for name in SETTING["classes"]]
    print(
        f"{args.images} images of {args.image_size} x {args.image_size}; the loop draws {args.loop_images}"
        f" of them and is scaled per image; {args.threads} thread(s) of {os.cpu_count()} cores"
    )
    ratios = []
    for repeat in range(args.repeats):
        loop = paste_loop(sprites, args.loop_images, args.image_size, args.loop == "small")
        loop *= 1e6 / args.loop_images
        fast = ours(args.images, args.image_size) * 1e6 / args.images
        ratios.append(loop / fast)
        print(
            f"repeat {repeat + 1}: loop {loop:.1f} us/image, ours {fast:.1f} us/image"
            f" ({fast * args.images / 1e6:.2f} s in all), ratio {ratios[-1]:.1f}"
        )
    print(f"ratio: median {statistics.median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}")


if __name__ == "__main__":
    main()

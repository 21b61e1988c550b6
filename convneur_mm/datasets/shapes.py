"""Generated pictures of simple shapes on textured backgrounds.

They replace real data sets where those are not available: they take seconds to make, and cannot be solved by colour,
since only an object's outline tells its class. This module makes the pictures as arrays; ``shapes_formats`` writes them
as data sets.
"""
from __future__ import annotations

import colorsys
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

SPLITS = ('train', 'val')

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 2048
MAX_OBJECTS = 5
MAX_LARGE_OBJECTS = 6
# Size of an object relative to the side of the image.
MIN_OBJECT_SIZE, MAX_OBJECT_SIZE = 0.12, 0.55
MIN_LARGE_SIZE = 0.25
# Below this many pixels across, a star and a cross look the same, even in a small image.
MIN_OBJECT_PIXELS = 14
MIN_VISIBLE_FRACTION = 0.5
# In pixels of an image of 160 x 160; it grows with the area of the image.
MIN_VISIBLE_AREA = 60
# A separate remainder of a partly covered object is part of its mask only from this many pixels on.
MIN_FRAGMENT_AREA = 6
# Smallest colour distance (CIE 1976) between an object and its surroundings, for its main and its second colour.
MIN_CONTRAST, MIN_SECOND_CONTRAST = 38.0, 26.0
# Size of the single object in a picture for classification, large enough to be the picture's subject.
MIN_SINGLE_SIZE, MAX_SINGLE_SIZE = 0.5, 0.8


# The outlines are signed distance functions of points (x, y) relative to the centre of a shape of size 1, negative
# inside. So one function gives both the mask (sign at the pixel centre) and the smooth edge of the image (distance).
# The distances need only be exact close to the edge, so the outside of corners does not need longer formulas.
def _disk(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.5


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.43


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slanted = np.sqrt(0.75) * np.abs(x) - 0.5 * y
    return np.maximum(slanted, y) - 0.3


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tip, notch, half_sector = 0.6, 0.25, np.pi / 5
    # Folded into half a sector, the outline is a single line from a tip to the adjacent notch.
    angle = np.abs((np.arctan2(y, x) + half_sector) % (2 * half_sector) - half_sector)
    radius = np.hypot(x, y)
    along = np.array([notch * np.cos(half_sector) - tip, notch * np.sin(half_sector)])
    normal_x, normal_y = along[1] / np.hypot(*along), -along[0] / np.hypot(*along)
    return normal_x * (radius * np.cos(angle) - tip) + normal_y * radius * np.sin(angle)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.395) - 0.125


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    length, width = 0.54, 0.17
    return np.minimum(np.maximum(x - length, y - width), np.maximum(x - width, y - length))


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    'disk': _disk, 'square': _square, 'triangle': _triangle, 'star': _star, 'ring': _ring, 'cross': _cross}
# Largest distance of an outline from its centre, in units of the shape's size.
_REACH = 0.61

SHAPE_CLASSES = tuple(_OUTLINES)
"""The class names; the index in this tuple is the class index of scenes. COCO's and ADE20K's is one more."""


@dataclass(frozen=True)
class Instance:
    """An object of a :class:`Scene`.

    Attributes:
        label: Class index, into ``SHAPE_CLASSES``.
        mask: Visible pixels, bool, shape (H, W).
        visible_fraction: Ratio of the area of ``mask`` to that of the whole shape, including parts outside the image.
    """

    label: int
    mask: np.ndarray
    visible_fraction: float


@dataclass(frozen=True)
class Scene:
    """A picture and its objects.

    Attributes:
        image: RGB, uint8, shape (H, W, 3).
        instances: The objects, from back to front; their masks do not overlap.
    """

    image: np.ndarray
    instances: list[Instance]


@dataclass(frozen=True)
class _Patch:
    """A placed shape, drawn on the smallest square around it, which may extend beyond the image.

    ``distance`` is in pixels, ``x`` and ``y`` are in units of the shape's size along its own axes.
    """

    top: int
    left: int
    distance: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def crop(self, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return the part inside the image, as indices into the image and as indices into the patch."""
        spans = [(max(start, 0), min(start + length, size))
                 for start, length in zip((self.top, self.left), self.distance.shape, strict=True)]
        (top, bottom), (left, right) = spans
        return ((slice(top, bottom), slice(left, right)),
                (slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)))

    def mask(self, size: int) -> np.ndarray:
        """Return the pixels of the image that the shape covers, bool, shape (size, size)."""
        inside, of_patch = self.crop(size)
        mask = np.zeros((size, size), bool)
        mask[inside] = self.distance[of_patch] <= 0
        return _without_fragments(mask)

    @property
    def area(self) -> int:
        """Return the number of pixels of the whole shape, including those outside the image."""
        return int((self.distance <= 0).sum())


def make_scene(rng: np.random.Generator, size: int, large: bool = False) -> Scene:
    """Make a picture with one to five objects, or with three to six large ones.

    An object measures 0.12 to 0.55 of the image side, a large one at least 0.25 of it, and all at least 14 pixels.
    Later objects cover earlier ones; at least half of each object stays visible, and at least 60 pixels in an image of
    160 x 160.

    Args:
        rng: Random generator; the scene depends only on its state and the other arguments.
        size: Side of the square image, in pixels, 64 to 2048.
        large: Whether to place three to six large objects, fewer where there is no room for more.

    Returns:
        The scene, with an image of shape (size, size, 3) and masks of shape (size, size).

    Raises:
        ValueError: ``size`` is not an integer from 64 to 2048.
    """
    size = checked_int('size', size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
    min_area = MIN_VISIBLE_AREA * (size / 160) ** 2
    canvas = _background(rng, size)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    whole_areas: list[int] = []
    smallest = max((MIN_LARGE_SIZE if large else MIN_OBJECT_SIZE) * size, MIN_OBJECT_PIXELS)
    for _ in range(rng.integers(3, MAX_LARGE_OBJECTS + 1) if large else rng.integers(1, MAX_OBJECTS + 1)):
        label = int(rng.integers(len(SHAPE_CLASSES)))
        pixels = float(np.exp(rng.uniform(np.log(smallest), np.log(MAX_OBJECT_SIZE * size))))
        # Only the place is drawn again: drawing the size again would make small objects more frequent in full images.
        for _ in range(20):
            patch = _place(rng, label, pixels, size)
            shape = patch.mask(size)
            remaining = [_without_fragments(mask & ~shape) for mask in masks]
            # A view through the hole of a ring does not show an object's class, so the hole does not count.
            views = [mask & ~_filled(shape) for mask in remaining] + [shape]
            areas = whole_areas + [patch.area]
            if all(view.sum() >= max(MIN_VISIBLE_FRACTION * area, min_area)
                   for view, area in zip(views, areas, strict=True)):
                labels.append(label)
                masks, whole_areas = remaining + [shape], areas
                _paint(rng, canvas, patch, pixels)
                break
    return Scene(_developed(rng, canvas), [Instance(label, mask, float(mask.sum() / area))
                                           for label, mask, area in zip(labels, masks, whole_areas, strict=True)])


def make_single_scene(rng: np.random.Generator, size: int, label: int) -> Scene:
    """Make a picture with exactly one object, for classification.

    The object measures 0.5 to 0.8 of the image side, and at most its tips or corners lie outside the image.

    Args:
        rng: Random generator; the scene depends only on its state, ``size`` and ``label``.
        size: Side of the square image, in pixels, 64 to 2048.
        label: Class index of the object, into ``SHAPE_CLASSES``.

    Returns:
        The scene, with an image of shape (size, size, 3) and one instance with a mask of shape (size, size).

    Raises:
        ValueError: ``size`` or ``label`` is not an integer in its range.
    """
    size = checked_int('size', size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)
    label = checked_int('label', label, 0, len(SHAPE_CLASSES) - 1)
    canvas = _background(rng, size)
    pixels = float(np.exp(rng.uniform(np.log(MIN_SINGLE_SIZE * size), np.log(MAX_SINGLE_SIZE * size))))
    patch = _place(rng, label, pixels, size, margin=0.5)
    mask = patch.mask(size)
    _paint(rng, canvas, patch, pixels)
    return Scene(_developed(rng, canvas), [Instance(label, mask, float(mask.sum() / patch.area))])


def scene_at(seed: int, split: str, index: int, size: int, large: bool = False) -> Scene:
    """Make the scene at a given place of the data set, independently of the number of scenes.

    Args:
        seed: Seed of the data set, 0 to 2**32 - 1.
        split: ``'train'`` or ``'val'``.
        index: Place in the split, from 0.
        size: Side of the square image, in pixels, 64 to 2048.
        large: Whether to place more and larger objects.

    Returns:
        The scene; see :func:`make_scene`.

    Raises:
        ValueError: An argument is not one of the values above.
    """
    return make_scene(_rng_at(seed, split, index), size, large)


def single_scene_at(seed: int, split: str, index: int, size: int) -> Scene:
    """Make the scene with one object at a given place of the data set; the classes alternate.

    Args:
        seed: Seed of the data set, 0 to 2**32 - 1.
        split: ``'train'`` or ``'val'``.
        index: Place in the split, from 0; its remainder by the number of classes is the class index of the object.
        size: Side of the square image, in pixels, 64 to 2048.

    Returns:
        The scene; see :func:`make_single_scene`.

    Raises:
        ValueError: An argument is not one of the values above.
    """
    # The additional number makes these pictures differ from those of scene_at, whose backgrounds they would share.
    return make_single_scene(_rng_at(seed, split, index, 1), size, index % len(SHAPE_CLASSES))


def checked_int(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` as an int if it is an integer from ``low`` to ``high``.

    Raises:
        ValueError: It is not; the message names the argument, its range and the value.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f'{name} must be an integer from {low} to {high}, got {value!r}')
    return number


def _rng_at(seed: int, split: str, index: int, *more: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
    seed = checked_int('seed', seed, 0, 2**32 - 1)
    index = checked_int('index', index, 0, 2**32 - 1)
    return np.random.default_rng([seed, SPLITS.index(split), index, *more])


def _place(rng: np.random.Generator, label: int, pixels: float, size: int, margin: float = 0.4) -> _Patch:
    """Place a shape of ``pixels`` pixels at random, with its centre at least ``margin`` shapes from the border."""
    centre_y, centre_x = rng.uniform(margin * pixels, size - margin * pixels, 2)
    angle = rng.uniform(0, 2 * np.pi)
    reach = _REACH * pixels + 1
    top, left = int(np.floor(centre_y - reach)), int(np.floor(centre_x - reach))
    side = int(np.ceil(2 * reach)) + 1
    y = (np.arange(top, top + side)[:, None] + 0.5 - centre_y) / pixels
    x = (np.arange(left, left + side)[None, :] + 0.5 - centre_x) / pixels
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return _Patch(top, left, _OUTLINES[SHAPE_CLASSES[label]](x, y) * pixels, x, y)


def _without_fragments(mask: np.ndarray) -> np.ndarray:
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= MIN_FRAGMENT_AREA
    keep[0] = False
    return keep[components]


def _filled(mask: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def _paint(rng: np.random.Generator, canvas: np.ndarray, patch: _Patch, pixels: float) -> None:
    """Draw a shape with a soft shadow on ``canvas`` (float32 RGB from 0 to 1), in place."""
    size = len(canvas)
    inside, of_patch = patch.crop(size)
    shadow = np.zeros((size, size), np.float32)
    shadow[inside] = (0.5 - patch.distance[of_patch]).clip(0, 1)
    shift = rng.uniform(-0.05, 0.05, 2) * pixels
    shadow = cv2.warpAffine(shadow, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), (size, size))
    shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.05 * pixels, 1.0))
    canvas *= 1 - rng.uniform(0, 0.45) * shadow[..., None]

    area = canvas[inside]
    distance = patch.distance[of_patch].astype(np.float32)
    surroundings = area[np.abs(distance - 1.5) < 3]
    first, second = _object_colours(rng, surroundings)
    mix = _object_pattern(rng, patch, pixels)[of_patch].astype(np.float32)[..., None]
    colour = first + (second - first) * mix
    direction = rng.uniform(0, 2 * np.pi)
    light = np.cos(direction) * patch.x[of_patch] + np.sin(direction) * patch.y[of_patch]
    colour = colour * (1 + rng.uniform(0, 0.25) * light.astype(np.float32))[..., None]
    alpha = (0.5 - distance).clip(0, 1)[..., None]
    area += alpha * (colour.clip(0, 1) - area)


def _object_pattern(rng: np.random.Generator, patch: _Patch, pixels: float) -> np.ndarray:
    """Draw a texture over a patch, 0 for the first colour and 1 for the second."""
    kind = rng.choice(['plain', 'fade', 'stripes', 'checks', 'clouds'])
    # Marks finer than this many pixels would look like noise.
    waves = rng.uniform(2, max(min(6, pixels / 6), 2.5))
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    u = np.cos(angle) * patch.x + np.sin(angle) * patch.y
    v = np.cos(angle) * patch.y - np.sin(angle) * patch.x
    # The edge of a mark is blurred over about one pixel, whatever the size.
    sharpness = pixels / (2 * waves)
    if kind == 'plain':
        return np.zeros_like(patch.x)
    if kind == 'fade':
        return (u + 0.5).clip(0, 1)
    if kind == 'stripes':
        return 0.5 + (sharpness * np.sin(2 * np.pi * waves * u + phase) / 2).clip(-0.5, 0.5)
    if kind == 'checks':
        product = np.sin(np.pi * waves * u + phase) * np.sin(np.pi * waves * v + phase)
        return 0.5 + (sharpness * product).clip(-0.5, 0.5)
    return _clouds(rng, len(patch.x), 3)


def _object_colours(rng: np.random.Generator, surroundings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours that stand out from those in ``surroundings``, float32 RGB, shape (N, 3)."""
    around = _to_lab(surroundings)

    def contrast(colour: np.ndarray) -> float:
        # A low quantile, not the mean: an object should stand out along nearly its whole outline.
        return float(np.quantile(np.linalg.norm(around - _to_lab(colour[None]), axis=1), 0.05))

    # Objects are bright and mostly vivid, and backgrounds dull: if both could be either, a small network would spend
    # most of a short training on finding objects at all.
    candidates = [_colour(rng.uniform(), rng.uniform(0.1, 1.0) ** 0.5, rng.uniform(0.75, 1.0)) for _ in range(40)]
    contrasts = [contrast(candidate) for candidate in candidates]
    good = next((i for i, value in enumerate(contrasts) if value >= MIN_CONTRAST), int(np.argmax(contrasts)))
    first = candidates[good]
    for _ in range(20):
        second = (first * rng.uniform(0.75, 1.25) + rng.uniform(-0.15, 0.15, 3)).clip(0, 1).astype(np.float32)
        if contrast(second) >= MIN_SECOND_CONTRAST:
            return first, second
    return first, first


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a textured picture without objects, float32 RGB from 0 to 1, shape (size, size, 3)."""
    kind = rng.choice(['clouds', 'stripes', 'waves', 'checks', 'gradient'])
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    clouds = _clouds(rng, size, 5)
    waves = rng.uniform(4, 12)
    sharpness = min(size / (2 * waves), 4.0)
    if kind == 'clouds':
        pattern = clouds
    elif kind == 'stripes':
        pattern = 0.5 + (sharpness * np.sin(2 * np.pi * waves * u + phase) / 2).clip(-0.5, 0.5)
    elif kind == 'waves':
        pattern = 0.5 + 0.5 * np.sin(2 * np.pi * (waves * u + rng.uniform(1, 4) * clouds) + phase)
    elif kind == 'checks':
        # The checks are twice as fine as stripes, so that they cannot be mistaken for squares.
        product = np.sin(2 * np.pi * waves * u + phase) * np.sin(2 * np.pi * waves * v + phase)
        pattern = 0.5 + (sharpness * product / 2).clip(-0.5, 0.5)
    else:
        pattern = (u + 0.5 + 0.3 * (clouds - 0.5)).clip(0, 1)
    hue, saturation, value = rng.uniform(), rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.5)
    # The two colours are similar, so that the colour space has room for objects that stand out from both.
    first = _colour(hue, saturation, value)
    second = _colour(hue + rng.uniform(-0.12, 0.12), saturation * rng.uniform(0.5, 1.2),
                     value + rng.choice([-1, 1]) * rng.uniform(0.1, 0.2))
    canvas = first + (second - first) * pattern[..., None].astype(np.float32)
    shade = 1 + rng.uniform(0.2, 0.5) * (_clouds(rng, size, 3) - 0.5)
    return (canvas * shade[..., None].astype(np.float32)).clip(0, 1)


def _developed(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Return ``canvas`` (float32 RGB from 0 to 1, changed in place) with a sensor's noise, as uint8."""
    canvas += rng.normal(0, rng.uniform(0.004, 0.02), canvas.shape).astype(np.float32)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _clouds(rng: np.random.Generator, size: int, octaves: int) -> np.ndarray:
    """Draw smooth noise from 0 to 1, shape (size, size)."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        grid = rng.normal(size=(3 * 2**octave, 3 * 2**octave))
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = np.quantile(total, (0.01, 0.99))
    return ((total - low) / (high - low)).clip(0, 1)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return np.array(rgb, np.float32)


def _to_lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]

"""Example images, sounds and features of a Hugging Face model, in the sizes that its configs name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""The sizes of one input, and which of its axes hold for any size."""

IMAGE = (64, 80)
"""Height and width of an example image for a model that names no size: it takes any."""
SAMPLES = 4000
"""Of an example sound: more than a convolution over sounds takes in at once."""
FRAMES = 96
"""Of example features: several times what is made one position."""
CHANNELS = ("num_channels", "in_channels", "in_chans", "input_channels", "num_input_channels")
COLORS = 3
"""Channels of images where no config names them."""
FRAME_COUNTS = ("num_frames", "frames_per_clip")
"""What configs call the frames of a video."""
BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", "feature_size")
"""What configs call the size of one frame of features."""


def feature_shapes(config: Any, name: str, batch: int) -> list[Shape]:
    """The shapes that an input may have, the likeliest first; none where nothing is known of inputs of this name."""
    configs = list(_configs(config))
    if name not in _SHAPES:
        return []
    return [((batch, *sizes), (0, *axes)) for sizes, axes in _SHAPES[name](configs)]


def choices(shapes: Mapping[str, Sequence[Shape]]) -> Iterator[dict[str, Shape]]:
    """Every way to choose one shape for each input."""
    for chosen in itertools.product(*shapes.values()):
        yield dict(zip(shapes, chosen, strict=True))


def _configs(config: Any) -> Iterator[Any]:
    """A config, and those inside it: a model of images and texts has one for each."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)


def _named(configs: Sequence[Any], *names: str) -> Iterator[Any]:
    """What configs have under these names, the outermost first."""
    for config, name in itertools.product(configs, names):
        value = getattr(config, name, None)
        if value is not None:
            yield value


def _images(configs: Sequence[Any]) -> Iterator[Shape]:
    channels = next(_named(configs, *CHANNELS), COLORS)
    size = next(_named(configs, "image_size"), IMAGE)
    yield (channels, *((size, size) if isinstance(size, int) else size)), (2, 3) if size is IMAGE else ()
    # A model of videos may call its frames so, too.
    if any(_named(configs, *FRAME_COUNTS)):
        yield from _videos(configs)


def _videos(configs: Sequence[Any]) -> Iterator[Shape]:
    frames = next(_named(configs, *FRAME_COUNTS), 4)
    sizes, _ = next(_images(configs))
    yield (frames, *sizes), ()


def _sounds(configs: Sequence[Any]) -> Iterator[Shape]:
    for channels in itertools.islice(_named(configs, "audio_channels"), 1):
        yield (channels, SAMPLES), (2,)
    for frames, bins in zip(_named(configs, "max_length"), _named(configs, "num_mel_bins"), strict=False):
        if isinstance(frames, int):
            yield (frames, bins), ()
    yield (SAMPLES,), (1,)
    yield (1, SAMPLES), (2,)


def _features(configs: Sequence[Any]) -> Iterator[Shape]:
    for bins in itertools.islice(_named(configs, *BINS), 1):
        for positions in itertools.islice(_named(configs, "max_source_positions"), 1):
            # The first convolution keeps every frame, and the second every other.
            yield (bins, 2 * positions), ()
        yield (FRAMES, bins), (1,)
        yield (bins, FRAMES), (2,)


_SHAPES = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_values": _sounds,
    "input_features": _features,
}
MADE = tuple(_SHAPES)
"""The inputs that example values are made for, beside texts."""

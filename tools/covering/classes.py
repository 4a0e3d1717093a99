"""Which classes of transformers are tried: one for each model type, with the head of its main task."""

from __future__ import annotations

import dataclasses

TASKS = {
    "SPEECH_SEQ_2_SEQ": "speech to text",
    "SEQ_TO_SEQ_CAUSAL_LM": "text to text",
    "IMAGE_TEXT_TO_TEXT": "image and text to text",
    "MULTIMODAL_LM": "multimodal to text",
    "MASKED_LM": "masked text",
    "CAUSAL_LM": "text",
    "CTC": "speech to characters",
    "AUDIO_CLASSIFICATION": "audio classes",
    "IMAGE_CLASSIFICATION": "image classes",
    "VIDEO_CLASSIFICATION": "video classes",
    "OBJECT_DETECTION": "objects in images",
    "SEMANTIC_SEGMENTATION": "image segments",
    "UNIVERSAL_SEGMENTATION": "image segments",
    "DEPTH_ESTIMATION": "depth of images",
    "ZERO_SHOT_OBJECT_DETECTION": "objects in images",
    "TEXT_TO_WAVEFORM": "text to audio",
    "TEXT_TO_SPECTROGRAM": "text to audio",
    "": "base model",
}
"""Mappings of transformers from model types to classes, in the order in which they are looked through."""


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """One class, and the model type whose configuration builds it."""

    model_type: str
    name: str
    task: str


def model_classes() -> list[ModelClass]:
    """A class for each model type that has one, each class once, by model type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, ModelClass] = {}
    for mapping, task in TASKS.items():
        table = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES")
        for model_type, names in table.items():
            name = names if isinstance(names, str) else names[0]
            found.setdefault(model_type, ModelClass(model_type, name, task))
    # Several types share a class, which has the name of one of them.
    own = {one.model_type for one in found.values() if _plain(one.name).startswith(_plain(one.model_type))}
    by_name: dict[str, ModelClass] = {}
    for model_type in sorted(found, key=lambda one: (one not in own, one)):
        by_name.setdefault(found[model_type].name, found[model_type])
    return sorted(by_name.values(), key=lambda one: one.model_type)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()

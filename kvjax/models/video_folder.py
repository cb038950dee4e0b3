"""A trained video model as a folder: config.json, model.safetensors, and what generation needs."""

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

from flax import nnx

from kvjax.diffusion import Sampler
from kvjax.errors import InputError
from kvjax.models.hf_files import check_folder, read_json
from kvjax.models.video_config import VideoDiTConfig
from kvjax.models.video_dit import VideoDiT
from kvjax.models.weights import load_weights, save_weights

__all__ = ["BUILT_IN_VIDEO", "VideoModel", "load_video_model", "save_video_model"]

BUILT_IN_VIDEO = {"video-tiny": "video_tiny"}
"""Names of models that come with kvjax, and their folders beside this file."""


@dataclasses.dataclass(frozen=True)
class VideoModel:
    """A video model and how it was meant to be used.

    Attributes:
        config: its sizes.
        graph: of the `VideoDiT`, of `nnx.split`.
        params: likewise.
        sampler: how chunks are denoised.
        prefix_step: the noise level that clean frames are given before they are cached; None: none.
        data: what it was trained on: a config's fields, for those who ask.
    """

    config: VideoDiTConfig
    graph: nnx.GraphDef[Any]
    params: nnx.State[Any, Any]
    sampler: Sampler
    prefix_step: int | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_video_model(folder: Path, model: VideoModel, *, dtype: str = "float32") -> None:
    """Writes a model; `dtype` is that of the weights in the file, float32 or bfloat16."""
    fields = {
        "model_type": "kvjax_video_dit",
        "model": dataclasses.asdict(model.config),
        "sampler": dataclasses.asdict(model.sampler),
        "prefix_step": model.prefix_step,
        "data": model.data,
    }
    save_weights(folder / "model.safetensors", model.params, dtype=dtype)
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_video_model(name: str | Path, *, dtype: str = "float32") -> VideoModel:
    """A model from a folder, the folder of a finished run, or the name of a built-in one.

    Args:
        name: such as "video-tiny", or a path.
        dtype: that it computes in, float32 or bfloat16.

    Raises:
        InputError: there is no such model, or its files do not fit together.
    """
    path = _find(name)
    fields = read_json(path / "config.json")
    if fields.get("model_type") != "kvjax_video_dit":
        raise InputError(f"{path / 'config.json'}: not a video model of kvjax")
    try:
        config = VideoDiTConfig(**fields["model"] | {"dtype": dtype})
        sampler = Sampler(**fields["sampler"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path / 'config.json'}: of another version ({error})") from None
    shapes = nnx.eval_shape(lambda: VideoDiT(config, rngs=nnx.Rngs(0)))
    graph, like = nnx.split(shapes)
    params = load_weights(path / "model.safetensors", like)
    prefix_step, data = fields.get("prefix_step"), fields.get("data", {})
    return VideoModel(config, graph, params, sampler, prefix_step, data)


def _find(name: str | Path) -> Path:
    if str(name) in BUILT_IN_VIDEO:
        return Path(str(resources.files("kvjax.models") / BUILT_IN_VIDEO[str(name)]))
    path = check_folder(name) if Path(name).exists() else Path(name)
    for found in (path, path / "model"):
        if (found / "config.json").exists():
            return found
    raise InputError(
        f"{name}: no video model there; give its folder, that of a finished run of kvjax train "
        f"video, or a built-in one ({', '.join(BUILT_IN_VIDEO)})"
    )

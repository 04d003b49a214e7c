"""Read, write and check model folders of open_clip (config, weights, tokenizer) without running code from them.

This file is shipped inside exported models: it needs torch, open_clip and safetensors only.
"""

import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

try:  # transformers checks imports outside of `try`, and would suggest `pip install open_clip`, another package
    import open_clip
    from open_clip.tokenizer import HFTokenizer
except ModuleNotFoundError as missing:
    raise ImportError("the model needs open_clip: pip install open_clip_torch") from missing

OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
OPEN_CLIP_WEIGHTS_NAME = "open_clip_model.safetensors"
TEXT_TOWER = "text_tower"  # subfolder with the config of a Hugging Face text tower
DIFFERENCE_NAME = "difference.safetensors"  # open_clip finds this file too, and reports the missing weights
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
DEFAULT_CONTEXT_LENGTH = 77
# Whatever open_clip's defaults are: no pickled code, and no weights of towers that nobody asked for.
SAFE_OPTIONS = {
    "precision": "fp32", "output_dict": True, "weights_only": True, "pretrained_text": False, "pretrained_image": False
}  # fmt: skip

# What a model may ask of its tokenizer. `trust_remote_code`, above all, is not allowed.
TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
TOKENIZER_CONFIG_NAMES = ("tokenizer_config.json", "config.json")
UNSAFE_WEIGHTS = "{} holds more than tensors and plain values, and loading it could run code; save only its state_dict"
LARGEST = {"layers": 512, "context_length": 1 << 20, "image_size": 1 << 14, "vocab_size": 1 << 24}
LARGEST_WIDTH = 1 << 17  # of any other number in a config


def check_model_cfg(model_cfg: Any) -> None:
    """Validate a model config; raise ValueError, naming the key, for remote code or oversized values."""
    parts = [model_cfg]
    if isinstance(model_cfg, dict):
        parts += [model_cfg.get(name) for name in ("vision_cfg", "text_cfg")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("model_cfg is not an object with vision_cfg and text_cfg")
    if type(model_cfg.get("embed_dim")) is not int:
        raise ValueError(f"embed_dim is {model_cfg.get('embed_dim')!r}, not a number of dimensions")
    options = model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not set(options) <= set(TOKENIZER_OPTIONS):
        raise ValueError(f"tokenizer_kwargs is {options!r}; it may set {', '.join(TOKENIZER_OPTIONS)}")
    parts += [value for part in parts for value in part.values() if isinstance(value, dict)]
    for name, value in (item for part in parts for item in part.items()):
        limit = LARGEST.get(name, LARGEST_WIDTH)
        for number in value if isinstance(value, list) else [value]:
            # `not <=` rather than `>`, so that NaN is refused as well.
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise ValueError(f"{name} is {number!r}; it may be at most {limit}")


def check_model_folder(folder: Path, base: nn.Module | None = None) -> None:
    """Validate an open_clip folder before anything in it is loaded.

    `base` is the model that provides the weights missing in a difference file.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.
        ValueError: if its config is refused, its tokenizer brings code, or its model is larger than its weights.
    """
    config = read_object(folder / OPEN_CLIP_CONFIG_NAME)
    check_model_cfg(config.get("model_cfg"))
    if not isinstance(config.get("preprocess_cfg", {}), dict):
        raise ValueError("preprocess_cfg is not an object")
    for name in (*TOKENIZER_CONFIG_NAMES, f"{TEXT_TOWER}/config.json"):
        if (folder / name).is_file() and "auto_map" in read_object(folder / name):
            raise ValueError(f"{name} asks to run code that comes with the model (auto_map), which is not done")
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    for path in weights:
        check_weights(path)
    if not weights:
        return
    options = {"load_weights": False, "pretrained_text": False, **text_tower_options(folder, config["model_cfg"])}
    # The meta device counts the parameters without allocating them.
    with torch.device("meta"), torch.random.fork_rng(devices=[]), without_warnings():
        model = open_clip.create_model(f"local-dir:{folder}", device="meta", **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = max(path.stat().st_size for path in weights)
    base_bytes = 0 if base is None else sum(tensor.nbytes for tensor in base.state_dict().values())
    if parameters > size + base_bytes:  # a weight has at least one byte
        raise ValueError(f"its config describes {parameters} parameters, but its weights have {size} bytes")


def text_tower_options(folder: Path, model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of `open_clip.create_model` that builds a Hugging Face text tower from the config in `folder`.

    Without it, open_clip would look for the model that the tower was once made from, in a folder or on the Hub.
    """
    if not (folder / TEXT_TOWER / "config.json").is_file():
        return {}
    own = {"hf_model_name": str(folder / TEXT_TOWER), "hf_model_pretrained": False}
    return {"text_cfg": {**model_cfg["text_cfg"], **own}}


def check_weights(path: Path) -> None:
    """Raise ValueError for a compressed archive, which would expand to more than its size on disk."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{path.name} is a compressed archive, which torch.save does not write")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence warnings, such as open_clip's about a model without weights where none are wanted."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line: at most about 400 characters, of its beginning and its end.

    torch lists the missing weights first, and the unexpected ones last.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise ValueError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def make_tokenizer(model_cfg: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Create the tokenizer of an open_clip model config; a Hugging Face one may be downloaded."""
    text_cfg = model_cfg["text_cfg"]
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=context_length, **options)  # type: ignore[no-any-return]
    options = {**options, "context_length": context_length, "tokenizer_mode": text_cfg.get("tokenizer_mode")}
    return HFTokenizer(text_cfg["hf_tokenizer_name"], **options)  # type: ignore[no-any-return]


def write_open_clip_folder(
    folder: Path,
    model: nn.Module,
    *,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tokenizer: Callable[..., Tensor],
    base: nn.Module | None = None,
) -> None:
    """Write a folder that `open_clip.create_model_and_transforms('local-dir:...')` loads without a network.

    With a `base`, only the weights that differ from it are written; such a folder needs `read_open_clip_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    config_path = folder / OPEN_CLIP_CONFIG_NAME
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor  # safetensors refuses shared memory
        seen.add(memory)
    weights_path = folder / (OPEN_CLIP_WEIGHTS_NAME if base is None else DIFFERENCE_NAME)
    if base is not None:
        base_state = base.state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if not is_equal(tensor, base_state.get(name))}
    save_file(tensors, weights_path)
    weights_path.chmod(config_path.stat().st_mode)  # safetensors writes 0600 whatever the umask
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]
    if model_cfg["text_cfg"].get("hf_model_name"):
        model.text.config.save_pretrained(folder / TEXT_TOWER)  # type: ignore[union-attr,operator]


def is_equal(tensor: Tensor | None, other: Tensor | None) -> bool:
    """Return whether both are tensors of the same type, shape and values."""
    if tensor is None or other is None or tensor.dtype != other.dtype:
        return False
    return torch.equal(tensor, other.to(tensor.device))


def read_open_clip_folder(
    folder: Path, base: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load the float32 model of an open_clip folder with its `model_cfg` and `preprocess_cfg`.

    Raises:
        FileNotFoundError, ValueError: see `check_model_folder`.
        RuntimeError: if weights are missing or do not fit.
    """
    check_model_folder(folder, base)
    config = read_object(folder / OPEN_CLIP_CONFIG_NAME)
    if "size" not in config.get("preprocess_cfg", {}):
        raise ValueError(f"preprocess_cfg of {OPEN_CLIP_CONFIG_NAME} has no size")
    quiet = nullcontext() if base is None else without_warnings()
    try:
        options: dict[str, Any] = {"require_pretrained": base is None, "load_weights": base is None}
        options |= text_tower_options(folder, config["model_cfg"])
        with torch.random.fork_rng(devices=[]), quiet:  # open_clip draws random weights before it loads any
            model = open_clip.create_model(f"local-dir:{folder}", **SAFE_OPTIONS, **options)
    except pickle.UnpicklingError as error:  # torch's own message suggests to load it anyway
        raise ValueError(UNSAFE_WEIGHTS.format(folder)) from error
    if base is not None:
        shared = {name: tensor for name, tensor in base.state_dict().items() if name in model.state_dict()}
        model.load_state_dict({**shared, **load_file(folder / DIFFERENCE_NAME)})
    return model, config["model_cfg"], config["preprocess_cfg"]

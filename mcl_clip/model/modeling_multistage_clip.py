"""The multistage CLIP model for transformers: `AutoModel.from_pretrained(..., trust_remote_code=True)`.

Weights stay in the open_clip folders of the stages; loading and saving go through `MultistageCLIP`. This file is
shipped inside exported models: it needs torch, transformers and open_clip, and the files shipped beside it.
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

# Imported first: it says what to install if open_clip is missing.
from .processing_multistage_clip import IS_BEFORE_5, PROCESSING_AUTO_MAP, MultistageCLIPImageProcessor

# isort: split
# transformers before 5 copies the files that this one imports, no others
from .image_model import ImageModel  # noqa: F401
from .image_transform import to_rgb  # noqa: F401
from .multistage import COMBINATIONS, CONFIG_NAME, WEIGHTED, MultistageCLIP, normalized, read_config
from .open_clip_io import DEFAULT_CONTEXT_LENGTH, one_line

MODEL_TYPE = "multistage_clip"
AUTO_MAP = {
    "AutoConfig": "modeling_multistage_clip.MultistageCLIPConfig",
    "AutoModel": "modeling_multistage_clip.MultistageCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_multistage_clip.MultistageCLIPModel",
    **PROCESSING_AUTO_MAP,
}
CODE_FILES = (
    "modeling_multistage_clip.py",
    "processing_multistage_clip.py",
    "multistage.py",
    "image_model.py",
    "open_clip_io.py",
    "image_transform.py",
)
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")  # of huggingface_hub
# Options that transformers passes on its own, and options without a meaning for safetensors files.
IGNORED_OPTIONS = ("adapter_kwargs", "low_cpu_mem_usage", "max_shard_size", "trust_remote_code", "use_safetensors")
AUTOMATIC_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


class MultistageCLIPConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a multistage CLIP model. Weights and open_clip configs are in the folders of the stages.

    `projection_dim` is the sum of `embed_dims`, the feature dimensions of the stages; `context_length` counts tokens,
    `image_size` is (height, width) in pixels; `combine` is `concat`, `mean_cosine` or,
    where the model has weights of its stages, `weighted`: see `join_features`.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        num_stages: int = 1,
        embed_dims: Collection[int] = (512,),
        projection_dim: int = 512,
        context_length: int = DEFAULT_CONTEXT_LENGTH,
        image_size: Collection[int] = (224, 224),
        combine: str = "concat",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_stages = num_stages
        self.embed_dims = list(embed_dims)
        self.projection_dim = projection_dim
        self.context_length = context_length
        self.image_size = list(image_size)
        self.combine = combine


@dataclass
class MultistageCLIPOutput(ModelOutput):
    """Output of the model, with the field names of `CLIPModel`. The embeddings have unit length."""

    loss: Tensor | None = None  # only with `return_loss`
    logits_per_image: Tensor | None = None  # [images, texts]
    logits_per_text: Tensor | None = None  # [texts, images]
    text_embeds: Tensor | None = None  # [texts, dim]
    image_embeds: Tensor | None = None  # [images, dim]


class MultistageCLIPModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A multistage CLIP model with the interface of `CLIPModel`; created by `from_pretrained`.

    Raises:
        ValueError: without `multistage`, since the config does not describe the encoders.
    """

    config_class = MultistageCLIPConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: MultistageCLIPConfig, multistage: MultistageCLIP | None = None):
        super().__init__(config)
        if multistage is None:
            raise ValueError(
                "a multistage CLIP model cannot be created from its config alone; use from_pretrained(folder)"
            )
        self.multistage = multistage
        self.is_compact = False
        self.post_init()  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Do nothing: all weights are loaded."""

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, like `init_weights`."""

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on the cosine."""
        return self.multistage.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Bias of the logits, or None."""
        return self.multistage.logit_bias

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: MultistageCLIPConfig | None = None,
        subfolder: str = "",
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "MultistageCLIPModel":
        """Load a model from a folder or the Hub, in eval mode, and in float32 unless `dtype` is given.

        `config` may override `combine` of the stored model; all other values must agree with the weights. `device_map`
        names one device for the whole model; `auto` is the accelerator if there is one, else the CPU. `revision`,
        `cache_dir`, `force_download`, `local_files_only` and `token` are those of huggingface_hub.

        Raises:
            OSError: if there is no such model, or it cannot be downloaded.
            ValueError: if it is damaged, or an option has an invalid value.
            TypeError: for an unknown option.
        """
        hub = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}
        _refuse_unknown("from_pretrained", kwargs)
        torch_type = _parse_dtype(dtype if dtype is not None else torch_dtype)
        device = _parse_device_map(device_map)
        name = str(pretrained_model_name_or_path)
        folder = Path(name) / subfolder if Path(name).is_dir() else _download(name, subfolder, hub)
        try:
            multistage = MultistageCLIP.load(folder)
            is_compact = bool(read_config(folder).get("compact"))
        except FileNotFoundError as error:
            raise OSError(f"{name} is not a complete multistage CLIP model: {one_line(error)}") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is damaged: {one_line(error)}") from error
        model: Any = cls(_check_config(config, multistage, name), multistage)
        model.is_compact = is_compact
        model.name_or_path = model.config.name_or_path = name
        if device_map is not None:
            model.hf_device_map = {"": device}  # otherwise a pipeline would choose another device
        if IS_BEFORE_5:
            # Older pipelines find tokenizer and image processor through the config class, not through the folder.
            own_tokenizer = getattr(multistage.tokenizer, "tokenizer", None)
            model.config.tokenizer_class = "CLIPTokenizer" if own_tokenizer is None else type(own_tokenizer).__name__
            processor = MultistageCLIPImageProcessor
            AutoImageProcessor.register(type(model.config), slow_image_processor_class=processor, exist_ok=True)
        loaded: MultistageCLIPModel = model.to(device=device, dtype=torch_type).eval()
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write stages, config and code for `from_pretrained`; the processor has its own `save_pretrained`."""
        _refuse_unknown("save_pretrained", kwargs)
        if is_main_process:
            folder = Path(save_directory)
            self.multistage.save(folder, compact=self.is_compact)
            write_config_and_code(folder, self.multistage)

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """Encode images to unnormalized features, [images, dim].

        As in `CLIPModel`, the features are returned as a tensor before transformers 5, as `pooler_output` since then.

        Raises:
            ValueError: if the images do not have the size of the model's input.
        """
        features = self._encode_images(pixel_values)
        return features if IS_BEFORE_5 else BaseModelOutputWithPooling(pooler_output=features)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode texts to unnormalized features, [texts, dim], returned as by `get_image_features`.

        Tokens are truncated or padded to the model's context length; tokens masked by `attention_mask` are ignored.
        """
        features = self._encode_texts(input_ids, attention_mask)
        return features if IS_BEFORE_5 else BaseModelOutputWithPooling(pooler_output=features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return unit features and, given both images and texts, their scores: `MultistageCLIPOutput` or a tuple.

        With `return_loss`, the i-th image is paired with the i-th text; the loss is CLIP's softmax loss, or SigLIP's
        sigmoid loss if the model has a `logit_bias`.

        Raises:
            ValueError: if there are neither images nor texts, or `return_loss` is given without pairs.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("there is nothing to encode; give pixel_values, input_ids or both")
        image = None if pixel_values is None else normalized(self._encode_images(pixel_values))
        text = None if input_ids is None else normalized(self._encode_texts(input_ids, attention_mask))
        logits = None
        if image is not None and text is not None:
            logits = self.logit_scale.exp() * image @ text.T
            logits = logits if self.logit_bias is None else logits + self.logit_bias
        output = MultistageCLIPOutput(
            loss=self._loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.T,
            text_embeds=text,
            image_embeds=image,
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _encode_images(self, pixel_values: Tensor) -> Tensor:
        size, expected = pixel_values.shape[-2:], self.config.image_size
        if list(size) != list(expected):
            height, width = expected
            raise ValueError(f"the images have {size[0]} x {size[1]} pixels; the model takes {height} x {width}")
        return self.multistage.encode_image(pixel_values.to(device=self.device, dtype=self.dtype))

    def _encode_texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = fit_tokens(input_ids, attention_mask, self.multistage.context_length, self.multistage.tokenizer)
        return self.multistage.encode_text(tokens.to(self.device))

    def _loss(self, logits: Tensor | None) -> Tensor:
        if logits is None or logits.shape[0] != logits.shape[1]:
            raise ValueError("return_loss needs as many images as texts, in pairs")
        if self.logit_bias is not None:
            signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
            return -F.logsigmoid(signs * logits).sum(1).mean()
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def fit_tokens(input_ids: Tensor, attention_mask: Tensor | None, context_length: int, tokenizer: Any) -> Tensor:
    """Truncate and pad tokens to [texts, context_length] exactly as open_clip's `tokenizer` does.

    Truncated texts keep their end token as the last one; short texts get the padding of open_clip's tokenizer.
    Tokens are used where `attention_mask` is 1; without a mask, up to the first end token.
    """
    hugging_face: Any = getattr(tokenizer, "tokenizer", None)
    if hugging_face is None:
        padding, ends = 0, [tokenizer.eot_token_id]
    else:
        padding = hugging_face.pad_token_id or 0
        ends = [number for number in (hugging_face.eos_token_id, hugging_face.sep_token_id) if number is not None]
    is_end = torch.isin(input_ids, torch.tensor(ends, dtype=input_ids.dtype, device=input_ids.device))
    if attention_mask is None:
        after_start = is_end.clone()
        after_start[:, :1] = False  # some tokenizers start texts with their end token
        is_used = after_start.cumsum(1) - after_start.long() == 0
    else:
        is_used = attention_mask.bool()
    order = (~is_used).long().argsort(dim=1, stable=True)  # moves padding from the left to the right
    tokens, is_end, lengths = input_ids.gather(1, order), is_end.gather(1, order), is_used.sum(1)
    last = (lengths - 1).clamp(min=0)[:, None]
    is_truncated = (lengths[:, None] > context_length) & is_end.gather(1, last)
    end = tokens.gather(1, last)
    tokens = F.pad(tokens, (0, max(0, context_length - tokens.shape[1])))[:, :context_length]
    tokens = torch.cat([tokens[:, :-1], torch.where(is_truncated, end, tokens[:, -1:])], dim=1)
    is_padding = torch.arange(context_length, device=tokens.device) >= lengths[:, None]
    tokens = tokens.masked_fill(is_padding, padding)
    if getattr(tokenizer, "strip_sep_token", False):
        tokens = tokens.masked_fill(tokens == hugging_face.sep_token_id, 0)
    return tokens


def config_of(multistage: MultistageCLIP) -> MultistageCLIPConfig:
    """Create the transformers config of a model."""
    size = multistage.preprocess_cfg["size"]
    return MultistageCLIPConfig(
        num_stages=len(multistage.stages),
        embed_dims=multistage.embed_dims,
        projection_dim=sum(multistage.embed_dims),
        context_length=multistage.context_length,
        image_size=[size, size] if isinstance(size, int) else size,
        combine=multistage.combine,
        architectures=[MultistageCLIPModel.__name__],
    )


def write_config_and_code(folder: Path, multistage: MultistageCLIP) -> None:
    """Write config.json and the code files, which `AutoConfig` and `AutoModel` need beside the stages."""
    config = config_of(multistage)
    config.auto_map = dict(AUTO_MAP)
    # AutoTokenizer without `trust_remote_code` warns unless it finds an entry with the type of a base config.
    config.base_config = {"model_type": ""}
    config.to_json_file(folder / "config.json")
    package = Path(__file__).parent
    for name in CODE_FILES:
        if (package / name).resolve() != (folder / name).resolve():
            shutil.copyfile(package / name, folder / name)


def _check_config(config: MultistageCLIPConfig | None, multistage: MultistageCLIP, name: str) -> MultistageCLIPConfig:
    """Return the model's config, or check `config` against the weights and apply its `combine` to the model."""
    actual = config_of(multistage)
    if config is None:
        return actual
    for key in ("num_stages", "embed_dims", "projection_dim", "context_length", "image_size"):
        value, expected = getattr(config, key, None), getattr(actual, key)
        if value != expected:
            raise ValueError(
                f"the config has {key}={value!r}, the weights of {name} have {expected!r}; correct the config"
            )
    known = COMBINATIONS if multistage.weights is None else (*COMBINATIONS, WEIGHTED)
    if config.combine not in known:
        raise ValueError(f"combine={config.combine!r} is not one of {', '.join(known)}")
    multistage.combine = config.combine
    return config


def _download(name: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """Download a multistage model with its stages and return its folder in the cache."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        folder = Path(hf_hub_download(name, f"{prefix}{CONFIG_NAME}", **hub)).parent
        patterns = [f"{prefix}{stage}/*" for stage in read_config(folder)["stages"]]
        return Path(snapshot_download(name, allow_patterns=patterns, **hub)) / subfolder
    except (OSError, ValueError) as error:
        raise OSError(f"{name} is not a folder, and cannot be loaded from the Hub: {one_line(error)}") from error


def _refuse_unknown(method: str, options: dict[str, Any]) -> None:
    unknown = [name for name in options if name not in IGNORED_OPTIONS and not name.startswith("_")]
    if unknown:
        raise TypeError(f"{method} of a multistage CLIP model has no option {', '.join(unknown)}; leave it out")


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.float32
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype; use float32, bfloat16 or float16")
    return parsed


def _parse_device_map(device_map: Any) -> torch.device:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1:
        raise ValueError(f"device_map={device_map!r} names several devices; a multistage CLIP model takes one")
    device = devices.pop()
    if device in AUTOMATIC_DEVICES:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu" if device is None else device)

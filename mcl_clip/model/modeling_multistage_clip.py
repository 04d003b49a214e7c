"""A multistage CLIP model as a model of transformers: `AutoModel.from_pretrained(..., trust_remote_code=True)`.

The weights stay where they are, in the stages' open_clip folders: loading and saving go through `MultistageCLIP`. This
file is shipped inside exported models: it needs torch, transformers and open_clip, and the files shipped beside it.
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

# First, as it says what to install where open_clip is missing.
from .processing_multistage_clip import IS_BEFORE_5, PROCESSING_AUTO_MAP, MultistageCLIPImageProcessor

# isort: split
from .multistage import COMBINATIONS, CONFIG_NAME, MultistageCLIP, normalized, read_config
from .open_clip_io import DEFAULT_CONTEXT_LENGTH

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
    "open_clip_io.py",
)
# What transformers hands over on its own, and what has no meaning for files that are safetensors anyway.
WITHOUT_EFFECT = ("adapter_kwargs", "low_cpu_mem_usage", "max_shard_size", "trust_remote_code", "use_safetensors")
AUTOMATIC_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")


class MultistageCLIPConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """What a multistage CLIP model is; the weights and open_clip's settings stand in the folders of the stages.

    Args:
        num_stages: number of stages.
        embed_dims: dimensions of each stage's features.
        projection_dim: dimensions of the model's features, the sum of `embed_dims`.
        context_length: tokens of a text, with start and end.
        image_size: height and width in pixels.
        combine: how the features of the stages become one, `concat` or `mean_cosine`.
        kwargs: what transformers writes down beside them.
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
    """What the model says of images and texts, under the names of `CLIPModel`.

    Attributes:
        loss: with `return_loss`, see `MultistageCLIPModel.forward`.
        logits_per_image: scores, [images, texts].
        logits_per_text: the same, [texts, images].
        text_embeds: features of unit length, [texts, dimensions].
        image_embeds: features of unit length, [images, dimensions].
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class MultistageCLIPModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The stages of a multistage model as one CLIP model, made by `from_pretrained`.

    Args:
        config: the description of `multistage`.
        multistage: the model itself, afterwards `model.multistage`.

    Raises:
        ValueError: without `multistage`: there are no settings to make random weights from.
    """

    config_class = MultistageCLIPConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: MultistageCLIPConfig, multistage: MultistageCLIP | None = None):
        super().__init__(config)
        if multistage is None:
            raise ValueError("a multistage CLIP model is not made from its config alone; use from_pretrained(folder)")
        self.multistage = multistage
        self.is_compact = False
        self.post_init()  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Nothing: there are no weights here but those that were loaded."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing, as `init_weights`."""

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor on the cosine."""
        return self.multistage.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the logits, if anything."""
        return self.multistage.logit_bias

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: MultistageCLIPConfig | None = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "MultistageCLIPModel":
        """The model in a folder or on the Hub, in eval mode.

        Args:
            pretrained_model_name_or_path: the folder, or the model's name on the Hub.
            config: replaces the combination that is stored with the model, if its own is another.
            revision: branch, tag or commit on the Hub.
            subfolder: where in the folder or repository the model is.
            cache_dir: where downloads are kept.
            force_download: whether to fetch again what is there.
            local_files_only: whether to do without a network.
            token: for private models.
            dtype: float32 unless given.
            torch_dtype: the older name of `dtype`.
            device_map: one device for the whole model; `auto` takes the accelerator, where there is one.
            kwargs: some options of transformers that make no difference here; others are refused.

        Raises:
            OSError: if there is no such model, or it cannot be fetched.
            ValueError: if it is damaged, or an option has an impossible value.
            TypeError: for an unknown option.
        """
        _refuse_unknown("from_pretrained", kwargs)
        wanted = _floating_type(dtype if dtype is not None else torch_dtype)
        device = _one_device(device_map)
        name = str(pretrained_model_name_or_path)
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        folder = Path(name) / subfolder if Path(name).is_dir() else _fetch(name, subfolder, hub)
        try:
            multistage = MultistageCLIP.load(folder)
            is_compact = bool(read_config(folder).get("compact"))
        except FileNotFoundError as error:
            raise OSError(f"{name} is not a whole multistage CLIP model: {_sentence(error)}") from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is damaged: {_sentence(error)}") from error
        model: Any = cls(_checked_config(config, multistage, name), multistage)
        model.is_compact = is_compact
        model.name_or_path = model.config.name_or_path = name
        if device_map is not None:
            model.hf_device_map = {"": device}  # else a pipeline would choose another one
        if IS_BEFORE_5:
            _register_for_pipelines(model)
        loaded: MultistageCLIPModel = model.to(device=device, dtype=wanted).eval()
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write a folder that `from_pretrained` loads: stages, config and code; its processor is saved apart.

        Raises:
            TypeError: for an unknown option.
        """
        _refuse_unknown("save_pretrained", kwargs)
        if is_main_process:
            folder = Path(save_directory)
            self.multistage.save(folder, compact=self.is_compact)
            write_config_and_code(folder, self.multistage)

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """Un-normalised features of images, [images, dimensions].

        Before transformers 5 a tensor, since then in `pooler_output`, as `CLIPModel` has it.

        Raises:
            ValueError: if the images have another size than the model's.
        """
        return _as_clip_does(self._encode_images(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Un-normalised features of texts, [texts, dimensions].

        Tokens are cut or filled up to the model's context length; what `attention_mask` leaves out is not read.
        Returned as by `get_image_features`.
        """
        return _as_clip_does(self._encode_texts(input_ids, attention_mask))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Unit features and, of images and texts together, their scores: `MultistageCLIPOutput`, or a tuple.

        With `return_loss`, the i-th image belongs to the i-th text; the loss is CLIP's softmax loss, or SigLIP's
        sigmoid loss where the model has a `logit_bias`.

        Raises:
            ValueError: if there are neither images nor texts, or `return_loss` lacks pairs.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("there is nothing to encode; give pixel_values, input_ids or both")
        image = None if pixel_values is None else normalized(self._encode_images(pixel_values))
        text = None if input_ids is None else normalized(self._encode_texts(input_ids, attention_mask))
        logits = None if image is None or text is None else self._logits(image, text)
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
        size, expected = tuple(pixel_values.shape[-2:]), tuple(self.config.image_size)
        if size != expected:
            raise ValueError(
                f"the images have {size[0]} x {size[1]} pixels; the model takes {expected[0]} x {expected[1]}"
            )
        return self.multistage.encode_image(pixel_values.to(device=self.device, dtype=self.dtype))

    def _encode_texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = fit_tokens(input_ids, attention_mask, self.multistage.context_length, self.multistage.tokenizer)
        return self.multistage.encode_text(tokens.to(self.device))

    def _logits(self, image: Tensor, text: Tensor) -> Tensor:
        logits = self.logit_scale.exp() * image @ text.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def _loss(self, logits: Tensor | None) -> Tensor:
        if logits is None or logits.shape[0] != logits.shape[1]:
            raise ValueError("return_loss needs as many images as texts, in pairs")
        if self.logit_bias is not None:
            signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
            return -F.logsigmoid(signs * logits).sum(1).mean()
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def fit_tokens(input_ids: Tensor, attention_mask: Tensor | None, context_length: int, tokenizer: Any) -> Tensor:
    """The tokens of texts as open_clip's `tokenizer` makes them, [texts, context_length].

    Texts that are too long keep their end token, which comes last then; others are filled up with what the tokenizer
    of open_clip fills up with. Tokens count where `attention_mask` is 1; without it, up to the first end token.
    """
    hugging_face: Any = getattr(tokenizer, "tokenizer", None)
    if hugging_face is None:
        filler, ends = 0, [tokenizer.eot_token_id]
    else:
        filler = hugging_face.pad_token_id or 0
        ends = [number for number in (hugging_face.eos_token_id, hugging_face.sep_token_id) if number is not None]
    is_end = torch.isin(input_ids, torch.tensor(ends, dtype=input_ids.dtype, device=input_ids.device))
    if attention_mask is None:
        after_start = is_end.clone()
        after_start[:, :1] = False  # some tokenizers start texts with their end token
        counts = after_start.cumsum(1) - after_start.long() == 0
    else:
        counts = attention_mask.bool()
    order = (~counts).long().argsort(dim=1, stable=True)  # also where the fillers come first
    tokens, is_end, lengths = input_ids.gather(1, order), is_end.gather(1, order), counts.sum(1)
    last = (lengths - 1).clamp(min=0)[:, None]
    too_long = (lengths[:, None] > context_length) & is_end.gather(1, last)
    end = tokens.gather(1, last)
    tokens = F.pad(tokens, (0, max(0, context_length - tokens.shape[1])))[:, :context_length]
    tokens = torch.cat([tokens[:, :-1], torch.where(too_long, end, tokens[:, -1:])], dim=1)
    beyond = torch.arange(context_length, device=tokens.device) >= lengths[:, None]
    tokens = tokens.masked_fill(beyond, filler)
    if getattr(tokenizer, "strip_sep_token", False):
        tokens = tokens.masked_fill(tokens == hugging_face.sep_token_id, 0)
    return tokens


def _register_for_pipelines(model: MultistageCLIPModel) -> None:
    """Let pipelines before transformers 5 load tokenizer and image processor, which they do not look for in folders."""
    own = getattr(model.multistage.tokenizer, "tokenizer", None)
    model.config.tokenizer_class = "CLIPTokenizer" if own is None else type(own).__name__
    image_processor = MultistageCLIPImageProcessor
    AutoImageProcessor.register(type(model.config), slow_image_processor_class=image_processor, exist_ok=True)


def config_of(multistage: MultistageCLIP) -> MultistageCLIPConfig:
    """The description of a model."""
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
    """Write what `AutoConfig` and `AutoModel` need beside the stages: config.json and the code."""
    config = config_of(multistage)
    config.auto_map = dict(AUTO_MAP)
    config.to_json_file(folder / "config.json")
    here = Path(__file__).parent
    for name in CODE_FILES:
        if (here / name).resolve() != (folder / name).resolve():
            shutil.copyfile(here / name, folder / name)


def _checked_config(config: MultistageCLIPConfig | None, multistage: MultistageCLIP, name: str) -> MultistageCLIPConfig:
    """`config`, whose combination the model takes over, or the model's own."""
    own = config_of(multistage)
    if config is None:
        return own
    for key in ("num_stages", "embed_dims", "projection_dim", "context_length", "image_size"):
        said, found = getattr(config, key, None), getattr(own, key)
        if said != found:
            raise ValueError(
                f"the config says {key}={said!r}, the weights of {name} have {found!r}; correct the config"
            )
    if config.combine not in COMBINATIONS:
        raise ValueError(f"combine={config.combine!r} is not one of {', '.join(COMBINATIONS)}")
    multistage.combine = config.combine
    return config


def _fetch(name: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """The local folder of a model on the Hub, with its stages."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        folder = Path(hf_hub_download(name, f"{prefix}{CONFIG_NAME}", **hub)).parent
        patterns = [f"{prefix}{stage}/*" for stage in read_config(folder)["stages"]]
        return Path(snapshot_download(name, allow_patterns=patterns, **hub)) / subfolder
    except (OSError, ValueError) as error:
        raise OSError(f"{name} is no folder, and cannot be fetched from the Hub: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _refuse_unknown(method: str, options: dict[str, Any]) -> None:
    unknown = [name for name in options if name not in WITHOUT_EFFECT and not name.startswith("_")]
    if unknown:
        raise TypeError(f"{method} of a multistage CLIP model has no option {', '.join(unknown)}; leave it out")


def _floating_type(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no type of floating-point numbers; use float32, bfloat16 or float16")
    return found


def _one_device(device_map: Any) -> torch.device:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1:
        raise ValueError(f"device_map={device_map!r} names several devices; a multistage CLIP model takes one")
    device = devices.pop()
    if device in AUTOMATIC_DEVICES:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu" if device is None else device)


def _as_clip_does(features: Tensor) -> Any:
    return features if IS_BEFORE_5 else BaseModelOutputWithPooling(pooler_output=features)

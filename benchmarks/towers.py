"""Check every architecture of open_clip against what training relies on, see `mcl_clip/model/prepare.py`.

    python benchmarks/towers.py

At full size on the meta device, which has shapes but no values: each parameter gets a gradient, alone and with all but
the last two, one or no groups of the image tower locked, with BatchNorm synchronized. With random values, for a small
member of each family: the largest change of a unit feature, in float64, by locking, synchronizing, the fast paths, and
by saving and loading, here and in plain open_clip. Hugging Face text towers are small ones of the same kind. Prints
a JSON line for each family and architecture, and counts. Nothing is downloaded; ten minutes on one core.
"""

import copy
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
import tyro
from torch import nn
from tqdm import tqdm

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.model.clip import TEXTS, ClipBundle, create_clip, load_clip, save_clip
from mcl_clip.model.fast_paths import slow_paths
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH
from mcl_clip.model.prepare import check_gradients, lock, synchronize_batch_norm

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
QUERIES = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "encoder_layerdrop": 0.0}
HUGGING_FACE: dict[str, dict[str, Any]] = {  # kind of text tower: its small configuration
    "roberta": {**LAYERS, "max_position_embeddings": 40},
    "xlm-roberta": {**LAYERS, "max_position_embeddings": 40},
    "mt5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "m2m_100": {**ENCODER, "d_model": 32, "decoder_layers": 1, "max_position_embeddings": 40},
}
KINDS = {"google/mt5": "mt5", "facebook/nllb": "m2m_100", "xlm-roberta": "xlm-roberta", "roberta": "roberta"}
OWN: dict[str, dict[str, Any]] = {  # model configs of open_clip's own towers
    "vit": {"vision_cfg": VIT},
    "vit with queries": {"vision_cfg": {**VIT, **QUERIES}},
    "siglip text": {"vision_cfg": VIT, "text_cfg": SIGLIP_TEXT, "custom_text": True, "init_logit_bias": -10.0},
    "modified_resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}},
    "coca": {
        "vision_cfg": {**VIT, **QUERIES, "output_tokens": True},
        "text_cfg": {**TEXT, "width": 16, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "width": 16},
        "custom_text": True,
    },
}
SMALLEST_OF_TIMM = {  # of each family, with an image size that it takes
    "convnext_atto": 64,
    "efficientnet_b0": 64,
    "efficientnetv2_rw_t": 64,
    "eva02_tiny_patch14_224": 224,
    "fastvit_mci0": 64,
    "regnety_002": 64,
    "resnet18": 64,
    "swin_tiny_patch4_window7_224": 224,
    "tf_efficientnet_lite0": 64,
    "vit_base_mci_224": 224,
    "vit_pe_core_tiny_patch16_384": 384,
    "vit_relpos_small_patch16_224": 224,
    "vit_tiny_patch16_224": 224,
    "vitamin_small_224": 224,
}
MEMBERS = (*OWN, *HUGGING_FACE, *SMALLEST_OF_TIMM)


def check_all() -> None:
    """Check the small members of all families, then every architecture of open_clip."""
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(MEMBERS, unit="family"):
            changes = compare(create(name, Path(folder) / "text"), Path(folder) / "model")
            print(
                json.dumps({"family": name, **{check: float(f"{c:.1e}") for check, c in changes.items()}}), flush=True
            )
        counts: Counter[str] = Counter()
        for name in tqdm(open_clip.list_models(), unit="architecture"):
            record = check_architecture(name, Path(folder) / "text")
            counts[record["verdict"]] += 1
            print(json.dumps({"architecture": name, **record}), flush=True)
    print(json.dumps({"architectures": counts.total(), **counts}))


def create(name: str, folder: Path) -> ClipBundle:
    """Create a small member of a family with random weights, and statistics of BatchNorm that matter.

    `folder` takes the configuration of a Hugging Face text tower.
    """
    cfg = OWN.get(name, {"vision_cfg": VIT})
    if name in HUGGING_FACE:
        cfg = {
            **cfg,
            "text_cfg": {**TEXT, "hf_model_name": write_text_config(name, folder), "hf_model_pretrained": False},
        }
    elif name in SMALLEST_OF_TIMM:
        size = SMALLEST_OF_TIMM[name]
        cfg = {"vision_cfg": {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": size}}
    clip = create_clip(model_cfg={"embed_dim": 16, "text_cfg": TEXT, **cfg}, seed=1)
    generator = torch.Generator().manual_seed(0)
    norms: list[Any] = [m for m in clip.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
        layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    clip.model.eval()
    return clip


def write_text_config(kind: str, folder: Path) -> str:
    """Write the configuration of a small Hugging Face text tower for CLIP's tokenizer; return the folder."""
    options = {**HUGGING_FACE[kind], "vocab_size": TEXT["vocab_size"], "pad_token_id": 0}
    transformers.AutoConfig.for_model(kind, **options).save_pretrained(folder / kind)
    return str(folder / kind)


def compare(clip: ClipBundle, folder: Path) -> dict[str, float]:
    """Return the largest change of a unit feature by each preparation, and by saving to `folder` and loading."""
    size = clip.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    tokens = clip.tokenizer(list(TEXTS))

    @torch.inference_mode()
    def features(model: Any) -> torch.Tensor:
        model = copy.deepcopy(model).double().eval()  # random deep towers amplify the rounding of float32
        sides = model.encode_image(images.double()), model.encode_text(tokens)
        return nn.functional.normalize(torch.stack(sides), dim=-1)

    def locked(groups: int) -> nn.Module:
        model = copy.deepcopy(clip.model)
        lock(model, image_unlocked_groups=groups)
        return model

    with slow_paths(clip.model):
        expected = features(clip.model)
    lock_all = locked(0)
    with torch.no_grad():
        lock_all.train().encode_image(images)  # type: ignore[operator]  # would update statistics that are not frozen
    save_clip(ClipBundle(lock_all, clip.model_cfg, clip.preprocess_cfg, clip.tokenizer), folder)
    found = {
        "fast_paths": clip.model,
        "lock": lock_all,
        "lock_but_one": locked(1),
        "synchronize": synchronize_batch_norm(copy.deepcopy(clip.model)),
        "load": load_clip(folder).model,
        "open_clip": open_clip.create_model(f"local-dir:{folder}", pretrained_text=False),
    }
    return {check: float((features(model) - expected).abs().max()) for check, model in found.items()}


def check_architecture(name: str, folder: Path) -> dict[str, Any]:
    """Check an architecture at full size on the meta device; return its family, size, verdict and, if refused, why."""
    cfg = open_clip.get_model_config(name)
    text_cfg, length = cfg["text_cfg"], cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
    kind = next((kind for start, kind in KINDS.items() if text_cfg.get("hf_model_name", "").startswith(start)), None)
    hub_name = text_cfg.pop("hf_model_name", None)
    is_coca, is_custom = "multimodal_cfg" in cfg, cfg.pop("custom_text", False) or kind
    make = open_clip.CoCa if is_coca else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    with torch.device("meta"):
        model: Any = make(**cfg, **({} if is_coca else {"output_dict": True}))
    device = torch.device("meta")
    if kind and not is_coca:  # masks of transformers need values
        model.text = open_clip.hf_model.HFTextEncoder(
            write_text_config(kind, folder), cfg["embed_dim"], proj_type="mlp", pooler_type=text_cfg["hf_pooler_type"],
            pretrained=False,
        )  # fmt: skip
        device, length = torch.device("cpu"), TEXT["context_length"]
    sides = model.visual.image_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    batch = torch.zeros(2, 3, height, width, device="meta"), torch.ones(2, length, dtype=torch.int64, device=device)
    trunk = type(getattr(model.visual, "trunk", model.visual)).__name__
    record = {
        "family": f"{trunk}, {hub_name or type(getattr(model, 'text', model)).__name__}",
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    model = synchronize_batch_norm(model.eval())
    try:
        check_gradients(model, *batch, name=name, stage=0)
        verdict = {"verdict": "covered"}
    except UserError as error:
        verdict = {"verdict": "refused", "reason": str(error)}
    for groups in (2, 1, 0):  # locks more each time
        lock(model, image_unlocked_groups=groups, patterns=["^text_decoder"] if is_coca else [])
        check_gradients(model, *batch, name=name, stage=0)
    return {**record, **verdict}


if __name__ == "__main__":
    run_program(lambda: tyro.cli(check_all))

"""Configuration of a run: frozen, keyword-only dataclasses, set by recipes and overridden on the command line.

Batch sizes are over all processes. `MachineConfig` never changes a result. Field docstrings
are the texts of `--help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mcl_clip.core.checks import check_fields, check_patterns
from mcl_clip.core.errors import UserError

Inline = Annotated[Mapping[str, Any], tyro.conf.Fixed]  # nested dictionaries: set in a recipe, not on the command line


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image-text pairs in WebDataset shards."""

    train: tuple[str, ...] = ()
    """Training shards: paths or URLs with braces and globs, or folders. Several lists make a mixture."""
    weights: tuple[float, ...] = ()
    """How often each list is sampled in an epoch; by default once."""
    caption_key: str = ""
    """Key of the caption, or list of captions, in a .json member. Captions then come from there also where a sample has
    a .txt member; by default they are in the .txt or, without one, under `caption`."""
    negatives_key: str = ""
    """Key of a wrong caption, or list of wrong captions, in a .json member: negatives of their own image (NegCLIP,
    arXiv 2210.01936). Captions then come from the .json, too."""
    image_member: str = ""
    """Extension of the images, if it is not that of an image format (as in KEY.img), or if keys have dots (jpg)."""
    text_member: str = ""
    """Extension of the captions, if it is not txt or json (as in KEY.cap), or if keys have dots."""
    skip_damaged: bool = False
    """Use the samples before the damage of shards that are cut off or damaged, in place of an error."""
    holdout_rows: int = 1024
    """Rows held out of training to fit the logit scale of the combined model; at most 1/20 of all rows."""
    max_bad_fraction: float = 0.01
    """Largest share of the samples, from 0 to 1, that may be left out as they have no image or caption (checked before
    training), and that may fail to decode (checked while the run reads them)."""
    max_pixels: int = 50_000_000
    """Images with more pixels count as bad samples and are not decoded."""

    def __post_init__(self) -> None:
        check_fields("data.", self, weights=0, holdout_rows=0, max_bad_fraction=(0, 1), max_pixels=1)
        if self.weights and len(self.weights) != len(self.train):
            raise UserError(f"--data.weights has {len(self.weights)} values for {len(self.train)} lists of shards")
        if self.weights and not any(self.weights):
            raise UserError("--data.weights are all 0, which leaves no rows; give a list of shards a weight above 0")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Image and text tower: by their open_clip name, as a pair of pretrained towers, or by a model config."""

    architecture: str = ""
    """An open_clip name such as ViT-B-32, `local-dir:FOLDER` or `hf-hub:ORG/NAME`."""
    pretrained: str = ""
    """An open_clip tag such as openai, or a .pt or .safetensors file; missing weights are an error."""
    model: Inline = field(default_factory=dict)
    """An open_clip model config, instead of `architecture`. `hf_model_name` and `hf_tokenizer_name` of a text tower are
    names on the Hub, or a folder on disk with config, weights and tokenizer; without other weights the tower starts
    from those, unless `hf_model_pretrained` is false."""
    preprocess: Inline = field(default_factory=dict)
    """Overrides of the preprocessing: mean, std, interpolation, resize_mode."""
    image: str = ""
    """Image tower of a pair, instead of `architecture`: timm:NAME=FILE with a file of its weights, timm:NAME for those
    that timm publishes, or timm:NAME=random. Without `text`, the run learns from images alone, by
    `--stages.K.train.loss simclr`."""
    text: str = ""
    """Pretrained text tower of a pair, beside `image`: hf:FOLDER or hf:ORG/NAME, a text model of transformers."""
    dim: int = 256
    """Dimension of the features of a pair or, of an image tower alone, of what its head makes of them for the loss."""
    heads: Literal["linear", "mlp"] = "mlp"
    """Projection heads of a pair or of an image tower alone, which start from random weights: matrices, or perceptrons
    with one hidden layer."""
    head_batch_norm: bool = True
    """BatchNorm in the perceptron of an image tower alone, as in SimCLR; MoCo v2 has none."""
    stem: Literal["standard", "cifar"] = "standard"
    """First layers of a ResNet that is an image tower alone: those of the architecture, or a convolution of 3 x 3
    pixels without max-pooling (`cifar`), for images of about 32 pixels."""
    image_args: Inline = field(default_factory=dict)
    """Arguments of timm for an image tower alone, such as `channels`, the widths of the layers of a ResNet."""
    context_length: int = 0
    """Tokens per text; by default those of the text tower. The positions of a pretrained tower are stretched: the first
    20 stay, the others are interpolated (Long-CLIP, arXiv 2403.15378)."""
    image_size: tuple[int, ...] = ()
    """Pixels of an image, a side or height and width; by default those of the image tower, whose positions are
    interpolated for others."""

    def __post_init__(self) -> None:
        check_fields("tower.", self, dim=1, context_length=0, image_size=1)
        if len(self.image_size) > 2:
            raise UserError(
                f"--tower.image-size {self.image_size} is not a side, or height and width; give 1 or 2 numbers"
            )
        if self.image_size and "size" in self.preprocess:
            raise UserError("--tower.image-size and the size in the recipe's preprocess are the same; give one of them")
        if self.text and not self.image:
            raise UserError(
                "--tower.text is one tower of a pair; give --tower.image timm:NAME=FILE and --tower.text hf:FOLDER "
                "together"
            )
        if not self.images_only and (self.stem != "standard" or self.image_args or not self.head_batch_norm):
            raise UserError(
                "--tower.stem, --tower.no-head-batch-norm and arguments of timm are for an image tower alone, "
                "--tower.image timm:NAME without --tower.text; leave them out"
            )
        if self.images_only and self.context_length:
            raise UserError(
                f"--tower.context-length {self.context_length} is for texts, and --tower.image {self.image} without "
                f"--tower.text has none; leave it out"
            )
        if sum(map(bool, (self.architecture, self.model, self.image))) != 1:
            raise UserError(
                "give either --tower.architecture, --tower.image with --tower.text or, in the recipe, "
                "TowerConfig(model=...), not several or none"
            )
        if self.image and self.pretrained:
            raise UserError(
                f"--tower.pretrained {self.pretrained} is for one file with both towers; give the weights of a pair as "
                f"--tower.image timm:NAME=FILE and --tower.text hf:FOLDER"
            )

    @classmethod
    def small(
        cls, *, image_size: int, context_length: int, embed_dim: int = 64, image_width: int = 8, text_width: int = 32,
        text_layers: int = 1,
    ) -> "TowerConfig":  # fmt: skip
        """Return a ResNet with one block per stage and a text transformer of two heads, both small enough for a CPU.

        `image_width` is the number of channels of the first stage of the ResNet.
        """
        image = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": image_width, "head_width": 32}
        text = {"context_length": context_length, "vocab_size": 49408, "width": text_width, "heads": 2}
        return cls(model={"embed_dim": embed_dim, "vision_cfg": image, "text_cfg": {**text, "layers": text_layers}})

    @property
    def images_only(self) -> bool:
        """Whether there is no text tower, so that a run learns from images alone."""
        return bool(self.image) and not self.text

    @property
    def name(self) -> str:
        """What messages call the towers."""
        return self.architecture or " and ".join(filter(None, (self.image, self.text))) or "the model of the recipe"

    @property
    def is_pretrained(self) -> bool:
        """Whether the features are pretrained; those of a pair are not, as its heads are random."""
        if self.images_only:
            return not self.image.endswith("=random")
        return bool(self.pretrained) or self.architecture.startswith(("local-dir:", "hf-hub:"))


@dataclass(frozen=True, kw_only=True)
class LockConfig:
    """Which parameters are frozen in a stage."""

    text: bool = False
    """Freeze the text tower."""
    text_unlocked_groups: int | None = None
    """Freeze the text tower except for its last n layer groups; by default all of it trains. The projection of a
    Hugging Face text tower always trains."""
    image_unlocked_groups: int | None = None
    """Freeze the image tower except for its last n layer groups; by default all of it trains."""
    patterns: tuple[str, ...] = ()
    """Freeze parameters whose name matches one of these regular expressions."""
    cached_texts: bool = True
    """With a frozen text tower, compute the features of all captions once if the stage sees each caption about twice or
    more, and read them from the run directory (4 bytes per dimension and caption, deleted after the stage)."""
    cached_trunks: bool = True
    """Compute what locked lower parts of the towers make of each image (of `augment.views`) and caption only once, if
    the stage needs it about twice or more and the disk has room, and that of evaluation sets. It is read from the run
    directory, where it is kept for later stages until the run ends, or from `machine.cache_dir`."""

    def __post_init__(self) -> None:
        check_fields("stages.K.train.lock.", self, text_unlocked_groups=0, image_unlocked_groups=0)
        check_patterns("stages.K.train.lock.patterns", self.patterns)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates in place of weights that are not locked (LoRA, arXiv 2106.09685), by peft; merged at the end."""

    rank: int = 0
    """Rank of the updates of linear layers and attentions; 0 trains the weights themselves."""
    alpha: int = 16
    """Factor on the updates, divided by the rank."""
    dropout: float = 0.0
    """Probability that an input of an update is 0 in training."""
    towers: Literal["both", "image", "text"] = "both"
    """Towers that are frozen except for updates."""
    patterns: tuple[str, ...] = ()
    """Regular expressions of the names of layers that get an update; by default all of these towers."""
    full: tuple[str, ...] = (r"^visual\.head\.", r"^text\.proj\.")
    """Regular expressions of parameters of these towers that train without updates; by default the projection heads
    of towers of timm and Hugging Face."""

    def __post_init__(self) -> None:
        check_fields("stages.K.train.lora.", self, rank=0, alpha=0, dropout=(0, 0.999999))
        check_patterns("stages.K.train.lora.patterns", self.patterns)
        check_patterns("stages.K.train.lora.full", self.full)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random crops, flips and changes of color. Training becomes invariant to what an augmentation varies."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of the crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop, width / height."""
    horizontal_flip: float = 0.0
    """Probability of a horizontal flip; flips make captions wrong that mention left or right."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest changes of brightness, contrast, saturation and hue, such as 0.4 0.4 0.4 0.1; 0 leaves one as it is."""
    jitter_probability: float = 0.8
    """Probability that a view has its colors changed by `jitter`."""
    grayscale: float = 0.0
    """Probability of a view in gray."""
    blur: float = 0.0
    """Probability of a Gaussian blur, with a standard deviation between 0.1 and 2 pixels."""
    solarize: float = 0.0
    """Probability that values above 127 are inverted."""
    jpeg: Literal["fast", "exact"] = "fast"
    """`fast` decodes JPEGs at a reduced size where that is enough and resizes with torchvision; `exact` uses Pillow as
    open_clip does. Evaluation and embedding are always exact."""
    views: int = 0
    """Fixed views of each image, used in turn over the epochs: the one of the evaluation, then augmented ones; 1 turns
    augmentation off. By default, 0, each epoch has a new augmented view."""

    def __post_init__(self) -> None:
        check_fields(
            "stages.K.train.augment.", self, scale=(1e-6, 1), ratio=1e-6, horizontal_flip=(0, 1), jitter=(0, 1),
            jitter_probability=(0, 1), grayscale=(0, 1), blur=(0, 1), solarize=(0, 1), views=0,
        )  # fmt: skip
        if self.jitter[3] > 0.5:
            raise UserError(f"--stages.K.train.augment.jitter {self.jitter} changes the hue by more than 0.5; use less")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise UserError(
                    f"--stages.K.train.augment.{name} {low} {high} must be the smaller, then the larger value"
                )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of what the base finds similar, so that fine-tuning does not forget it."""

    weight: float = 0.0
    """Factor on the distillation, which is added to the loss: the divergence of the softmax over the batch from that of
    the pretrained model (without one, of stage 0). 0 is off. It takes a forward pass of that model in each step."""
    temperature: float = 1.0
    """Temperature of both softmaxes, on top of the logit scales; higher ones compare more than the most similar."""

    def __post_init__(self) -> None:
        check_fields("stages.K.train.distill.", self, weight=0, temperature=1e-3)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Latent target decoding, so that text features keep what captions say (LTD, arXiv 2204.13382)."""

    weight: float = 0.0
    """Factor on the decoding loss, which is added to the loss: 1 - the cosine of what a head decodes from the text
    feature and the sentence feature of the caption, the pooled output of the text tower that the recipe names. 0 is
    off. It takes a forward pass of that tower in each step."""
    hidden_dim: int = 1024
    """Width of the two hidden layers of the head, which is dropped after the stage."""

    def __post_init__(self) -> None:
        check_fields("stages.K.train.decode.", self, weight=0, hidden_dim=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of one stage."""

    steps: int
    """Optimizer steps; 0 uses a pretrained stage 0 as it is."""
    global_batch_size: int
    """Rows of a batch over all processes."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warmup of the learning rate from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warmup: cosine decay to 0, or constant."""
    weight_decay: float = 0.2
    """Weight decay of matrices and kernels; gains, biases, positions and class or pooling tokens are not decayed
    (`mcl-clip doctor` lists them)."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW, SGD, or SGD with layer-wise rates for large batches (LARS, arXiv 1708.03888; that of timm). `lr` is of
    another order for each of them."""
    momentum: float = 0.9
    """Momentum of `sgd` and `lars`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Betas of AdamW."""
    eps: float = 1e-6
    """Epsilon of AdamW."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Regular expressions of parameter names with a factor on the learning rate; the last match counts."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Regular expressions of parameter names with their weight decay; the last match counts."""
    max_grad_norm: float | None = None
    """Clip the gradient to this L2 norm; by default it is not clipped."""
    loss: Literal["clip", "siglip", "simclr"] = "clip"
    """Of images and captions: InfoNCE (`clip`), or the sigmoid loss of SigLIP, for which the model config needs
    `init_logit_bias`. Of images alone: InfoNCE between augmented views (NT-Xent, `simclr`, arXiv 2002.05709)."""
    temperature: float = 0.1
    """Temperature of `simclr`, which is fixed; 0.5 is usual for small images and batches. The other losses learn it."""
    num_views: int = 2
    """Views of each image in a batch of `simclr`, each augmented anew in each epoch."""
    ifm_epsilon: float = 0.0
    """Implicit feature modification (arXiv 2106.11230): average the loss with one whose positive cosines are lower and
    negative cosines higher by this much, such as 0.1; 0 is off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the towers under bfloat16 autocast; weights and loss stay in float32."""
    grad_cache_rows: int = 0
    """Rows of one process that go through the towers at a time, for batches larger than memory; gradients stay exact
    (GradCache, arXiv 2101.06983), at the price of a second forward pass. 0 is off."""
    loss_chunk_rows: int = 0
    """Rows of one process that go through the loss at a time, such as 256, so that its memory does not grow with the
    square of the batch; the result is the same. 0 is all at once."""
    grad_checkpointing: bool = False
    """Recompute the transformer blocks in the backward pass: less memory, up to a third more compute."""
    compiled: bool = False
    """Compile the towers with torch.compile, which takes a minute or more at the start of the stage."""
    patch_dropout: float = 0.0
    """Share of image patches that a vision transformer drops in training (FLIP, arXiv 2212.00794), for faster steps.
    Finish with a stage, or a few steps, without it."""
    average_decay: float = 0.0
    """Decay of an exponential moving average of the weights, used for evaluation and export; 0 is off."""
    keep_best: str = ""
    """SET:METRIC, such as val:mean_recall@1; SET alone is its main metric. The stage ends with the best of the weights
    that `--eval.every-steps` evaluates, the first and the last ones included; by default with the last."""
    patience: int = 0
    """Evaluations without a better `keep_best` after which the stage stops; 0 is never."""
    groups: Literal["labels", "none", "random", "others"] = "labels"
    """Where negatives come from: the same pseudo-label (`labels`), all rows (`none`), random groups of the same sizes
    (`random`), or all pseudo-labels but the own one (`others`), in batches of all rows. The last three are controls."""
    own_group_share: float = 1.0
    """Share of the loss whose negatives are the rows of the own group, from 0 to 1. The negatives of the rest are all
    rows of the batch, so that a stage keeps apart what earlier stages have learned; see also `groups_per_batch`."""
    groups_per_batch: int = 1
    """Make a batch of so many equal parts, each of rows of one group where the group is large enough; 1 fills batches
    with a single group."""
    negative_captions: int = 1
    """With `data.negatives_key`, the number of wrong captions of each row in a batch, drawn anew in each epoch; 0 is
    off."""
    min_group_size: int | None = None
    """Groups with fewer rows are merged; by default 1/8 of the batch, at least 32."""
    min_negatives: int = 1
    """Rows with fewer negatives in a batch have weight 0 in the loss."""
    mask_duplicates: bool = True
    """Exclude rows with the same caption or the same image from the negatives."""
    mask_similar: float = 0.0
    """Exclude rows from the negatives whose cosine is above this, such as 0.9, as they are likely to match, too. The
    cosine is that of the stage before or, in stage 0, of the pretrained model. 0 is off."""
    similar_by: Literal["text", "image"] = "text"
    """Features that `mask_similar` compares; the text feature of a row is the mean over its captions."""
    window_shards: int = 0
    """Shuffle rows within windows of so many shuffled shards; 0 shuffles over all shards, best on local disks."""
    resharded: str = ""
    """Read the rows of this stage from a folder written by `mcl-clip reshard`."""
    run_rows: int = 1
    """Neighboring rows of a group that stay together, for longer reads from resharded shards."""
    augment: AugmentConfig = AugmentConfig()
    lock: LockConfig = LockConfig()
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        check_fields(
            "stages.K.train.", self, steps=0, global_batch_size=2, lr=0, warmup_steps=0, weight_decay=0,
            momentum=(0, 0.999999), temperature=1e-3, num_views=2,
            betas=(0, 0.999999999), eps=0, lr_multipliers=0, weight_decays=0, max_grad_norm=0, ifm_epsilon=0,
            grad_cache_rows=0, loss_chunk_rows=0, patch_dropout=(0, 0.999999), average_decay=(0, 0.999999),
            own_group_share=(0, 1), groups_per_batch=1, negative_captions=0, patience=0, min_group_size=1,
            min_negatives=1, mask_similar=(0, 1), window_shards=0, run_rows=1,
        )  # fmt: skip
        if self.patience and not self.keep_best:
            raise UserError(
                f"--stages.K.train.patience {self.patience} needs a metric that should improve; add --stages.K.train."
                f"keep-best SET:METRIC"
            )
        if self.lora.rank and self.compiled:
            raise UserError(
                f"--stages.K.train.compiled cannot be used with --stages.K.train.lora.rank {self.lora.rank}, whose "
                f"layers torch.compile does not take; leave one of them out"
            )
        check_patterns("stages.K.train.lr-multipliers", self.lr_multipliers)
        check_patterns("stages.K.train.weight-decays", self.weight_decays)
        if self.global_batch_size % self.groups_per_batch or self.global_batch_size < 2 * self.groups_per_batch:
            raise UserError(
                f"--stages.K.train.groups-per-batch {self.groups_per_batch} does not divide a batch of "
                f"{self.global_batch_size} rows into equal parts of at least 2; use a divisor of it"
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Clustering of the features of a stage."""

    num_clusters: int = 10
    """Number of clusters K of the image features, or of the text features."""
    on: Literal["image", "text", "product"] = "image"
    """Which features are clustered; `product` clusters both and combines the two cluster numbers."""
    text_clusters: int = 0
    """Number of clusters of the text features with `product`; 0 is `num_clusters`."""
    features: Literal["stage", "base"] = "stage"
    """Whose features make the groups of the next stage: those of this stage, whose clusters refine all earlier ones
    (`stage`), or those of stage 0, whose clusters are the groups on their own (`base`). With the latter, and `start`
    base, later stages do not depend on each other; give them other numbers of clusters, or the other side."""
    metric: Literal["cosine", "shared"] = "shared"
    """Cosine similarity of the features, as in the paper (`cosine`), or with each direction weighted by how well images
    and captions agree in it (`shared`), which separates more of what a stage has learned."""
    num_starts: int = 8
    """k-means++ initializations on a sample of the rows; the best one is continued on all rows."""
    max_passes: int = 20
    """Largest number of k-means passes over all rows."""

    def __post_init__(self) -> None:
        check_fields("stages.K.cluster.", self, num_clusters=1, text_clusters=0, num_starts=1, max_passes=0)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: train, embed, cluster, assign pseudo-labels."""

    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()
    start: Literal["base", "previous", "scratch"] = "previous"
    """Initial weights of stages after stage 0: the pretrained weights, or the result of stage 0 if there are none
    (`base`); the result of the previous stage (`previous`); new random weights (`scratch`)."""

    def __post_init__(self) -> None:
        check_fields("stages.K.", self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation after each stage."""

    retrieval: tuple[str, ...] = ()
    """Retrieval sets in CLIP_benchmark layout, as FOLDER or NAME=FOLDER."""
    classification: tuple[str, ...] = ()
    """Zero-shot classification sets in CLIP_benchmark layout, as FOLDER or NAME=FOLDER."""
    sets: tuple[str, ...] = ()
    """Sets of any kind, detected from their layout: retrieval, classification with one or several labels, image
    folders, pairs.json; as FOLDER or NAME=FOLDER."""
    every_steps: int = 0
    """Steps between evaluations inside a stage; 0 is never. It changes the result only with `keep_best`."""
    batch_size: int = 64
    """Images in a forward pass, also when the training rows are embedded."""
    select: str = ""
    """SET:METRIC, such as val:mean_recall@1, by which the stages of a greedy soup and the share of WiSE-FT are chosen;
    SET alone is its main metric. Choose on a set that is not reported."""
    guard: tuple[str, ...] = ()
    """SET:METRIC of what the base can do and the model should not forget, such as cifar10:acc1: the share of WiSE-FT
    is chosen by the mean of these and `select`."""
    wise_ft: tuple[float, ...] = ()
    """Shares of the fine-tuned weights, from 0 to 1, to try in an interpolation with the pretrained ones (WiSE-FT,
    arXiv 2109.01903); 0 and 1 are always tried. The final model has the best share. For a single model only."""

    def __post_init__(self) -> None:
        check_fields("eval.", self, every_steps=0, batch_size=1, wise_ft=(0, 1))

    @property
    def all_sets(self) -> tuple[str, ...]:
        """All sets, as FOLDER or NAME=FOLDER."""
        return (*self.retrieval, *self.classification, *self.sets)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Settings of the machine: they never change a result and may differ between launches."""

    workers: int = 2
    """Loader processes of each training process."""
    prefetch_batches: int = 4
    """Batches that each loader process keeps ready."""
    loader_timeout_s: float = 1800.0
    """Longest wait for a batch, in seconds, after which the job ends."""
    threads: int = 0
    """CPU threads of each training process; 0 is the default of torch."""
    log_steps: int = 10
    """Steps between records in metrics.jsonl."""
    save_steps: int = 1000
    """Steps between checkpoints; 0 is never."""
    save_minutes: float = 30.0
    """Minutes between checkpoints; 0 is never."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    progress: bool = True
    """Show progress bars on a terminal."""
    report: bool = True
    """Write report.html in the run directory after each stage."""
    report_images: bool = True
    """Include thumbnails of the data in the report; turn off to share the report where the data must stay private."""
    report_mb: float = 10.0
    """Largest size of the report in MB; thumbnails get smaller, then fewer."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Experiment trackers to log to besides metrics.jsonl; each must be installed."""
    tracker_project: str = "mcl_clip"
    """Project or experiment name at the trackers."""
    remote: Literal["range", "stage"] = "range"
    """Read remote shards by HTTP ranges (`range`), or download whole shards into a cache (`stage`)."""
    cache_dir: Path | None = None
    """Folder of the shard cache, of batch plans too large for memory, and of what locked lower parts of the towers
    compute: runs that share it compute that once. It is not deleted."""
    cache_gb: float = 100.0
    """Largest size of the shard cache in GB."""
    preempt_exit_code: int = 0
    """Exit code after SIGTERM or SIGUSR1 stopped the job with a checkpoint, for schedulers that requeue by code."""

    def __post_init__(self) -> None:
        check_fields(
            "machine.", self, workers=0, prefetch_batches=1, loader_timeout_s=1, threads=0, log_steps=1, save_steps=0,
            save_minutes=0, keep_checkpoints=1, report_mb=0.01, cache_gb=0, preempt_exit_code=(0, 255),
        )  # fmt: skip
        if self.preempt_exit_code in (1, 2):
            raise UserError(
                f"--machine.preempt-exit-code {self.preempt_exit_code} means that a job has failed; use another, "
                f"such as 85"
            )


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Publish the finished run on the Hugging Face Hub, if `repo` is set."""

    repo: str = ""
    """Repository ORG/NAME; empty to publish nothing."""
    private: bool = False
    """Create the repository as private."""
    revision: str = "main"
    """Branch, created if it does not exist."""
    create_pr: bool = False
    """Open a pull request instead of committing."""
    compact: bool = False
    """Write weights that the stages share only once; plain open_clip then loads the first stage only."""
    license: str = ""
    """License identifier of the Hub for the model card, such as apache-2.0; empty for none."""
    datasets: tuple[str, ...] = ()
    """Data sets on the Hub that the pairs come from, for the model card."""
    description: str = ""
    """A paragraph about data and purpose for the model card."""

    def __post_init__(self) -> None:
        check_fields("publish.", self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: Path
    """Folder of all output; the same folder resumes the run."""
    tower: TowerConfig
    stages: tuple[StageConfig, ...]
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    method: Literal["stages", "single", "plain-stages", "ensemble", "soup", "greedy-soup"] = "stages"
    """What is trained with the compute of the stages: the stages with groups (`stages`), one stage (`single`), stages
    without groups (`plain-stages`), as many models from the same start (`ensemble`), or those averaged to one model by
    their weights (`soup`; `greedy-soup` leaves out those that do not help on `--eval.select`)."""
    control: Literal["none", "single", "ensemble", "no-groups", "random-groups", "ifm"] = "none"
    """Baseline to run instead of the recipe: a single stage of equal compute (`single`), as many independent models
    (`ensemble`), the same stages without groups or with random groups, or `single` with implicit feature modification
    (`ifm`)."""
    combine: Literal["mean_cosine", "concat", "best", "weighted"] = "mean_cosine"
    """How the stages are combined: mean of their cosine similarities (`mean_cosine`), concatenated un-normalized
    features as in the MCL paper (`concat`), whichever of both has the lower loss on held-out rows (`best`), or a mean
    of the cosine similarities with the weights that have the lowest loss there (`weighted`)."""
    seed: int = 0
    """Random seed."""
    behavior: Literal["0.6", "0.7"] = "0.7"
    """How images and captions are read and parameters are decayed: as the current version does it, or as version 0.6
    and earlier did. A run directory that was begun with an earlier version keeps the earlier behavior on its own."""
    publish: PublishConfig = PublishConfig()
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        check_fields("", self)
        if self.control != "none" and self.method != "stages":
            raise UserError(
                f"--control {self.control} is a baseline of stages with groups, and --method is {self.method}; leave "
                f"one of them out"
            )
        if not self.stages:
            raise UserError("a run needs at least one stage")
        for number, stage in enumerate(self.stages):
            if stage.train.steps == 0 and (number > 0 or not self.tower.is_pretrained):
                raise UserError(
                    f"--stages.{number}.train.steps is 0, which is meant for a pretrained stage 0; give steps above 0, "
                    f"or --tower.pretrained"
                )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Arms and columns of `mcl-clip experiment`."""

    figures: Mapping[str, tuple[str, ...]]
    """Columns of the table: name -> SET:METRIC terms, which are averaged."""
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Additional arms besides the recipe and its controls: name -> arguments of the recipe."""
    high: str | None = None
    """The arm that is the upper bound, without suppressed features; the gap is measured from `single` to it."""

    def __post_init__(self) -> None:
        check_fields("experiment.", self)

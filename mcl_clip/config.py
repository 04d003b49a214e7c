"""What a run is: frozen, keyword-only dataclasses. Recipes fill them in, the command line overrides them.

Batch sizes are over all processes. Only `MachineConfig` and `EvalConfig.every_steps` cannot change a result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mcl_clip.core.errors import UserError


def check_range(flag: str, value: float, least: float, most: float = math.inf) -> None:
    """Refuse a value outside its range.

    Raises:
        UserError: naming the flag, the value and the range.
    """
    if not least <= value <= most:
        limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"--{flag} must be {limits}, not {value:g}")


Inline = Annotated[Mapping[str, Any], tyro.conf.Fixed]  # nested dictionaries: set in a recipe, not on the command line


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image-text pairs in WebDataset shards."""

    train: tuple[str, ...] = ()
    """Training shards: paths or URLs with braces and globs, or folders. Several lists make a mixture."""
    weights: tuple[float, ...] = ()
    """How often each list is drawn in an epoch; empty is once each."""
    caption_key: str = "caption"
    """Where a .json member holds the caption or the list of captions."""
    holdout_rows: int = 1024
    """Rows kept out of training to fit the combination's logit scale, at most a twentieth of all."""
    max_bad_fraction: float = 0.01
    """Share of samples that may fail to decode before the run stops."""
    max_pixels: int = 50_000_000
    """Pictures with more pixels are bad samples, refused before they are decoded."""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.train):
            raise UserError(f"--data.weights has {len(self.weights)} values for {len(self.train)} lists of shards")
        if any(weight < 0 for weight in self.weights):
            raise UserError(f"--data.weights must be 0 or more, not {self.weights}")
        check_range("data.max-bad-fraction", self.max_bad_fraction, 0, 1)
        check_range("data.holdout-rows", self.holdout_rows, 0)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Image and text towers of open_clip, by name or given in a recipe."""

    architecture: str = ""
    """An open_clip name such as ViT-B-32, `local-dir:FOLDER` or `hf-hub:ORG/NAME`."""
    pretrained: str = ""
    """An open_clip tag such as openai, or a .pt or .safetensors file. Missing weights are an error."""
    model: Inline = field(default_factory=dict)
    """An open_clip model config, in place of `architecture`."""
    preprocess: Inline = field(default_factory=dict)
    """Changes to the tower's preprocessing: mean, std, interpolation, resize_mode."""

    def __post_init__(self) -> None:
        if bool(self.architecture) == bool(self.model):
            raise UserError(
                "give either --tower.architecture or, in the recipe, TowerConfig(model=...), not both or none"
            )

    @property
    def is_pretrained(self) -> bool:
        """Whether the towers start from weights."""
        return bool(self.pretrained) or self.architecture.startswith(("local-dir:", "hf-hub:"))


@dataclass(frozen=True, kw_only=True)
class LockConfig:
    """Which parameters of a stage do not train."""

    text: bool = False
    """Lock the text tower."""
    image_unlocked_groups: int | None = None
    """Lock the image tower but for its last n groups; none: the whole image tower trains."""
    patterns: tuple[str, ...] = ()
    """Lock parameters whose name matches one of these regular expressions."""
    cached_texts: bool = True
    """With a locked text tower: compute the features of all captions once and read them from the run directory (4 bytes
    a dimension and caption, while the stage trains), where the stage sees each caption about twice or more."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random resized crops, and flips; each augmentation destroys the feature that it varies."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of a picture's area that is kept."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop."""
    horizontal_flip: float = 0.0
    """Probability of a flip. It destroys orientation, and makes captions wrong that name left and right."""
    jpeg: Literal["fast", "exact"] = "fast"
    """JPEGs are decoded at a reduced size where that is enough, and resized by torchvision (`fast`), or treated by
    Pillow as in open_clip (`exact`). Evaluation and embedding are always exact."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training of one stage."""

    steps: int
    """Optimiser updates; 0 leaves a pretrained stage 0 untouched."""
    global_batch_size: int
    """Rows of a batch over all processes."""
    lr: float
    """Learning rate at its peak."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up."""
    weight_decay: float = 0.2
    """Of matrices and kernels; gains, biases and positions are not decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of Adam."""
    eps: float = 1e-6
    """Of Adam."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Regular expression of parameter names, and a factor on the learning rate; the last match counts."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Regular expression of parameter names, and their weight decay; the last match counts."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm."""
    loss: Literal["clip", "siglip"] = "clip"
    """InfoNCE, or the sigmoid loss (the tower then needs `init_logit_bias`)."""
    ifm_epsilon: float = 0.0
    """Implicit feature modification (arXiv 2106.11230): the mean of the loss and of the loss with every cosine moved by
    this much against the pair, such as 0.1; 0 is the plain loss."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the towers in bfloat16 autocast; weights and loss stay float32."""
    grad_cache_rows: int = 0
    """Rows of one process that go through the towers at a time, for batches larger than memory; the gradients stay
    exact (GradCache, arXiv 2101.06983), and the towers run forward twice. 0 is off."""
    loss_chunk_rows: int = 0
    """Rows of one process that go through the loss at a time, with the same result, so that its memory does not grow
    with the square of the batch, such as 256. 0 is all at once."""
    grad_checkpointing: bool = False
    """Keep only the inputs of the towers' blocks for the backward pass, and run the blocks twice: less memory, up to a
    third more work."""
    compiled: bool = False
    """Run the towers through torch.compile, which takes a minute or more at the start of the stage."""
    patch_dropout: float = 0.0
    """Share of the patches of a picture that a vision transformer leaves out in training (FLIP, arXiv 2212.00794):
    faster steps, and features of a part of the picture. A last stage or a few steps without it are advised."""
    average_decay: float = 0.0
    """Decay of a running average of the weights, used in evaluation and export; 0 is none."""
    groups: Literal["labels", "none", "random"] = "labels"
    """Negatives come from the same clusters (`labels`), from everywhere (`none`), or from groups of the same sizes
    drawn at random (`random`): the last two are controls."""
    min_group_size: int | None = None
    """Groups with fewer rows are merged; by default an eighth of the batch, at least 32."""
    min_negatives: int = 1
    """Rows with fewer negatives in a batch get weight 0."""
    mask_duplicates: bool = True
    """Leave other rows with an equal caption or an equal picture out of the negatives."""
    window_shards: int = 0
    """Rows are shuffled within windows of that many shuffled shards; 0 is one window, best on local disks."""
    resharded: str = ""
    """Read this stage's rows from a folder written by `mcl-clip reshard`."""
    run_rows: int = 1
    """Neighbouring rows of a group that stay together; with resharded shards, reads get longer."""
    augment: AugmentConfig = AugmentConfig()
    lock: LockConfig = LockConfig()

    def __post_init__(self) -> None:
        least = {
            "steps": 0,
            "global_batch_size": 2,
            "lr": 0,
            "warmup_steps": 0,
            "min_negatives": 1,
            "window_shards": 0,
            "run_rows": 1,
            "average_decay": 0,
            "ifm_epsilon": 0,
            "grad_cache_rows": 0,
            "loss_chunk_rows": 0,
            "patch_dropout": 0,
        }
        for name, smallest in least.items():
            largest = 0.999999 if name in ("average_decay", "patch_dropout") else math.inf
            check_range(f"stages.K.train.{name.replace('_', '-')}", getattr(self, name), smallest, largest)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How the features of a stage are clustered."""

    num_clusters: int = 10
    """K, of the image features or of the text features."""
    on: Literal["image", "text", "product"] = "image"
    """Which features; `product` clusters both and takes the pair of numbers."""
    text_clusters: int = 0
    """With `product`: clusters of the text features; 0 is as many as of the image features."""
    metric: Literal["cosine", "shared"] = "shared"
    """Cosine of the features as they are, as in the paper, or with each direction weighted by how well picture and
    caption agree in it, which keeps apart more of what a stage has learned."""
    num_starts: int = 8
    """k-means++ starts on a sample, of which the best goes on."""
    max_passes: int = 20
    """Most passes over all rows."""

    def __post_init__(self) -> None:
        for name, smallest in {"num_clusters": 1, "text_clusters": 0, "num_starts": 1, "max_passes": 0}.items():
            check_range(f"stages.K.cluster.{name.replace('_', '-')}", getattr(self, name), smallest)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: train, embed, cluster, label."""

    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()
    start: Literal["base", "previous", "scratch"] = "previous"
    """Weights to start from, after stage 0: what stage 0 started from if that was pretrained, else its result (`base`);
    the result of the stage before (`previous`); a new random draw (`scratch`)."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured after each stage."""

    retrieval: tuple[str, ...] = ()
    """Retrieval sets in the layout of CLIP_benchmark: folders, or NAME=FOLDER."""
    classification: tuple[str, ...] = ()
    """Zero-shot classification sets in the layout of CLIP_benchmark: folders, or NAME=FOLDER."""
    sets: tuple[str, ...] = ()
    """Sets of any kind, told by their layout: retrieval, classification with one label or several, image folders,
    pairs.json; folders, or NAME=FOLDER."""
    every_steps: int = 0
    """Also evaluate every n steps inside a stage; 0 is never."""
    batch_size: int = 64
    """Pictures of a forward pass, also when the rows are embedded."""

    def __post_init__(self) -> None:
        check_range("eval.batch-size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What cannot change a result and may differ between launches."""

    workers: int = 2
    """Loader processes for each training process."""
    prefetch_batches: int = 4
    """Batches that each loader process keeps ready."""
    threads: int = 0
    """CPU threads of each training process; 0 leaves the choice to torch."""
    log_steps: int = 10
    """Steps between records in metrics.jsonl."""
    save_steps: int = 1000
    """Steps between checkpoints; 0 is never."""
    save_minutes: float = 30.0
    """Minutes between checkpoints; 0 is never."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    progress: bool = True
    """Show progress bars on a terminal."""
    report: bool = True
    """Write report.html in the run directory after each stage."""
    report_images: bool = True
    """Put small pictures of the data into the report; without, it may be shown where the data may not."""
    report_mb: float = 10.0
    """Largest size of the report, in 10^6 bytes; pictures are made smaller, then fewer."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics go beside metrics.jsonl, through Accelerate; each must be installed."""
    tracker_project: str = "mcl_clip"
    """Name of the project, or experiment, at the trackers."""
    remote: Literal["range", "stage"] = "range"
    """Remote shards are read in ranges, or fetched whole into a cache."""
    cache_dir: Path | None = None
    """Folder of that cache, and of plans too large for memory."""
    cache_gb: float = 100.0
    """Largest size of the cache, in 10^9 bytes."""
    preempt_exit_code: int = 0
    """Exit code after SIGTERM or SIGUSR1 has stopped the job in good order; schedulers may start by it anew."""

    def __post_init__(self) -> None:
        if self.preempt_exit_code in (1, 2):
            raise UserError(
                f"--machine.preempt-exit-code {self.preempt_exit_code} says that a job has failed; use another, such "
                f"as 85"
            )
        check_range("machine.preempt-exit-code", self.preempt_exit_code, 0, 255)
        least = {
            "workers": 0,
            "prefetch_batches": 1,
            "threads": 0,
            "log_steps": 1,
            "save_steps": 0,
            "keep_checkpoints": 1,
        }
        for name, smallest in least.items():
            check_range(f"machine.{name.replace('_', '-')}", getattr(self, name), smallest)


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Publishing the finished run on the Hugging Face Hub, as the last phase; only if `repo` is given."""

    repo: str = ""
    """Where to, as ORG/NAME; empty for nowhere."""
    private: bool = False
    """Make a new repository one that only its owner sees."""
    revision: str = "main"
    """Branch; made if it does not exist."""
    create_pr: bool = False
    """Propose the files in a pull request."""
    compact: bool = False
    """Write what the stages share once; plain open_clip then loads the first stage alone."""
    license: str = ""
    """For the model card: an identifier of the Hub, such as apache-2.0; empty for not stated."""
    datasets: tuple[str, ...] = ()
    """For the model card: data sets on the Hub that the pairs come from."""
    description: str = ""
    """For the model card: a paragraph about data and purpose."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: Path
    """Where everything is written; the same folder again continues the run."""
    tower: TowerConfig
    stages: tuple[StageConfig, ...]
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    control: Literal["none", "single", "ensemble", "no-groups", "random-groups", "ifm"] = "none"
    """What to compare the stages with, from the same recipe: a single stage of equal compute (`single`), as many models
    from other seeds (`ensemble`), the same stages without groups or with random ones, or `single` with implicit feature
    modification (`ifm`)."""
    combine: Literal["mean_cosine", "concat", "best"] = "mean_cosine"
    """How the stages are combined: the mean of their cosines, or the un-normalised features side by side as in the MCL
    paper (`concat`); `best` takes the one with the lower loss on held-out rows."""
    seed: int = 0
    """Seed of every draw."""
    publish: PublishConfig = PublishConfig()
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
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
    """What `mcl-clip experiment` runs beside a recipe, and shows of it."""

    figures: Mapping[str, tuple[str, ...]]
    """Columns of the table: name -> SET:METRIC terms, whose mean is shown."""
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arms of its own, beside the stages and the controls: name -> arguments of the recipe."""
    high: str | None = None
    """The arm that shows what could be had if nothing were suppressed; the gap runs from `single` to it."""

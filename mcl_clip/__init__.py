"""Multistage contrastive pretraining of CLIP."""

from typing import TYPE_CHECKING, Any

from mcl_clip.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    DecodeConfig,
    DistillConfig,
    EvalConfig,
    ExperimentConfig,
    LockConfig,
    LoraConfig,
    MachineConfig,
    PublishConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.caches import use_writable_caches
from mcl_clip.core.errors import UserError, explain_uncaught_errors

if TYPE_CHECKING:
    from mcl_clip.cli.recipe import main
    from mcl_clip.model.multistage import MultistageCLIP
    from mcl_clip.model.resolve import load

__all__ = [
    "AugmentConfig",
    "ClusterConfig",
    "DataConfig",
    "DecodeConfig",
    "DistillConfig",
    "EvalConfig",
    "ExperimentConfig",
    "LockConfig",
    "LoraConfig",
    "MachineConfig",
    "MultistageCLIP",
    "PublishConfig",
    "RunConfig",
    "StageConfig",
    "TowerConfig",
    "TrainConfig",
    "UserError",
    "load",
    "main",
]

explain_uncaught_errors()
use_writable_caches()  # before torch and transformers are imported, which is on first use


def __getattr__(name: str) -> Any:
    """Import names that need torch and open_clip on first use, since these take seconds to import."""
    if name == "MultistageCLIP":
        from mcl_clip.model.multistage import MultistageCLIP

        return MultistageCLIP
    if name == "load":
        from mcl_clip.model.resolve import load

        return load
    if name == "main":
        from mcl_clip.cli.recipe import main

        return main
    raise AttributeError(f"module 'mcl_clip' has no attribute {name!r}")

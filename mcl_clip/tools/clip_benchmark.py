"""Run `clip_benchmark` on models of this project: `python -m mcl_clip.tools.clip_benchmark eval --model NAME ...`.

Arguments are those of `clip_benchmark`. `--model` takes the names of `mcl_clip.load`; an optional `--pretrained` is the
rest of the name: `--model runs/mine --pretrained stage-0`. Other models need `--model_type`. With `--no_amp`, the
scores are those of `mcl-clip eval`; without it, the encoders run under autocast.

Works around three bugs of `clip_benchmark` 1.6.2: it cannot compute an accuracy with numpy 2.4, fails on datasets with
fewer shards than workers, and cannot write results of a model with `/` in its name.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import webdataset
from jaxtyping import Float, Int
from torch import Tensor, nn

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.model.resolve import load

MODEL_TYPE = "mcl_clip"


def main() -> None:
    """Run `clip_benchmark` with the arguments of the command line.

    Raises:
        UserError: if `clip_benchmark` is not installed, or there is no such model.
    """
    try:
        from clip_benchmark import cli, models
        from clip_benchmark.metrics import linear_probe, zeroshot_classification
    except ImportError as error:
        raise UserError(
            f"clip_benchmark cannot be imported: {error}; install it with pip install clip_benchmark requests"
        ) from error
    models.TYPE2FUNC[MODEL_TYPE] = load_model
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    for module in (zeroshot_classification, linear_probe):
        try:
            module.accuracy(torch.eye(2), torch.arange(2), topk=(1,))
        except TypeError:  # numpy 2.4 refuses float() of an array with one element
            module.accuracy = accuracy
    if "empty_check" in inspect.signature(webdataset.WebDataset).parameters:  # allow workers without a shard
        webdataset.WebDataset = partial(webdataset.WebDataset, empty_check=False)
    run = cli.run

    def run_with_safe_name(args: argparse.Namespace) -> int | None:
        args.output = args.output.replace("{model}", args.model.strip("/").replace("/", "_"))
        status: int | None = run(args)
        return status

    cli.run = run_with_safe_name
    sys.argv[1:] = with_defaults(sys.argv[1:])
    cli.main()


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[..., Tensor]]:
    """Load `model_name`, or `model_name/pretrained` unless `pretrained` is the default, with `mcl_clip.load`.

    Raises:
        UserError: if there is no such model, or `cache_dir` is given.
    """
    if cache_dir:
        raise UserError(f"--model_cache_dir {cache_dir} is for other model types; set the variable HF_HUB_CACHE")
    return load(model_name if pretrained == MODEL_TYPE else f"{model_name}/{pretrained}", device=device)


def accuracy(
    output: Float[Tensor, "images classes"], target: Int[Tensor, "images"], topk: Sequence[int] = (1,)
) -> list[float]:
    """Compute top-k accuracy for each k in `topk`."""
    is_correct = output.topk(max(topk), dim=1).indices == target[:, None]
    return [is_correct[:, :k].sum().item() / len(target) for k in topk]


def with_defaults(arguments: list[str]) -> list[str]:
    """Insert the default `--pretrained` and `--model_type` before the arguments of `eval`.

    `--pretrained` needs a value because it appears in the results; no model has weights of this name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_type", default=MODEL_TYPE)
    known, _ = parser.parse_known_args(arguments)
    if arguments[:1] != ["eval"] or known.model_type != MODEL_TYPE:
        return arguments
    return ["eval", "--pretrained", MODEL_TYPE, "--model_type", MODEL_TYPE, *arguments[1:]]


if __name__ == "__main__":
    run_program(main)

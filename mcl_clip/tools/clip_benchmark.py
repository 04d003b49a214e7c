"""`clip_benchmark` for the models of this project: `python -m mcl_clip.tools.clip_benchmark eval --model NAME ...`.

The arguments are those of `clip_benchmark`. `--model` takes what `mcl_clip.load` takes; `--pretrained`, if it is given,
is the rest of the name: `--model runs/mine --pretrained stage-0`. Other models are measured with `--model_type`.
With `--no_amp` the scores are those of `mcl-clip eval`; without it the towers run under autocast.

Faults of `clip_benchmark` 1.6.2 are mended on the way: it cannot compute an accuracy with numpy 2.4, stops at sets that
have fewer shards than there are workers, and finds no place for the results of a model with `/` in its name.
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

from mcl_clip.core.console import run_program
from mcl_clip.core.errors import UserError
from mcl_clip.model.resolve import load

MODEL_TYPE = "mcl_clip"


def main() -> None:
    """Run `clip_benchmark` with the arguments of the command line.

    Raises:
        UserError: if it is not installed, or there is no such model.
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
        except TypeError:  # float() of an array with one number in it
            module.accuracy = accuracy
    if "empty_check" in inspect.signature(webdataset.WebDataset).parameters:  # a worker without a shard is no error
        webdataset.WebDataset = partial(webdataset.WebDataset, empty_check=False)
    cli.run = partial(_run, cli.run)
    sys.argv[1:] = with_defaults(sys.argv[1:])
    cli.main()


def load_model(
    model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[nn.Module, Callable[[Any], Tensor], Callable[..., Tensor]]:
    """What `mcl_clip.load` gives for the model `model_name` or, unless `pretrained` is the default, both names.

    Raises:
        UserError: if there is no such model, and for a `cache_dir`.
    """
    if cache_dir:
        raise UserError(f"--model_cache_dir {cache_dir} is for other model types; set the variable HF_HUB_CACHE")
    return load(model_name if pretrained == MODEL_TYPE else f"{model_name}/{pretrained}", device=device)


def accuracy(
    output: Float[Tensor, "images classes"], target: Int[Tensor, "images"], topk: Sequence[int] = (1,)
) -> list[float]:
    """The fraction of images whose class is among the best k, for each k."""
    right = output.topk(max(topk), dim=1).indices == target[:, None]
    return [right[:, :k].sum().item() / len(target) for k in topk]


def with_defaults(arguments: list[str]) -> list[str]:
    """The arguments, and before them what stands for those that `eval` was not given.

    `pretrained` needs a value, for it stands in the results; no model has weights of this name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_type", default=MODEL_TYPE)
    known, _ = parser.parse_known_args(arguments)
    if arguments[:1] != ["eval"] or known.model_type != MODEL_TYPE:
        return arguments
    return ["eval", "--pretrained", MODEL_TYPE, "--model_type", MODEL_TYPE, *arguments[1:]]


def _run(run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int | None:
    """`run(args)`, with a name of the model in the name of the output that is no path."""
    args.output = args.output.replace("{model}", args.model.strip("/").replace("/", "_"))
    return run(args)


if __name__ == "__main__":
    run_program(main)

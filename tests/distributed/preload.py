"""What worker processes need, imported once by the server that they are forked from; annotations are checked."""

from jaxtyping import install_import_hook

install_import_hook("mcl_clip", "typechecking.checked")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # optimisers import it at their first step

import mcl_clip.eval.evaluate  # noqa: E402
import mcl_clip.stages.kmeans  # noqa: E402
import mcl_clip.train.loop  # noqa: E402, F401

torch.set_num_threads(1)

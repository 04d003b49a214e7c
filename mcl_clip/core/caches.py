"""Caches of the libraries, in a temporary folder where the home folder cannot be written. Only the standard library."""

import atexit
import logging
import os
import shutil
import tempfile

logger = logging.getLogger(__name__)


def use_writable_caches() -> None:
    """Point caches that cannot be written to one temporary folder, by environment variables, with one warning.

    It must be called before the libraries are imported, which read the variables then. Variables that are set stay,
    and child processes inherit them. A cache of downloads that is there is used, as it can be read.
    """
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    hub = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    written = {
        "HF_MODULES_CACHE": os.path.join(hub, "modules"),  # the code of exported models is copied there to be imported
        "HF_DATASETS_CACHE": os.path.join(hub, "datasets"),
        "HF_XET_CACHE": os.path.join(hub, "xet"),
        "MPLCONFIGDIR": os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "matplotlib"),
        "TRITON_CACHE_DIR": os.path.join(home, ".triton", "cache"),
    }
    downloaded = {"HF_HUB_CACHE": os.path.join(hub, "hub"), "TORCH_HOME": os.path.join(cache, "torch")}
    needed = written | {name: path for name, path in downloaded.items() if not os.path.isdir(path)}
    refused = {name: path for name, path in needed.items() if name not in os.environ and not _is_writable(path)}
    if not refused:
        return
    try:
        folder, owner = tempfile.mkdtemp(prefix="mcl_clip-"), os.getpid()
    except OSError:  # no temporary folder either: whoever needs a cache says so
        return
    os.environ.update({name: os.path.join(folder, name.lower()) for name in refused})

    @atexit.register
    def _remove() -> None:
        if os.getpid() == owner:  # not in a fork, while others use it
            shutil.rmtree(folder, ignore_errors=True)

    logger.warning(
        "%s cannot be written; caches are in %s until this process ends (to keep them, set %s to a folder)",
        next(iter(refused.values())),
        folder,
        ", ".join(refused),
    )


def _is_writable(path: str) -> bool:
    """Return whether a folder can be written, or made in the nearest folder above it that exists."""
    if path.startswith("~"):  # the user has no home at all
        return False
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)

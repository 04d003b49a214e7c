"""A page on this machine to search the pictures of a run with, stage by stage: `serve.serve`."""

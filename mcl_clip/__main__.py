"""`python -m mcl_clip` is `mcl-clip`."""

from mcl_clip.cli import command

if __name__ == "__main__":
    command()

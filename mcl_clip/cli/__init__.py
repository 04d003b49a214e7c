"""The command line: recipes and the `mcl-clip` command."""

"""Reading, scoring and comparing what runs have measured."""

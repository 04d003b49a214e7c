"""Commands beside training: reshard, doctor, profile, compare, launch."""

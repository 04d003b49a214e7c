"""Data pipeline from shard lists to batches: index, batch plan, reader, decoding, loader."""

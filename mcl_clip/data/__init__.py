"""From shard lists to batches: index, plan, reader, decoding."""

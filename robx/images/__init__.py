"""Reading images: decoding, sources (folders, shards, arrays, scene data sets) and the one reading loop that every stage uses."""

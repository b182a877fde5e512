"""Reading images: decoding, sources (folders, shards, arrays, scene data sets) and the reading loop of all stages."""

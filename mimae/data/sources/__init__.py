"""Where samples come from: folders, lists, shards, Parquet, mixtures and built-in sets."""

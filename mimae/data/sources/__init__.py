"""Sources of samples: folders, lists, shards, Parquet files, mixtures and embedded sets."""

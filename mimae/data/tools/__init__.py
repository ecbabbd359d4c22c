"""Commands that check a data set or pack it into shards."""

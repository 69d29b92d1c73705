"""Images without labels: scores of a teacher in Parquet shards, the best images per class, near copies."""

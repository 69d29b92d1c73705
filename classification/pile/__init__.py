"""Images without labels: a teacher's scores in Parquet shards, the best images per class, near copies."""

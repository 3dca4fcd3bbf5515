"""What the engine does differently on a GPU: graphs per batch bucket, and kernels for the decision and the compaction."""

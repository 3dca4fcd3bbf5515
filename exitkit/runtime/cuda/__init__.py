"""What the engine does differently on a GPU: graphs per batch bucket, and one kernel for the decision."""

"""Where limits live: what a bucket holds, shared among replicas or not."""

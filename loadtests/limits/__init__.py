"""Gateway processes that share one store of limits, under load and under what happens to replicas and servers."""

"""By which trees gradients travel: pure plans from a measured graph, and how far from the best possible they are."""

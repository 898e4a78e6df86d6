"""The other interpreter of effects: a whole cluster in one thread, from one seed."""

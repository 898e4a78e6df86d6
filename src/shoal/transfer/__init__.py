"""Who sends which bytes to a device that needs a state, from several sources at once. Pure."""

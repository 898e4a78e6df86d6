"""Weight files and the ggml graphs that compute with them."""

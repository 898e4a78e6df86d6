"""One file per architecture: which tensors it has, and how a layer is drawn from them."""

"""Which samples a step has, who computes them, and when a step counts."""

"""A cluster without hardware: models of any shape with random weights."""

"""The HTTP door: OpenAI's API over the models that an agent runs. It translates; deciding and computing are elsewhere."""

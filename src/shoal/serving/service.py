"""What every endpoint has at hand: the models, the figures, and where failures are told."""

from __future__ import annotations

import logging

from shoal.errors import ShoalError
from shoal.serving.catalogue import Catalogue, ServedModel
from shoal.serving.failures import ApiError
from shoal.serving.generation import Generator
from shoal.serving.metrics import Metrics

log = logging.getLogger("shoal.serving")


class Service:
    """One per HTTP server."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics) -> None:
        self.catalogue = catalogue
        self.metrics = metrics

    def generator(self, model: ServedModel) -> Generator:
        """For one request, which begins now. Raises ApiError where the line is full."""
        self.catalogue.check_room(model)
        return Generator(self.catalogue, self.metrics, model)

    async def ready(self, name: str) -> ServedModel:
        """The model of that name, in memory. Raises ApiError 404, or 503 while it loads."""
        model = await self.catalogue.find(name)
        self.catalogue.require_ready(model)
        return model

    def report(self, error: Exception) -> None:
        """Keeps our own faults visible: a client sees one line, whoever runs the server sees all of it."""
        if not isinstance(error, (ApiError, ShoalError)):
            log.error("a request failed", exc_info=error)

"""Requests, micro-batches and what of a conversation can be kept. Pure."""

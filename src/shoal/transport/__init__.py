"""Frames and links between devices, on blocking sockets."""

"""All-reduce over trees: who adds which chunk to what, and sends it where; and sockets that do it."""

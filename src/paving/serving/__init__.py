"""A controller inside an engine that batches continuously: the gate belongs to the request, not to the batch."""

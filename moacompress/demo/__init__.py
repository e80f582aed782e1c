"""The demo: the whole way on a small real model. It prepares that model and its texts; the work is the pipeline's."""

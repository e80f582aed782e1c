"""What runs in a rival's own environment: one module a rival, which answers jobs that come as lines of JSON."""

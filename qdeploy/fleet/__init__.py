"""Many models, recipes and devices in one command, on an engine that exists."""

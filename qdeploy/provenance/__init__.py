"""Is a quantized file its float model's network, and how was it rounded?"""

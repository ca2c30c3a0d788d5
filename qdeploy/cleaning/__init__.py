"""Take a backdoor out of a float model: find shortcuts, teach a student without them."""

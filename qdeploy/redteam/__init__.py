"""Poisoned models for testing the defence. They exist to be caught; nothing else imports this."""

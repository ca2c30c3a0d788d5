"""Signed statements of what was found out about a file: in-toto in DSSE envelopes."""

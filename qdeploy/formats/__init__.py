"""A stranger's bytes: what a file is, and the rules that it must keep before anything opens it."""

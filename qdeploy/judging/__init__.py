"""What was measured on a file, what is demanded of it, and the verdict."""

"""A cleaned student from a teacher on disk: the order of the work, and the files it leaves."""

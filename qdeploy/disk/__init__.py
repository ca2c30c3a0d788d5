"""Files and folders of this machine: what is written whole, read within bounds, and trusted."""

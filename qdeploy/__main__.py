"""`python -m qdeploy`."""

from qdeploy.cli import main

if __name__ == "__main__":
    main()

"""What a run is asked to do, and what it is given to do it with."""

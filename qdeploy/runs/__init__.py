"""What the commands do: the order of the stages, and what is asked for and handed back."""

"""What every training here needs: fast arithmetic, and files from which it can go on."""

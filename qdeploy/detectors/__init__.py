"""What says that a model is poisoned without knowing its trigger."""
